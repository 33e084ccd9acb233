"""Reading files that were made to break the reader: a result or one sentence, at once, in little memory."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import pickle
import pickletools
import signal
import subprocess
import sys
import tracemalloc

import numpy
import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as distributed

import crafted
from momentum_fix import UnreadableError, audit
from momentum_fix.files import reading, unpickling
from momentum_fix.files.reading import search
from momentum_fix.files.unpickling import RefusedError

MEGABYTES = 350  # a process with torch in it has 220 before it reads anything; this one has 15

GUARDED = """
import json, signal, sys, time
from momentum_fix import UnreadableError, audit

def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024

def late(*_):
    raise SystemExit(f"{path} takes too long")

def read(path):
    try:
        found = audit(path)
        return ["read", len(found.rows), str(found)[:10_000]]
    except UnreadableError as error:
        return ["refused", 0, str(error)]

usual, times, *paths = json.load(sys.stdin)
start = time.process_time()
read(usual)
most = times * (time.process_time() - start)
signal.signal(signal.SIGPROF, late)  # between two steps of Python; in a single step only the other one is heard
for path in paths:
    signal.setitimer(signal.ITIMER_PROF, most)
    signal.setitimer(signal.ITIMER_VIRTUAL, 2 * most)
    if path == "spin":
        while True:
            pass
    if path == "stuck":
        sum(range(10**15))
    if path == "fill":
        full = b"x" * 2**29
        continue
    print(json.dumps([path, *read(path)]), flush=True)
print(json.dumps(["", "peak", peak(), "torch" in sys.modules]))
"""


def guarded(paths, folder, times=100):
    """Audit files in a process of their own; give what each came to, and at the end the peak of its memory.

    None may take more than so many times the computing of a file with 10,000 layers, on this machine and now.
    """
    usual = folder / "usual"
    usual.write_bytes(crafted.many(10_000))
    run = [sys.executable, "-c", GUARDED]
    given = json.dumps([str(usual), times, *map(str, paths)])
    done = subprocess.run(run, input=given, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout[-1000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_no_crafted_file_breaks_hangs_fills_the_memory_or_speaks_to_the_terminal(tmp_path, monkeypatch):
    folder = tmp_path / "crafted"
    folder.mkdir()
    monkeypatch.chdir(folder)
    files = crafted.write(folder)
    *results, (_, _, peak, torch_is_loaded) = guarded(files, tmp_path)
    outcomes = {path: (kind, rows, text) for path, kind, rows, text in results}
    assert outcomes.keys() == set(map(str, files))
    assert peak < MEGABYTES
    assert not torch_is_loaded
    assert not (folder / "harm").exists()
    for kind, _, text in outcomes.values():
        assert all(c.isprintable() or c == "\n" for c in text)
        assert kind == "read" or "\n" not in text
    for name, kind in crafted.EXPECTED.items():
        assert outcomes[str(folder / name)][0] == kind, name
    assert outcomes[str(folder / "torch a hundred thousand.pt")][1] == 100_000
    assert outcomes[str(folder / "safe a hundred thousand.safetensors")][1] == 100_000


def test_these_guards_can_fail(tmp_path):
    with pytest.raises(AssertionError, match="spin takes too long"):
        guarded(["spin"], tmp_path, times=1)
    with pytest.raises(AssertionError, match=f"{-signal.SIGVTALRM}"):
        guarded(["stuck"], tmp_path, times=1)
    assert guarded(["fill"], tmp_path)[-1][2] > MEGABYTES


@pytest.mark.parametrize("name", ["of QInt8", "quantized", "of four bits", "of ComplexDouble", "of 10**5000"])
def test_one_odd_counter_is_named_and_the_others_are_judged(tmp_path, name):
    (tmp_path / "x.pt").write_bytes(crafted.TORCH[f"counter {name}"]())
    odd, good = audit(tmp_path / "x.pt").rows
    assert odd.note.startswith("counter is ")
    assert (good.passes, good.batches) == (1, 7)


def test_a_directory_of_crafted_files_is_read_through(tmp_path, capsys, shell):
    for number, make in enumerate((*crafted.INDEXES.values(), crafted.INDEXES["itself"])):
        (tmp_path / f"{number}.index.json").write_text(json.dumps({"weight_map": make()}))
    (tmp_path / "good.pt").write_bytes(crafted.GOOD)
    (tmp_path / "zero.pt").symlink_to("/dev/zero")
    assert shell("audit", tmp_path) == 2
    out, err = capsys.readouterr()
    assert "good.pt" in out
    assert len(err.splitlines()) == len(crafted.INDEXES) + 2


COUNTERS = {f"{name}.{crafted.COUNTER}": 5 for name in "abc"}


def with_counter(operations):
    return crafted.program(crafted.one(operations))


def test_layers_and_containers_have_a_number_from_which_on_they_are_refused():
    several = [{name: value} for name, value in COUNTERS.items()]
    for tree in (COUNTERS, several):
        assert sum(len(layers) for _, layers in search(tree, 3)) == 3
        with pytest.raises(RefusedError, match="holds more than any network"):
            list(search(tree, 2))
    nested = {"x": {"y": [{}, {"z": [1]}, {"z": [2]}, {"z": [3]}]}}  # nine that are not empty
    assert list(search(nested, 5)) == []
    with pytest.raises(RefusedError, match="holds more than any network"):
        list(search(nested, 4))
    assert list(search([[[1]]] * 100, 3)) == []  # one list a hundred times


def test_the_order_of_a_layers_entries_does_not_matter():
    mean = {"a.running_mean": None, "a.running_var": None}
    for state in ({**mean, "a.num_batches_tracked": 5}, {"a.num_batches_tracked": 5, **mean}):
        assert list(search(state)) == [("", {"a": 5})]


def test_what_is_deeper_than_any_checkpoint_is_not_searched(monkeypatch):
    deep = {"x": [{"y": COUNTERS}]}
    for most, found in ((3, 1), (2, 0)):
        monkeypatch.setattr(reading, "_MAX_DEPTH", most)
        assert len(list(search(deep))) == found


def test_a_state_dict_that_holds_itself_is_found_once():
    itself = dict(COUNTERS)
    itself["itself"] = itself
    assert [way for way, _ in search(itself)] == [""]


def test_a_file_that_holds_no_container_holds_no_layer(tmp_path):
    for thing in (5, torch.zeros(2), "text"):
        torch.save(thing, tmp_path / "x.pt")
        assert audit(tmp_path / "x.pt").rows == ()


def test_names_have_a_length_together_from_which_on_a_file_is_refused(tmp_path, monkeypatch):
    torch.save({"way": COUNTERS}, tmp_path / "x.pt")
    (tmp_path / "x.safetensors").write_bytes(crafted.safetensors(dict.fromkeys(COUNTERS, crafted.described())))
    for file, words in (("x.pt", 3 * len("way/a")), ("x.safetensors", 3)):
        monkeypatch.setattr(reading, "_MAX_CHARACTERS", words)
        assert len(audit(tmp_path / file).rows) == 3
        monkeypatch.setattr(reading, "_MAX_CHARACTERS", words - 1)
        with pytest.raises(UnreadableError, match="holds more than any network"):
            audit(tmp_path / file)


def test_an_error_that_is_kept_does_not_keep_what_was_read(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(crafted.SAFETENSORS["header of lists"]())
    tracemalloc.start()
    try:
        with pytest.raises(UnreadableError) as kept:
            reading.read(tmp_path / "x.safetensors")
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "a description is too long" in str(kept.value)
    assert peak > crafted.MB > now


def test_names_that_do_not_print_or_are_absurdly_long_stay_short_when_they_are_escaped(tmp_path):
    name = "\U000e0001" * 10**6
    torch.save({name: {f"{name}.{crafted.COUNTER}": 5, "x" * 301 + f".{crafted.COUNTER}": 5}}, tmp_path / "x.pt")
    rows = audit(tmp_path / "x.pt").rows
    assert all(row.layer.isprintable() and len(row.layer) < 600 for row in rows)
    assert rows[0].layer.startswith("\\U000e0001\\U000e0001")
    assert rows[1].layer.endswith("/" + "x" * 150 + "…" + "x" * 75)
    ((way, _),) = search({"x" * 300: COUNTERS})
    assert way == "x" * 150 + "…" + "x" * 74 + "/"  # with the slash it is one too long


def test_a_note_on_a_counter_stays_short(tmp_path):
    for operations, note in (
        (crafted.tensor(shape=b"M\x2c\1\x85"), "counter has shape (300,)"),
        (crafted.tensor(shape=b"(" + b"K\2" * 60 + b"t"), "counter has shape (2, 2, 2, 2, 2, 2, 2, 2, 2, 2,…2, 2"),
        (b"c" + b"x" * 190 + b"\n" + b"y" * 190 + b"\n", "counter is of type " + "x" * 40 + "…" + "y" * 20 + ", not"),
    ):
        (tmp_path / "x.pt").write_bytes(with_counter(operations))
        row = audit(tmp_path / "x.pt").rows[0]
        assert row.note.startswith(note)
        assert len(row.note) < 110


def test_a_file_gives_no_more_than_a_part_at_once(tmp_path):
    with open(tmp_path / "x", "wb") as file:
        file.truncate(2**25 + 1)
    with reading._Limited(tmp_path / "x") as file:
        assert len(file.read(2**24)) == 2**24
        with pytest.raises(RefusedError, match="holds more than any network"):
            file.read(2**24 + 1)
        assert file.read_at(2**25, 1) == b"\0"
        assert len(file.read_at(1, 2**25)) == 2**25
        with pytest.raises(RefusedError, match="holds more than any network"):
            file.read_at(0, 2**25 + 1)
        with pytest.raises(RefusedError, match="is shorter than it says"):
            file.read_at(2**25, 2)


def test_the_pickles_of_an_old_file_share_their_steps(tmp_path, monkeypatch):
    data = crafted.legacy(crafted.state(a=5))
    (tmp_path / "x.pt").write_bytes(data)
    stream = io.BytesIO(data)
    steps = sum(1 for _ in range(5) for _ in pickletools.genops(stream))
    monkeypatch.setattr(unpickling, "STEPS", range(steps))
    assert [row.batches for row in audit(tmp_path / "x.pt").rows] == [5]
    monkeypatch.setattr(unpickling, "STEPS", range(steps - 1))
    with pytest.raises(UnreadableError, match="holds more than any network"):
        audit(tmp_path / "x.pt")


def test_what_is_no_file_is_said(tmp_path):
    os.mkfifo(tmp_path / "fifo.pt")
    with pytest.raises(UnreadableError, match=r"fifo\.pt: is a device, a FIFO or a socket, no file$"):
        audit(tmp_path / "fifo.pt")
    (tmp_path / "folder.pt").mkdir()
    index = tmp_path / "x.index.json"
    index.write_text(json.dumps({"weight_map": {crafted.NAME: "folder.pt"}}))
    with pytest.raises(UnreadableError, match=r"index\.json: a shard is unreadable: .*folder\.pt: is a directory$"):
        audit(index)
    with pytest.raises(UnreadableError, match=r"^.*folder\.pt: holds no file that ends in"):
        audit(tmp_path / "folder.pt")


def test_shards_of_a_directory_stand_under_their_index_though_another_index_is_broken(tmp_path):
    (tmp_path / "a.index.json").write_text("{")
    (tmp_path / "b.index.json").write_text(json.dumps({"weight_map": {crafted.NAME: "shard.pt"}}))
    (tmp_path / "shard.pt").write_bytes(crafted.GOOD)
    result = audit(tmp_path)
    assert {row.source for row in result.rows} == {str(tmp_path / "b.index.json")}
    assert list(result.errors) == [str(tmp_path / "a.index.json")]


def test_a_shard_with_many_names_is_read_once(tmp_path, monkeypatch):
    (tmp_path / "shard.pt").write_bytes(crafted.GOOD)
    for number in range(5):
        (tmp_path / f"{number}.pt").symlink_to("shard.pt")
    (tmp_path / "x.index.json").write_text(
        json.dumps({"weight_map": {f"{number}.running_mean": f"{number}.pt" for number in range(5)}})
    )
    opened, of_reading = [], reading._open
    monkeypatch.setattr(reading, "_open", lambda path: opened.append(path.name) or of_reading(path))
    assert len(audit(tmp_path / "x.index.json").rows) == 2
    assert opened == ["x.index.json", "4.pt"]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_files_of_every_protocol_are_read(protocol, legacy, tmp_path):
    norm = nn.BatchNorm1d(3)
    norm(torch.rand(4, 3))
    tree = {"state_dict": norm.state_dict(), "best": float("nan"), "names": {"a"}, "random": bytes(300)}
    torch.save(tree, tmp_path / "x.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    (row,) = audit(tmp_path / "x.pt").rows
    assert (row.layer, row.batches) == ("state_dict/", 1)


@pytest.mark.filterwarnings("ignore:.*serialization")
def test_a_legacy_file_with_a_module_in_it_is_read_beside_it(tmp_path):
    norm = nn.BatchNorm1d(3)
    torch.save({"model": norm, "weights": norm.state_dict()}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert [row.layer for row in audit(tmp_path / "x.pt").rows] == ["weights/"]
    torch.save(norm, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UnreadableError, match=r"Save `model\.state_dict\(\)` and audit that"):
        audit(tmp_path / "x.pt")


def test_an_archive_that_is_another_loaders_is_refused(tmp_path):
    (tmp_path / "x.pt").write_bytes(crafted.GOOD * 2)
    with pytest.raises(UnreadableError, match="something stands before its first entry"):
        audit(tmp_path / "x.pt")
    torch.jit.script(nn.BatchNorm1d(3)).save(tmp_path / "x.pt")
    with pytest.raises(UnreadableError, match="is TorchScript"):
        audit(tmp_path / "x.pt")


# Files of other formats: what they are, by what is in them, and what to do with them.


def trained():
    norm = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    norm(torch.rand(4, 3))
    return norm.eval()


def exported(folder):
    torch.export.save(torch.export.export(trained(), (torch.rand(4, 3),)), folder / "x.pt2")
    return (folder / "x.pt2").read_bytes()


def saved_by(save, *things, **named):
    file = io.BytesIO()
    save(file, *things, **named)
    return file.getvalue()


GRAPH = b'3\n\x0c\n\x01X\x12\x01Y"\x04Relu\x12\x01gZ\x0f\n\x01X\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01b\x0f'
FORMATS = {  # what makes a file, and what is said of it; ONNX as its own library writes it, with a producer and without
    "npz": (lambda _: saved_by(numpy.savez, **{crafted.NAME: numpy.array(5)}), "is a NumPy archive"),
    "compressed npz": (lambda _: saved_by(numpy.savez_compressed, **{crafted.NAME: numpy.array(5)}), "is a NumPy arch"),
    "npy": (lambda _: saved_by(numpy.save, numpy.zeros(3)), "is a NumPy array, without names of layers"),
    "pt2": (exported, r"is a program of torch\.export\. Audit `torch\.export\.load\(file\)\.state_dict`$"),
    "pt2 of old": (
        lambda _: crafted.archive([("version", b"5.3"), ("serialized_exported_program.json", b"{}")]),
        "is a program of torch.export",
    ),
    "h5": (lambda _: b"\x89HDF\r\n\x1a\n\0\0\0\0", "is HDF5, as Keras writes it, whose layers do not count batches"),
    "keras": (lambda _: crafted.archive([("config.json", b"{}"), ("model.weights.h5", b"")]), "is a model as Keras"),
    "onnx": (lambda _: b"\x08\x0e\x12\x07pytorch\x1a\x042.13:" + GRAPH, "is ONNX, an exported graph without counters"),
    "onnx of nobody": (lambda _: b"\x08\x0e:" + GRAPH, "is ONNX"),
    "gzip": (lambda _: gzip.compress(crafted.GOOD), "is compressed. Decompress it, and audit what it holds"),
    "bzip2": (lambda _: bz2.compress(crafted.GOOD), "is compressed"),
    "xz": (lambda _: lzma.compress(crafted.GOOD), "is compressed"),
    "tar": (lambda _: b"x" * 257 + b"ustar\0" + bytes(10_000), "is a tar archive. Unpack it, and audit what it holds"),
    "pickle": (
        lambda _: pickle.dumps({crafted.NAME: 5}),
        "is a pickle, but not of torch.save; nothing in it was execu",
    ),
    "pointer": (
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        "with `git lfs pull`$",
    ),
    "web page": (lambda _: b"\n<!DOCTYPE html>\n<html>", "is a web page"),
    "another web page": (lambda _: b"<html><head>", "is a web page"),
    "another zip": (lambda _: crafted.archive([("word/document.xml", b"")]), "is damaged or no checkpoint$"),
    "another beginning": (lambda _: b"\x08\x01\x12\x07pytorch", "it begins as none does"),
}


@pytest.mark.parametrize("ending", [".pt", ".safetensors", ".npz", ""])
@pytest.mark.parametrize(("make", "said"), FORMATS.values(), ids=FORMATS)
def test_a_file_of_another_format_is_named_for_what_it_is_whatever_its_name(make, said, ending, tmp_path):
    (tmp_path / f"file{ending}").write_bytes(make(tmp_path))
    with pytest.raises(UnreadableError, match=said):
        audit(tmp_path / f"file{ending}")


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.9 says so of what it reads itself
def test_what_is_said_to_be_done_with_other_formats_works(tmp_path):
    model = trained()
    numpy.savez(tmp_path / "x.npz", **{name: value.numpy() for name, value in model.state_dict().items()})
    exported(tmp_path)
    for source in (numpy.load(tmp_path / "x.npz"), torch.export.load(tmp_path / "x.pt2").state_dict):
        assert [(row.layer, row.batches) for row in audit(source).rows] == [("1", 1)]


@pytest.mark.filterwarnings("ignore:torch.distributed")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch 2.9 says so of what it does itself
def test_a_distributed_checkpoint_is_named_and_can_be_read_when_it_is_converted(tmp_path):
    folder = tmp_path / "checkpoint"
    distributed.save({"model": trained().state_dict(), "epoch": 3}, checkpoint_id=folder, no_dist=True)
    for path in (folder, folder / "__0_0.distcp"):
        with pytest.raises(UnreadableError, match="is a distributed checkpoint"):
            audit(path)
    with pytest.raises(UnreadableError, match="is a pickle, but not of torch"):
        audit(folder / ".metadata")
    with pytest.raises(UnreadableError) as caught:
        audit(folder)
    _, command, _ = str(caught.value).split("`")
    python, *run, directory, file = command.split()
    assert (python, directory, file) == ("python", "DIRECTORY", "FILE")
    subprocess.run([sys.executable, *run, str(folder), str(tmp_path / "x.pt")], capture_output=True, check=True)
    assert [(row.layer, row.batches) for row in audit(tmp_path / "x.pt").rows] == [("model/1", 1)]


def test_a_directory_is_a_distributed_checkpoint_only_if_it_holds_no_other(tmp_path):
    (tmp_path / "__0_0.distcp").touch()
    (tmp_path / "x.pt").write_bytes(crafted.GOOD)
    assert len(audit(tmp_path).rows) == 2


def test_a_file_is_read_for_what_it_is_whatever_its_name(tmp_path):
    safe = crafted.safetensors({crafted.NAME: crafted.described()})
    for name, data in (("x.bin", safe), ("x", safe), ("y.safetensors", crafted.GOOD), ("y.pth.tar", crafted.GOOD)):
        (tmp_path / name).write_bytes(data)
        assert audit(tmp_path / name).rows[0].batches == 7
    (tmp_path / "x.safetensors").write_bytes(crafted.legacy(crafted.state(a=5)))
    assert audit(tmp_path / "x.safetensors").rows[0].batches == 5
    long = {
        f"{number}.{crafted.COUNTER}": crafted.described() for number in range(300)
    }  # a length that begins with \x80
    header = json.dumps(long).encode()
    header += b" " * (-(len(header) + 128) % 256)
    assert crafted.safetensors(header)[:1] == b"\x80"  # as a pickle begins
    (tmp_path / "x.safetensors").write_bytes(crafted.safetensors(header))
    assert len(audit(tmp_path / "x.safetensors").rows) == 300


def test_checkpoints_that_end_in_tar_are_not_left_out_of_a_directory(tmp_path):
    names = ["model_best.pth.tar", "a.pt.tar", "b.ckpt.tar", "c.pth"]
    for name in (*names, "photos.tar", "notes.txt"):
        (tmp_path / name).write_bytes(crafted.GOOD)
    assert {row.source for row in audit(tmp_path).rows} == {str(tmp_path / name) for name in names}


STORAGE = b"(" + crafted.text("storage") + b"ctorch\nLongStorage\n" + crafted.text("0") + crafted.text("cpu") + b"K\1"
TORCHS = b"ctorch._utils\n_rebuild_tensor_v2\n("


PICKLED = b"\x80\x02" + crafted.one(crafted.tensor()) + b"."
SEVEN = b"\x07" + bytes(7)
SAYS = {  # what is wrong with a file, and what is said of it
    "a shape of text": (with_counter(crafted.tensor(shape=crafted.text("x") + b"\x85")), "a shape is not made of"),
    "a shape of truths": (with_counter(crafted.tensor(shape=b"\x88\x85")), "a shape is not made of numbers"),
    "a shape of 65": (with_counter(crafted.tensor(shape=b"(" + b"K\1" * 65 + b"t")), "a shape is not made of numbers"),
    "a shape that is huge": (
        with_counter(crafted.tensor(shape=b"\x8a\x0a" + b"\x7f" * 10 + b"\x85")),
        "a shape is not",
    ),
    "a list for a shape": (with_counter(crafted.tensor(shape=b"]")), "a tensor is not described as torch does"),
    "no storage": (with_counter(TORCHS + b"NK\0)tR"), "a tensor has no storage"),
    "a short storage": (with_counter(TORCHS + STORAGE[:-2] + b"tQK\0)tR"), "a tensor has no storage"),
    "a long storage": (with_counter(TORCHS + STORAGE + b"NNtQK\0)tR"), "a tensor has no storage"),
    "a list for a storage": (with_counter(TORCHS + b"](K\1K\1K\1K\1K\1eK\0)tR"), "a tensor has no storage"),
    "a view of a storage": (with_counter(TORCHS + STORAGE + b"K\1tQK\0)tR"), "a tensor is not described"),
    "a type that is text": (
        with_counter(TORCHS + STORAGE.replace(b"ctorch\nLongStorage\n", crafted.text("x")) + b"tQK\0)tR"),
        "a tensor is not described",
    ),
    "a key that is a number": (
        with_counter(TORCHS + STORAGE.replace(crafted.text("0"), b"K\0") + b"tQK\0)tR"),
        "a tensor is not described",
    ),
    "a key of 100 letters": (with_counter(crafted.tensor(key="k" * 100)), "a tensor is not described"),
    "an offset below 0": (with_counter(crafted.tensor(offset=b"J\xff\xff\xff\xff")), "a tensor is not described"),
    "an offset that is text": (with_counter(crafted.tensor(offset=crafted.text("x"))), "a tensor is not described"),
    "an offset that is a truth": (with_counter(crafted.tensor(offset=b"\x88")), "a tensor is not described"),
    "an offset beyond the storage": (with_counter(crafted.tensor(offset=b"K\1")), "its entries are not where it says"),
    "an encrypted entry": (
        crafted.GOOD.replace(b"PK\1\2\x14\x03\x14\0\0\0", b"PK\1\2\x14\x03\x14\0\1\0", 1),
        "is compressed or encrypted",
    ),
    "two entries of one name": (
        crafted.archive([("m/data.pkl", PICKLED), ("m/data/0", SEVEN), ("m/data/1", SEVEN)]).replace(
            b"data/1", b"data/0"
        ),
        "two entries of",
    ),
    "two roots": (
        crafted.archive([("m/data.pkl", PICKLED), ("n/data/0", SEVEN)]),
        "two entries of one name, or several roots",
    ),
    "a header that is none": (
        crafted.GOOD.replace(b"PK\3\4", b"PK\3\5").replace(b"PK\3\5", b"PK\3\4", 1),
        "its entries are not where it says",
    ),
    "no magic number": (pickle.dumps(5, 2) * 5, "is a pickle, but not of torch.save; nothing in it was executed"),
    "no beginning": (b"nothing", "it begins as none does"),
    "keys that are no texts": (
        crafted.legacy({}).replace(b"\x80\x02]q\0.", b"\x80\x02](K\1K\2e."),
        "a storage has no name",
    ),
    "an old file that is cut": (crafted.legacy(crafted.state(a=5))[:-1], "it is shorter than it says"),
}
SAFE = {
    "offsets below 0": (crafted.described(offsets=(-8, 8)), "a tensor ends before it starts"),
    "offsets in reverse": (crafted.described(offsets=(8, 0)), "a tensor ends before it starts"),
    "data that are too few": (crafted.described(offsets=(4, 12)), "it is shorter than it says"),
    "a long description": ({**crafted.described(), "x": "x" * 1000}, "a description is too long"),
    "a description of text": ("x", "its header is not of safetensors"),
}


@pytest.mark.parametrize(("data", "said"), SAYS.values(), ids=SAYS)
def test_what_is_wrong_with_a_file_is_said(data, said, tmp_path):
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(UnreadableError, match=said):
        audit(tmp_path / "x.pt")


@pytest.mark.parametrize(("description", "said"), SAFE.values(), ids=SAFE)
def test_what_is_wrong_with_a_file_of_safetensors_is_said(description, said, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(crafted.safetensors({crafted.NAME: description}))
    with pytest.raises(UnreadableError, match=said):
        audit(tmp_path / "x.safetensors")


def test_a_tensor_that_is_described_twice_is_named(tmp_path):
    twice = json.dumps({crafted.NAME: crafted.described()}).encode()
    (tmp_path / "x.safetensors").write_bytes(crafted.safetensors(twice[:-1] + b"," + twice[1:]))
    with pytest.raises(UnreadableError, match="it describes a twice"):
        audit(tmp_path / "x.safetensors")


def test_metadata_may_be_long_but_not_as_long_as_it_likes(tmp_path, monkeypatch):
    header = {"__metadata__": {"x": '}{"' * 1000}, crafted.NAME: crafted.described()}
    (tmp_path / "x.safetensors").write_bytes(crafted.safetensors(header))
    assert [row.batches for row in audit(tmp_path / "x.safetensors").rows] == [7]
    length = len(json.dumps(header["__metadata__"]))
    for longest, refused in ((4 * length, False), (4 * length - 4, True)):
        monkeypatch.setattr(reading, "_MAX_BYTES", longest)
        with pytest.raises(UnreadableError, match="is too long") if refused else contextlib.nullcontext():
            audit(tmp_path / "x.safetensors")


def test_a_tensor_of_a_storage_that_was_on_another_device_is_read(tmp_path):
    (tmp_path / "x.pt").write_bytes(with_counter(crafted.tensor(kind=b"ctorch.cuda\nLongStorage\n")))
    assert [row.batches for row in audit(tmp_path / "x.pt").rows] == [7, 7]


def test_an_old_file_of_a_big_endian_machine_is_read(tmp_path):
    data = crafted.legacy(crafted.state(a=5))
    tail = b"".join(number.to_bytes(8, "big") for number in (1, 5))
    at = data.index(b"\x88", data.index(b"little_endian"))
    (tmp_path / "x.pt").write_bytes(data[:at] + b"\x89" + data[at + 1 : -16] + tail)
    assert [row.batches for row in audit(tmp_path / "x.pt").rows] == [5]


def test_statistics_and_counters_may_be_in_different_shards(tmp_path):
    for first, second in (("running_mean", crafted.COUNTER), (crafted.COUNTER, "running_mean")):
        for number, kind in enumerate((first, second)):
            value = torch.tensor(5) if kind == crafted.COUNTER else torch.zeros(3)
            torch.save({f"a.{kind}": value}, tmp_path / f"{number}.pt")
        index = {f"a.{first}": "0.pt", f"a.{second}": "1.pt"}
        (tmp_path / "x.index.json").write_text(json.dumps({"weight_map": index}))
        assert [(row.layer, row.batches) for row in audit(tmp_path / "x.index.json").rows] == [("a", 5)]


def test_a_layer_of_shards_that_has_no_counter_is_named(tmp_path):
    torch.save({"a.running_mean": torch.zeros(3)}, tmp_path / "0.pt")
    (tmp_path / "x.index.json").write_text(json.dumps({"weight_map": {"a.running_mean": "0.pt"}}))
    assert [row.note for row in audit(tmp_path / "x.index.json").rows] == ["no counter"]


def test_the_way_to_a_state_dict_is_written_as_it_was_gone():
    ((way, _),) = search({"a": [{(1, 2): {None: {10**19: {10**20: COUNTERS}}}}]})
    assert way == f"a/0/(tuple)/(NoneType)/{10**19}/(int)/"
    deep = COUNTERS
    for number in range(21):
        deep = {f"k{number}": deep}
    ((way, _),) = search(deep)
    assert way == "…/" + "".join(f"k{number}/" for number in reversed(range(20)))
    ((way, _),) = search(deep["k20"])
    assert way == "".join(f"k{number}/" for number in reversed(range(20)))
