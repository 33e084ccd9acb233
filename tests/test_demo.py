"""The demonstration: MONAI's network on the brain that nilearn carries, and what it shows."""

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


@pytest.fixture(scope="module")
def outcome():
    return brain.train(steps=3, size=16, channels=(4, 8, 8, 8, 8))


def test_the_layers_are_found_with_2_3_4_and_5_passes_by_depth(outcome):
    assert list(outcome.passes) == [2, 3, 4, 5, 5, 4, 3, 2]
    assert len(outcome.layers) == len(outcome.calibrated) == len(outcome.uncorrected) == 8


def test_calibrated_deviations_are_rounding_and_uncorrected_ones_are_not(outcome):
    assert outcome.same_path
    assert max(outcome.calibrated) < 1e-13
    assert min(outcome.uncorrected) > 1e-2
    assert outcome.output_calibrated < 1e-12 < 1e-3 < outcome.output_uncorrected


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


def test_the_table_has_a_row_a_layer_and_the_conclusion_says_what_is_equal(outcome):
    header, *rows = brain.table(outcome)
    assert len(header) == len(rows[0]) == 6
    assert [int(row[1]) for row in rows] == [2, 3, 4, 5, 5, 4, 3, 2]
    assert [float(row[5]) for row in rows] == pytest.approx(outcome.calibrated, rel=0.1)
    assert "bit-for-bit equal" in brain.conclusion(outcome)
    assert "NOT equal" in brain.conclusion(replace(outcome, same_path=False))
    assert "3 steps" in brain.heading(outcome)


def test_the_picture_is_written_also_where_a_deviation_is_zero(outcome, tmp_path):
    brain.picture(outcome, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(PNG)


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


@pytest.mark.slow
def test_the_demonstration_runs_as_the_readme_says(tmp_path):
    command = [sys.executable, SCRIPT, "-o", "picture.png"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    rows = re.findall(r"^model\.\S+  +(\d) +0\.1 +(\S+) +(\S+) +(\S+)$", run.stdout, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [2, 3, 4, 5, 5, 4, 3, 2]
    for k, corrected, uncorrected_off, calibrated_off in rows:
        assert float(corrected) == pytest.approx(corrected_momentum(0.1, int(k)), rel=1e-5)
        assert float(uncorrected_off) > 1e-2
        assert float(calibrated_off) < 1e-13
    assert "bit-for-bit equal" in run.stdout
    assert re.search(r"training three networks.*100%", run.stderr)
    assert (tmp_path / "picture.png").read_bytes().startswith(PNG)
