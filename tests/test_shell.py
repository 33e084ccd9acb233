"""The shell commands: what they print, what they write, and how they refuse."""

import subprocess
import sys
from dataclasses import replace

import pytest

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


def test_prove_prints_every_theorem_and_a_tick_for_every_step(capsys):
    assert main(["prove"]) == 0
    out = capsys.readouterr().out
    steps = [step for theorem in symbolic.theorems() for step in theorem.steps]
    assert out.count("✓") == len(steps)
    assert "✗" not in out
    assert all(theorem.name in out and theorem.statement in out for theorem in symbolic.theorems())
    assert all(step.reason in out and f"{step.lhs} = {step.rhs}" in out for step in steps)
    assert out.splitlines()[-1] == f"10 theorems, {len(steps)} steps: all hold"


def test_prove_shows_the_failing_step_and_ends_with_status_1(capsys, monkeypatch):
    first, second = symbolic.theorems()[:2]
    wrong = replace(second.steps[1], rhs=second.steps[1].rhs + 1)
    spoilt = replace(second, steps=(second.steps[0], wrong, *second.steps[2:]))
    monkeypatch.setattr(symbolic, "theorems", lambda: (first, spoilt))
    assert main(["prove"]) == 1
    out = capsys.readouterr().out
    assert out.count("✓") == 6
    assert f"✗ FAILS: {wrong.lhs} = {wrong.rhs}" in out
    assert out.splitlines()[-1] == "2 theorems, 7 steps: 1 FAILED"


def test_plot_writes_the_curves(tmp_path, capsys):
    assert main(["plot", "-o", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").stat().st_size > 50_000
    assert capsys.readouterr() == ("", "")


def test_plot_without_matplotlib_says_what_to_install(monkeypatch, tmp_path, capsys):
    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", "-o", str(tmp_path / "curves.png")]) == 2
    assert "the curves need matplotlib: pip install 'momentum-fix[plots]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["value", "1.5"], "must lie in 0 to 1"),
        (["value", "0.1", "--passes", "0"], "must be an integer of at least 1"),
        (["value", "lots"], "invalid float value: 'lots'"),
        (["value"], "the following arguments are required: momentum"),
        (["plot"], "the following arguments are required: -o/--output"),
        (["plot", "-o", "curves.gif"], "must end in .png, .svg or .pdf"),
        (["plot", "-o", "/no/such/folder/curves.png"], "No such file or directory"),
        ([], "the following arguments are required: command"),
        (["fly"], "invalid choice: 'fly'"),
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
