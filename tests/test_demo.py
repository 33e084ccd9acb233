"""The demonstration: MONAI's network on the brain that nilearn carries, and what it shows."""

import contextlib
import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import brain
from momentum_fix import corrected_momentum

SCRIPT = Path(__file__).parent.parent / "examples" / "brain.py"
PNG = b"\x89PNG"
PASSES = [2, 3, 4, 5, 5, 4, 3, 2]  # by depth
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory):
    """Give what the demonstration came to, its status, what it printed, and its picture: it runs once."""
    torch.set_default_dtype(torch.float32)
    file, outcomes = tmp_path_factory.mktemp("demo") / "picture.png", []
    with pytest.MonkeyPatch.context() as patch, io.StringIO() as out, io.StringIO() as err:
        train = brain.train
        patch.setattr(brain, "train", lambda *given: outcomes.append(train(*given)) or outcomes[0])
        patch.setattr(sys, "argv", ["brain.py", "-o", str(file)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = brain.main()
        return outcomes[0], status, out.getvalue(), err.getvalue(), file


@slow
def test_the_layers_are_found_with_2_3_4_and_5_passes_by_depth(demonstration):
    outcome, *_ = demonstration
    assert list(outcome.passes) == PASSES
    assert all(len(run.deviations) == len(outcome.layers) == 8 for run in outcome.runs.values())


@slow
def test_calibrated_deviations_are_rounding_those_of_update_once_are_nothing_and_uncorrected_ones_are_large(
    demonstration,
):
    outcome, *_ = demonstration
    truth, nothing, calibrated, once = outcome.runs.values()
    assert outcome.same_path
    assert min(nothing.deviations) > 1e-2
    assert max(calibrated.deviations) < 1e-13
    assert max(once.deviations) == max(truth.deviations) == 0
    assert (nothing.brain - truth.brain).abs().max() > 0.1
    assert (calibrated.brain - truth.brain).abs().max() < 1e-12
    assert torch.equal(once.brain, truth.brain)


@slow
def test_without_a_correction_more_voxels_are_wrong_and_with_one_as_many_as_without_checkpointing(demonstration):
    outcome, *_ = demonstration
    truth, nothing, calibrated, once = (int(run.wrong.sum()) for run in outcome.runs.values())
    assert nothing > 1.2 * truth
    assert calibrated == once == truth


@slow
def test_it_prints_both_tables_and_what_is_equal(demonstration):
    _, status, printed, _, _ = demonstration
    rows = re.findall(r"^model\.\S+  +(\d) +(\S+) +(\S+) +(\S+) +(\S+)$", printed, re.MULTILINE)
    assert [int(row[0]) for row in rows] == PASSES
    for k, corrected, uncorrected_off, calibrated_off, once_off in rows:
        assert float(corrected) == pytest.approx(corrected_momentum(0.1, int(k)), rel=1e-5)
        assert float(uncorrected_off) > 1e-2
        assert float(calibrated_off) < 1e-13
        assert float(once_off) == 0
    wrong = re.findall(r"^with(?:out)? \w+ .*?([\d.]+) %$", printed, re.MULTILINE)
    assert len(wrong) == 4
    assert wrong[0] == wrong[2] == wrong[3] < wrong[1]
    assert "bit-for-bit equal" in printed
    assert status == 0


@slow
def test_its_progress_is_lines_which_a_log_file_holds_too(demonstration):
    *_, said, _ = demonstration
    assert re.findall(r"^step (\d+) of 40, four networks: loss [\d.]+$", said, re.M) == [
        str(4 * n) for n in range(1, 11)
    ]


@slow
def test_unequal_runs_would_be_said_to_show_nothing_and_give_status_1(demonstration, monkeypatch, tmp_path, capsys):
    outcome = replace(demonstration[0], same_path=False)
    monkeypatch.setattr(brain, "train", lambda steps: outcome)
    monkeypatch.setattr(sys, "argv", ["brain.py", "-o", str(tmp_path / "picture.png")])
    assert brain.main() == 1
    assert "NOT equal" in capsys.readouterr().out


@slow
def test_the_picture_is_written(demonstration):
    *_, file = demonstration
    assert file.read_bytes().startswith(PNG)


def test_it_is_a_program_that_tells_its_options():
    run = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert "--steps" in run.stdout


def test_unequal_runs_would_be_noticed():
    net, twin = brain._network(brain.CheckpointUNet, (4, 8)), brain._network(brain.UNet, (4, 8))
    assert brain._same_path(net, twin)
    parameter = next(net.parameters())
    with torch.no_grad():
        parameter[0, 0, 0, 0, 0] += 1e-15
    assert not brain._same_path(net, twin)


def test_the_patches_hold_brain_and_are_the_same_every_time():
    (scan, mask), (again, _) = (next(brain._patches(32)) for _ in range(2))
    assert scan.shape == mask.shape == (2, 1, 32, 32, 32)
    assert torch.equal(scan, again)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert scan[mask == 1].mean() > 2 * scan[mask == 0].mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps is 0, but must be at least 1: the first one calibrates\n"),
        (["-o", "nowhere/picture.png"], "cannot be written to 'nowhere/picture.png': there is no such folder\n"),
    ],
)
def test_what_cannot_be_done_is_refused_before_training(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["brain.py", *arguments])
    with pytest.raises(SystemExit) as end:
        brain.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith(message)


def test_ctrl_c_is_one_line_and_status_130(capsys, monkeypatch):
    def interrupted(steps):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["brain.py"])
    monkeypatch.setattr(brain, "train", interrupted)
    assert brain.main() == 130
    assert capsys.readouterr() == ("", "brain.py: interrupted\n")
