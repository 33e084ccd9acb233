"""Reading files that were made to break the reader: a result or one sentence, at once, in little memory."""

import json
import subprocess
import sys

import pytest

import crafted
from momentum_fix import audit
from momentum_fix.__main__ import main

MEGABYTES = 350  # a process with torch in it has 220 before it reads anything; this one has 15

GUARDED = """
import json, signal, sys
from momentum_fix.auditing import UnreadableError, audit

def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024

def late(*_):
    raise SystemExit(f"{path} takes too long")

signal.signal(signal.SIGPROF, late)
for path in json.load(sys.stdin):
    signal.setitimer(signal.ITIMER_PROF, 8)  # seconds of computing: a guard against hanging, no measurement
    if path == "spin":
        while True:
            pass
    if path == "fill":
        full = b"x" * 2**29
        continue
    try:
        found = audit(path)
        print(json.dumps([path, "read", len(found.rows), str(found)[:10_000]]))
    except UnreadableError as error:
        print(json.dumps([path, "refused", 0, str(error)]))
print(json.dumps(["", "peak", peak(), "torch" in sys.modules]))
"""


def guarded(paths):
    """Audit files in a process of their own; give what each came to, and at the end the peak of its memory."""
    run = [sys.executable, "-c", GUARDED]
    paths = json.dumps([str(path) for path in paths])
    done = subprocess.run(run, input=paths, capture_output=True, text=True, check=False, timeout=500)
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_no_crafted_file_breaks_hangs_fills_the_memory_or_speaks_to_the_terminal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = crafted.write(tmp_path)
    *results, (_, _, peak, torch_is_loaded) = guarded(files)
    outcomes = {path: (kind, rows, text) for path, kind, rows, text in results}
    assert outcomes.keys() == set(map(str, files))
    assert peak < MEGABYTES
    assert not torch_is_loaded
    assert not (tmp_path / "harm").exists()
    for kind, _, text in outcomes.values():
        assert all(c.isprintable() or c == "\n" for c in text)
        assert kind == "read" or "\n" not in text
    for name, kind in crafted.EXPECTED.items():
        assert outcomes[str(tmp_path / name)][0] == kind, name
    assert outcomes[str(tmp_path / "torch a hundred thousand.pt")][1] == 100_000
    assert outcomes[str(tmp_path / "safe a hundred thousand.safetensors")][1] == 100_000


def test_these_guards_can_fail():
    with pytest.raises(AssertionError, match="spin takes too long"):
        guarded(["spin"])
    assert guarded(["fill"])[-1][2] > MEGABYTES


@pytest.mark.parametrize("name", ["of QInt8", "quantized", "of four bits", "of ComplexDouble", "of 10**5000"])
def test_one_odd_counter_is_named_and_the_others_are_judged(tmp_path, name):
    (tmp_path / "x.pt").write_bytes(crafted.TORCH[f"counter {name}"]())
    odd, good = audit(tmp_path / "x.pt").rows
    assert odd.note.startswith("counter is ")
    assert (good.passes, good.batches) == (1, 7)


def test_a_directory_of_crafted_files_is_read_through(tmp_path, capsys):
    for number, make in enumerate((*crafted.INDEXES.values(), crafted.INDEXES["itself"])):
        (tmp_path / f"{number}.index.json").write_text(json.dumps({"weight_map": make()}))
    (tmp_path / "good.pt").write_bytes(crafted.GOOD)
    (tmp_path / "zero.pt").symlink_to("/dev/zero")
    assert main(["audit", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "good.pt" in out
    assert len(err.splitlines()) == len(crafted.INDEXES) + 2
