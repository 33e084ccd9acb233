"""The shell commands: what they print, what they write, and how they refuse."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch

import momentum_fix
from momentum_fix import demo, plots, symbolic
from momentum_fix.__main__ import commands


def test_value_prints_the_corrected_momentum_and_nothing_else(capsys, shell):
    assert shell("value", "0.1", "--passes", "2") == 0
    assert capsys.readouterr() == ("0.051316701949486204\n", "")
    assert shell("value", "0.1") == 0
    assert float(capsys.readouterr().out) == momentum_fix.corrected_momentum(0.1, 2)
    assert shell("value", "0.5", "--passes", "7") == 0
    assert float(capsys.readouterr().out) == momentum_fix.corrected_momentum(0.5, 7)


def test_effective_is_the_inverse_of_value(capsys, shell):
    assert shell("effective", "0.051316701949486204") == 0
    assert capsys.readouterr() == ("0.1\n", "")
    assert shell("effective", "0.5", "--passes", "7") == 0
    assert float(capsys.readouterr().out) == momentum_fix.effective_momentum(0.5, 7)


HELP = {
    "": "BatchNorm's running statistics as if|value Print the|effective Print the|prove Check every|plot Draw all the|"
    "audit Find layers that|demo Show the|momentum-fix value 0.1 --passes 2",
    "value": "MOMENTUM is PyTorch's, the weight of the new value|--passes INTEGER Updates per batch. [default: 2]",
    "effective": "the inverse of `value`|--passes INTEGER Updates per batch. [default: 2]",
    "plot": "[decay|--momentum FLOAT|--passes INTEGER|--output FILE|ends in .png, .svg or .pdf",
    "audit": "FILE is a checkpoint, a|--steps INTEGER Batches|--momentum FLOAT The model's momentum. [default: 0.1]|"
    "--json Print JSON",
}


@pytest.mark.parametrize(("command", "said"), HELP.items(), ids=lambda text: text[:5])
def test_the_help_says_what_each_command_and_option_is_for(command, said, capsys, shell):
    assert shell(*command.split(), "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "..." not in shown.replace("FILE...", "").replace("ARGS]...", "")  # no sentence is cut
    assert [each for each in said.split("|") if each not in shown] == []


def test_prove_prints_every_theorem_its_claims_and_then_a_tick_for_every_step(capsys, shell):
    assert shell("prove") == 0
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
def test_prove_shows_what_fails_and_ends_with_status_1(which, capsys, monkeypatch, shell):
    first, second = symbolic.theorems()[2], symbolic.theorems()[0]
    theorem, crossed, line = list(spoilt(first, second))[which]
    monkeypatch.setattr(symbolic, "theorems", lambda: (first, theorem))
    assert shell("prove") == 1
    out = capsys.readouterr().out
    steps = len(first.steps) + len(theorem.steps)
    assert out.count("✓") == steps - crossed
    assert (out.count("✗"), out.count(line)) == (1, 1)
    claims = len(first.claims) + len(theorem.claims)
    assert out.splitlines()[-1] == f"2 theorems, {claims} claims, {steps} steps: 1 FAILED"


def test_plot_writes_the_curves(tmp_path, capsys, shell):
    assert shell("plot", "-o", tmp_path / "curves.png") == 0
    assert (tmp_path / "curves.png").stat().st_size > 50_000
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", plots.PLOTS)
def test_plot_draws_one_plot_with_what_it_is_given(name, tmp_path, shell):
    passes = {} if name == "shares" else {"passes": (3, 4)}
    options = [part for k in passes.get("passes", ()) for part in ("--passes", k)]
    assert shell("plot", name, "--momentum", "0.3", *options, "-o", tmp_path / "shown.svg") == 0
    plots.save(tmp_path / "expected.svg", plots.PLOTS[name](momentum=0.3, **passes).figure)
    plots.save(tmp_path / "other.svg", plots.PLOTS[name](momentum=0.3 + 0.1 * (not passes)).figure)
    shown, expected, other = ((tmp_path / f"{file}.svg").read_bytes() for file in ("shown", "expected", "other"))
    assert shown == expected != other


def test_plot_draws_all_with_the_momentum_that_it_is_given(tmp_path, shell, monkeypatch):
    drawn = []
    monkeypatch.setattr("momentum_fix.plots.save", lambda *given: drawn.append(given))
    monkeypatch.setattr("momentum_fix.plots.figure", lambda momentum: ("page", momentum))
    assert shell("plot", "--momentum", "0.3", "-o", tmp_path / "all.svg") == 0
    assert drawn == [(tmp_path / "all.svg", ("page", 0.3))]


def test_the_demonstration_shows_what_its_runs_came_to(capsys, shell):
    assert shell("demo") == 0
    out, err = capsys.readouterr()
    truth, uncorrected, calibrated, once = map(demo.train, demo.RUNS)
    off = (uncorrected / truth - 1).abs().max()
    assert off > 0.1
    assert torch.equal(once, truth)
    assert torch.allclose(calibrated, truth, rtol=1e-14, atol=0)
    for run, variance, said in zip(
        demo.RUNS,
        (truth, uncorrected, calibrated, once),
        ("", f"{100 * off:.0f} %", "rounding", "nothing, to the bit"),
        strict=True,
    ):
        (line,) = [line for line in out.splitlines() if line.startswith(run)]
        assert f"{variance.mean():.4f} " in line
        assert line.count("█") == round(demo.WIDTH * float(variance.mean()))
        assert line.endswith(said)
        assert variance.dtype == torch.float64
    assert out.splitlines()[-1].endswith("call `update_once(model)`.")
    assert (err, max(map(len, out.splitlines())) < 120) == ("", True)


@pytest.mark.parametrize(("command", "library"), [(["prove"], "sympy"), (["plot", "-o", "x.png"], "matplotlib")])
def test_a_missing_library_is_named_with_what_to_install_from_the_clone(command, library, tmp_path):
    code = f"import sys; sys.modules[{library!r}] = None; from momentum_fix.__main__ import main; main()"
    run = [sys.executable, "-c", code, *command]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    advice = "in a clone of momentum_fix, pip install -c constraints.txt '.[plots]'"
    assert re.sub(r"matplotlib\.\w+", "matplotlib", done.stderr) == f"Error: needs {library}: {advice}\n"


def test_a_shell_without_click_says_what_to_install():
    code = "import sys; sys.modules['click'] = None; from momentum_fix.__main__ import main; main()"
    run = [sys.executable, "-c", code, "value", "0.1"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"Error: needs click: in a clone of momentum_fix, pip install .*\n", done.stderr)


def test_no_name_is_advised_that_anybody_could_register_in_the_index():
    root = Path(momentum_fix.__file__).parent.parent
    texts = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("momentum_fix/*.py"), *root.glob("examples/*.py")]
    assert len(texts) > 20
    assert [text.name for text in texts if re.search(r"pip install\W+momentum", text.read_text(encoding="utf-8"))] == []


ERRORS = [
    (["value", "1.5"], "momentum is 1.5, but must lie in 0 to 1"),
    (["value", "0.1", "--passes", "0"], "must be an integer of at least 1"),
    (["effective", "1.5"], "momentum is 1.5, but must lie in 0 to 1"),
    (["plot", "-o", "curves.gif"], "must end in .png, .svg or .pdf"),
    (["plot", "decay", "-o", "curves.gif"], "must end in .png, .svg or .pdf"),
    (["plot", "decay", "--momentum", "7", "-o", "curves.png"], "momentum is 7.0, but must lie in 0 to 1"),
]
MISUSED = [
    (["value", "lots"], "'lots' is not a valid float"),
    (["value"], "Missing argument 'MOMENTUM'"),
    (["plot"], "Missing option '-o' / '--output'"),
    (["plot", "-o", "/no/such/folder/curves.png"], "Folder '/no/such/folder' cannot be written to"),
    (["plot", "-o", "/"], "File '/' is a directory"),
    (["plot", "fly", "-o", "curves.png"], "'fly' is not one of 'decay', 'cumulative', 'effective', 'shares', 'signal'"),
    (["plot", "shares", "--passes", "3", "-o", "curves.png"], "is of two passes"),
    (["plot", "--passes", "3", "-o", "curves.png"], "--passes needs the NAME of a plot"),
    (["audit", "nowhere.pt"], "Path 'nowhere.pt' does not exist"),
    (["audit"], "Missing argument 'FILE...'"),
    (["fly"], "No such command 'fly'"),
    (["value", "0.1", "--pass", "3"], "No such option"),
    (["--vers"], "No such option"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS + MISUSED)
def test_an_error_is_told_on_stderr_with_exit_status_2(capsys, shell, arguments, message):
    assert shell(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    if (arguments, message) in ERRORS:
        assert err.startswith("Error: ")
        assert err.count("\n") == 1
    else:
        assert err.startswith("Usage: momentum-fix")


def test_an_error_with_a_text_of_absurd_length_is_shortened(capsys, shell):
    assert shell("plot", "-o", f"{'x' * 5000}.png") == 2
    err = capsys.readouterr().err
    assert "xxx…" in err
    assert len(err) < 300


def test_without_arguments_the_help_is_printed(capsys, shell):
    assert shell() == 2
    shown = "".join(capsys.readouterr())
    assert shown.startswith("Usage: momentum-fix")
    assert "momentum-fix value 0.1" in shown


def test_a_picture_that_cannot_be_written_is_refused_before_it_is_drawn(monkeypatch, tmp_path, capsys, shell):
    monkeypatch.setattr("momentum_fix.plots.figure", lambda _: pytest.fail("it was drawn"))
    assert shell("plot", "-o", tmp_path / "nowhere" / "curves.png") == 2
    (tmp_path / "there.png").touch()
    monkeypatch.setattr("os.access", lambda _, mode: mode != os.W_OK)
    assert shell("plot", "-o", tmp_path / "curves.png") == 2
    assert f"Folder '{tmp_path}' cannot be written to" in capsys.readouterr().err
    assert shell("plot", "-o", tmp_path / "there.png") == 2
    assert "there.png' is not writable" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "there.png"]


@pytest.mark.parametrize(
    ("command", "slow"),
    [
        (["value", "0.1"], "momentum_fix.corrected_momentum"),
        (["prove"], "momentum_fix.symbolic.theorems"),
        (["plot", "-o", "curves.png"], "momentum_fix.plots.save"),
        (["audit", "."], "momentum_fix.files.verdict.audit_files"),
        (["demo"], "momentum_fix.demo.demonstrate"),
    ],
)
def test_ctrl_c_ends_every_command_without_a_traceback(command, slow, capsys, monkeypatch, shell):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(slow, interrupted)
    assert shell(*command) == 1
    out, err = capsys.readouterr()
    assert (out, err.strip()) == ("", "Aborted!")


def test_a_signal_from_outside_ends_a_command_without_a_traceback():
    def heeding():  # where the tests run in the background, a shell has them ignore this signal
        signal.signal(signal.SIGINT, signal.default_int_handler)

    run = [sys.executable, "-u", "-m", "momentum_fix", "prove"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(run, preexec_fn=heeding, **pipes) as process:
        assert process.stdout.readline().startswith("The letters ")  # so it is at work
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.stderr.read().strip() == "Aborted!"
    assert process.returncode == 1


def in_a_shell(command, folder, unbuffered=""):
    """Run `momentum_fix` with redirections; give its status and output."""
    torch.save({f"{i}.num_batches_tracked": torch.tensor(5 + i) for i in range(2000)}, folder / "model.pt")
    run = f"{sys.executable} -m momentum_fix {command}"
    options = {"cwd": folder, "env": {**os.environ, "PYTHONUNBUFFERED": unbuffered}}
    done = subprocess.run(run, shell=True, capture_output=True, text=True, check=False, **options)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("command", "status"),
    [("value 0.1", 0), ("audit model.pt", 1), ("audit model.pt --json", 1), ("--help", 0), ("--version", 0), ("", 2)],
)
def test_closed_output_is_no_error(command, status, tmp_path):
    given, out, err = in_a_shell(f"{command} >&-", tmp_path)
    assert (given, out) == (status, "")
    assert err.startswith("Usage: ") or err == ""
    assert in_a_shell(f"{command} >&- 2>&-", tmp_path) == (status, "", "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("nowhere", ["2>&-", "2>/dev/full"])
@pytest.mark.parametrize("command", ["value 2", "audit empty.pt", "fly"])
def test_where_an_error_cannot_be_told_the_status_tells_it(command, nowhere, unbuffered, tmp_path):
    (tmp_path / "empty.pt").touch()
    status, out, err = in_a_shell(f"{command} {nowhere}", tmp_path, unbuffered)
    assert (status, err) == (2, "")
    if command != "fly" or nowhere != "2>&-":  # where click says it on what is left
        assert out == ("Nothing read: no file with norm layers could be read.\n" if "audit" in command else "")


@pytest.mark.parametrize("command", ["prove", "--help", "audit model.pt", "audit model.pt --json", "value 0.1"])
def test_a_closed_pipe_is_silent(command, tmp_path):
    assert in_a_shell(f"{command} | true", tmp_path) == (0, "", "")


@pytest.mark.parametrize("command", ["value 0.1", "audit clean.pt --steps 5", "audit clean.pt --steps 2"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_is_no_finding(command, unbuffered, tmp_path):
    torch.save({"0.num_batches_tracked": torch.tensor(5)}, tmp_path / "clean.pt")
    read, write = os.pipe()
    os.close(read)
    run = [sys.executable, "-m", "momentum_fix", *command.split()]
    options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONUNBUFFERED": unbuffered}, "check": False}
    done = subprocess.run(run, stdout=write, stderr=subprocess.PIPE, **options)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")
    assert subprocess.run(run, stdout=subprocess.PIPE, **options).returncode == command.endswith("2")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["value 0.1", "audit model.pt", "audit model.pt --json", "--help", "--version"])
def test_a_full_disk_is_one_line(command, unbuffered, tmp_path):
    done = in_a_shell(f"{command} >/dev/full", tmp_path, unbuffered)
    assert done == (2, "", "Error: [Errno 28] No space left on device\n")
    assert in_a_shell(f"{command} >/dev/full 2>/dev/full", tmp_path, unbuffered) == (2, "", "")


def test_the_version_is_that_of_the_package_and_of_torch_which_is_not_imported_for_it():
    code = "import sys; from momentum_fix.__main__ import commands; commands(['--version'], 'x', standalone_mode=False)"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"x {momentum_fix.__version__}, torch {metadata.version('torch')}\nFalse\n"
    assert torch.__version__.startswith(metadata.version("torch").partition("+")[0])


def test_a_shell_completes_the_commands():
    environment = {
        **os.environ,
        "_MOMENTUM_FIX_COMPLETE": "bash_complete",
        "COMP_WORDS": "momentum-fix a",
        "COMP_CWORD": "1",
    }
    run = [sys.executable, "-m", "momentum_fix"]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "plain,audit\n"


def test_the_module_runs_and_value_loads_neither_torch_nor_sympy_nor_matplotlib():
    run = [sys.executable, "-X", "importtime", "-m", "momentum_fix", "value", "0.1"]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout == "0.051316701949486204\n"
    for heavy in ("torch", "sympy", "matplotlib", "numpy", "rich"):
        assert f"| {heavy}\n" not in done.stderr
    assert "| click\n" in done.stderr  # so the check above can fail
    run = [sys.executable, "-m", "momentum_fix", "value", "2"]
    assert subprocess.run(run, capture_output=True, check=False).returncode == 2


def test_a_terminal_that_cannot_show_a_tick_still_gets_the_proof():
    run = [sys.executable, "-c", "from momentum_fix.__main__ import main; main(['prove'])"]
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(run, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.endswith("steps: all hold\n")


ROOT = Path(momentum_fix.__file__).parent.parent
COMMAND = re.compile(r"^(?:momentum-fix|python -m momentum_fix) (\w+)(.*?)(?:#.*)?$", re.MULTILINE)
SHOWN = re.compile(r"^```sh\npython -m momentum_fix ([^\n]*)\n```\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_documents_give_commands_and_options_that_there_are():
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    given = [found for page in pages for found in COMMAND.findall(page.read_text(encoding="utf-8"))]
    assert {name for name, _ in given} >= {"value", "plot", "prove", "audit", "demo"}
    for name, arguments in given:
        known = {option for parameter in commands.commands[name].params for option in parameter.opts}
        assert set(re.findall(r"(?<!\S)--?\w+", arguments)) <= known


def test_the_readme_shows_what_a_command_prints(capsys, shell):
    shown = SHOWN.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert shown
    for arguments, expected in shown:
        assert shell(*arguments.split()) == 0
        assert capsys.readouterr().out == expected
