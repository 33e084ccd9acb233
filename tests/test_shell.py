"""The shell commands: what they print, what they write, and how they refuse."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import momentum_fix
from momentum_fix import symbolic
from momentum_fix.__main__ import main


def test_value_prints_the_corrected_momentum_and_nothing_else(capsys):
    assert main(["value", "0.1", "--passes", "2"]) == 0
    assert capsys.readouterr().out == "0.051316701949486204\n"
    assert main(["value", "0.1"]) == 0
    assert float(capsys.readouterr().out) == momentum_fix.corrected_momentum(0.1, 2)
    assert main(["value", "0.5", "--passes", "7"]) == 0
    assert float(capsys.readouterr().out) == momentum_fix.corrected_momentum(0.5, 7)


HELP = {
    "": "BatchNorm's running statistics as if|value print the|prove check every|plot draw the|audit find layers",
    "value": "momentum PyTorch's momentum, the weight|--passes PASSES updates per batch (default: 2)",
    "plot": "--output FILE file to write",
    "audit": "file a checkpoint, a|--steps STEPS batches|--momentum MOMENTUM the model's momentum (default: 0.1)|"
    "--json print JSON",
}


@pytest.mark.parametrize(("command", "said"), HELP.items(), ids=lambda text: text[:5])
def test_the_help_says_what_each_command_and_option_is_for(command, said, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*command.split(), "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(each in shown for each in said.split("|"))


def test_prove_prints_every_theorem_its_claims_and_then_a_tick_for_every_step(capsys):
    assert main(["prove"]) == 0
    out = capsys.readouterr().out
    theorems = symbolic.theorems()
    claims, steps = ([part for theorem in theorems for part in getattr(theorem, name)] for name in ("claims", "steps"))
    assert out.count("✓") == len(steps)
    assert out.count("claim: ") == len(claims)
    assert "✗" not in out
    assert all(f"{step}\n       {step.reason}" in out for step in steps)
    assert out.splitlines()[-1] == f"{len(theorems)} theorems, {len(claims)} claims, {len(steps)} steps: all hold"
    assert out.startswith(symbolic.letters.__doc__)
    places = [
        out.index(f"{number}. {theorem.name}\n   {theorem.statement}\n   claim: ")
        for number, theorem in enumerate(theorems, 1)
    ]
    for theorem, place, after in zip(theorems, places, [*places[1:], len(out)], strict=True):
        shown = out[place:after]
        assert shown.count("claim: ") == len(theorem.claims)
        assert shown.rindex("claim: ") < shown.index("✓")
    assert "claim: 1 - q**(n + 1) > 1 - q\n" in out
    assert (
        "claim: R_k = R_0*alpha**k + b*(1 - alpha**k), for R_(k + 1) = R_k*alpha + b*(1 - alpha) and R_0 = R_0\n" in out
    )
    assert "claim: Subs(1 - (1 - p)**k, p, 1 - (1 - m)**(1/k)) = m\n" in out
    assert "claim: n + 1 > (1 - q**(n + 1))*(q + 1)/((1 - q)*(q**(n + 1) + 1))\n" in out


def spoilt(first, second):
    wrong = replace(second.steps[-1], rhs=second.steps[-1].rhs + 1)
    yield replace(second, steps=(*second.steps[:-1], wrong)), 1, f"✗ FAILS: {wrong.lhs} = {wrong.rhs}"
    yield replace(second, steps=second.steps[:-1]), 0, "✗ FAILS: "  # what is left holds, but does not prove the claims


@pytest.mark.parametrize("which", [0, 1])
def test_prove_shows_what_fails_and_ends_with_status_1(which, capsys, monkeypatch):
    first, second = symbolic.theorems()[2], symbolic.theorems()[0]
    theorem, crossed, line = list(spoilt(first, second))[which]
    monkeypatch.setattr(symbolic, "theorems", lambda: (first, theorem))
    assert main(["prove"]) == 1
    out = capsys.readouterr().out
    steps = len(first.steps) + len(theorem.steps)
    assert out.count("✓") == steps - crossed
    assert (out.count("✗"), out.count(line)) == (1, 1)
    claims = len(first.claims) + len(theorem.claims)
    assert out.splitlines()[-1] == f"2 theorems, {claims} claims, {steps} steps: 1 FAILED"


def test_plot_writes_the_curves(tmp_path, capsys):
    assert main(["plot", "-o", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").stat().st_size > 50_000
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("command", "library", "extra"),
    [(["prove"], "sympy", "'.'"), (["plot", "-o", "curves.png"], "matplotlib", "'.[plots]'")],
)
def test_a_missing_library_is_named_with_what_to_install_from_the_clone(command, library, extra, tmp_path):
    code = f"import sys; sys.modules[{library!r}] = None; from momentum_fix.__main__ import main; sys.exit(main())"
    run = [sys.executable, "-c", code, *command]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    advice = f"in a clone of momentum_fix, pip install -c constraints.txt {extra}"
    assert done.stderr == f"momentum-fix {command[0]}: needs {library}: {advice}\n"


def test_no_name_is_advised_that_anybody_could_register_in_the_index():
    root = Path(momentum_fix.__file__).parent.parent
    texts = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("momentum_fix/*.py"), *root.glob("examples/*.py")]
    assert len(texts) > 20
    assert [text.name for text in texts if re.search(r"pip install\W+momentum", text.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["value", "1.5"], "must lie in 0 to 1"),
        (["value", "0.1", "--passes", "0"], "must be an integer of at least 1"),
        (["value", "lots"], "invalid float value: 'lots'"),
        (["value"], "the following arguments are required: momentum"),
        (["plot"], "the following arguments are required: -o/--output"),
        (["plot", "-o", "curves.gif"], "must end in .png, .svg or .pdf"),
        (["plot", "-o", "/no/such/folder/curves.png"], "No such file or directory: '/no/such/folder'"),
        (["plot", "-o", "/"], "Is a directory: '/'"),
        (["fly"], "invalid choice: 'fly'"),
        (["value", "0.1", "--pass", "3"], "unrecognized arguments: --pass 3"),
        (["audit", "x.pt", "--step", "3"], "unrecognized arguments: --step 3"),
        (["--vers"], "unrecognized arguments: --vers"),
        (["value", "0.1", "--x\x1b[2J"], "unrecognized arguments: --x\\x1b[2J"),
    ],
)
def test_an_error_is_one_line_with_exit_status_2(capsys, arguments, message):
    try:
        status = main(arguments)
    except SystemExit as end:  # argparse's own errors
        status = end.code
    assert status == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("momentum-fix")
    assert message in err


@pytest.mark.parametrize("arguments", [["plot", "-o", f"{'x' * 5000}.png"], ["value", "x" * 5000], ["x" * 5000]])
def test_an_error_with_a_text_of_absurd_length_is_shortened(capsys, arguments):
    try:
        status = main(arguments)
    except SystemExit as end:  # argparse's own errors
        status = end.code
    assert status == 2
    err = capsys.readouterr().err
    assert "xxx…" in err
    assert len(err) < 300


def test_without_arguments_the_help_is_printed(capsys):
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: momentum-fix")
    assert "momentum_fix value 0.1" in out
    assert err == ""


def test_a_picture_that_cannot_be_written_is_refused_before_it_is_drawn(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("momentum_fix.plots.figure", lambda: pytest.fail("it was drawn"))
    assert main(["plot", "-o", str(tmp_path / "nowhere" / "curves.png")]) == 2
    monkeypatch.setattr("os.access", lambda *_: False)
    assert main(["plot", "-o", str(tmp_path / "curves.png")]) == 2
    assert f"Permission denied: '{tmp_path / 'curves.png'}'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "slow"),
    [
        (["value", "0.1"], "momentum_fix.corrected_momentum"),
        (["prove"], "momentum_fix.symbolic.theorems"),
        (["plot", "-o", "curves.png"], "momentum_fix.plots.save"),
        (["audit", "x.pt"], "momentum_fix.files.verdict.audit_files"),
    ],
)
def test_ctrl_c_is_one_line_and_status_130_in_every_command(command, slow, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(slow, interrupted)
    assert main(command) == 130
    assert capsys.readouterr() == ("", "momentum-fix: interrupted\n")


def test_a_signal_from_outside_ends_a_command_without_a_traceback():
    def heeding():  # where the tests run in the background, a shell has them ignore this signal
        signal.signal(signal.SIGINT, signal.default_int_handler)

    run = [sys.executable, "-u", "-m", "momentum_fix", "prove"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(run, preexec_fn=heeding, **pipes) as process:
        assert process.stdout.readline().startswith("The letters ")  # so it is at work
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.stderr.read() == "momentum-fix: interrupted\n"
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("handler", "expected"),
    [(signal.SIG_DFL, (-signal.SIGINT, "", "")), (signal.SIG_IGN, (0, "0.051316701949486204\n", ""))],
)
def test_ctrl_c_during_the_imports_is_silent_and_may_be_ignored(handler, expected, tmp_path):
    def as_started():
        signal.signal(signal.SIGINT, handler)

    at_import_and_at_the_end = "raise_signal(SIGINT); import atexit; atexit.register(raise_signal, SIGINT)"
    (tmp_path / "json.py").write_text(f"from signal import SIGINT, raise_signal; {at_import_and_at_the_end}")
    run = [sys.executable, "-m", "momentum_fix", "value", "0.1"]  # which imports json from where it is started
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=tmp_path, preexec_fn=as_started)
    assert (done.returncode, done.stdout, done.stderr) == expected


def in_a_shell(command, folder, unbuffered=""):
    """Run `momentum_fix` with redirections; give its status and output."""
    torch.save({f"{i}.num_batches_tracked": torch.tensor(5 + i) for i in range(2000)}, folder / "model.pt")
    run = f"{sys.executable} -m momentum_fix {command}"
    options = {"cwd": folder, "env": {**os.environ, "PYTHONUNBUFFERED": unbuffered}}
    done = subprocess.run(run, shell=True, capture_output=True, text=True, check=False, **options)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("command", "status"), [("value 0.1", 0), ("audit model.pt", 1), ("--help", 0), ("--version", 0), ("", 0)]
)
def test_closed_output_is_no_error(command, status, tmp_path):
    assert in_a_shell(f"{command} >&-", tmp_path) == (status, "", "")
    assert in_a_shell(f"{command} >&- 2>&-", tmp_path) == (status, "", "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("nowhere", ["2>&-", "2>/dev/full"])
@pytest.mark.parametrize("command", ["value 2", "audit nowhere.pt", "fly"])
def test_where_an_error_cannot_be_told_the_status_tells_it(command, nowhere, unbuffered, tmp_path):
    status, out, err = in_a_shell(f"{command} {nowhere}", tmp_path, unbuffered)
    assert (status, err) == (2, "")
    assert out == ("Nothing read: no file with norm layers could be read.\n" if "audit" in command else "")


@pytest.mark.parametrize("command", ["prove", "--help", "audit model.pt", "audit model.pt --json", "value 0.1"])
def test_a_closed_pipe_is_silent(command, tmp_path):
    assert in_a_shell(f"{command} | true", tmp_path) == (0, "", "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("value 0.1", "momentum-fix value"),
        ("audit model.pt", "momentum-fix audit"),
        ("--help", "momentum-fix"),
        ("--version", "momentum-fix"),
        ("", "momentum-fix"),
    ],
)
def test_a_full_disk_is_one_line(command, name, unbuffered, tmp_path):
    done = in_a_shell(f"{command} >/dev/full", tmp_path, unbuffered)
    assert done == (2, "", f"{name}: [Errno 28] No space left on device\n")
    assert in_a_shell(f"{command} >/dev/full 2>/dev/full", tmp_path, unbuffered) == (2, "", "")


def test_version_and_help_with_examples(capsys):
    for arguments, expected in ((["--version"], momentum_fix.__version__), (["--help"], "momentum_fix value 0.1")):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0
        assert expected in capsys.readouterr().out


def test_the_module_runs_and_value_loads_neither_torch_nor_sympy_nor_matplotlib():
    run = [sys.executable, "-X", "importtime", "-m", "momentum_fix", "value", "0.1"]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout == "0.051316701949486204\n"
    for heavy in ("torch", "sympy", "matplotlib"):
        assert f"| {heavy}\n" not in done.stderr
    assert "| argparse\n" in done.stderr  # so the check above can fail
    run = [sys.executable, "-m", "momentum_fix", "value", "2"]
    assert subprocess.run(run, capture_output=True, check=False).returncode == 2


def test_a_terminal_that_cannot_show_a_tick_still_gets_the_proof():
    run = [sys.executable, "-c", "from momentum_fix.__main__ import main; raise SystemExit(main(['prove']))"]
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(run, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.endswith("steps: all hold\n")
