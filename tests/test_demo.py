"""The demonstration: MONAI's network on the brain that nilearn carries, and what it shows."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from momentum_fix import corrected_momentum, demo
from momentum_fix.__main__ import main

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def outcome():
    return demo.train(steps=3, size=16, channels=(4, 8, 8, 8, 8))


def test_the_layers_are_found_with_2_3_4_and_5_passes_by_depth(outcome):
    assert [row.passes for row in outcome.rows] == [2, 3, 4, 5, 5, 4, 3, 2]
    assert [row.corrected for row in outcome.rows] == [corrected_momentum(0.1, row.passes) for row in outcome.rows]


def test_calibrated_deviations_are_rounding_and_uncorrected_ones_are_not(outcome):
    assert outcome.same_path
    assert max(outcome.calibrated) < 1e-13
    assert min(outcome.uncorrected) > 1e-2
    assert outcome.output_calibrated < 1e-12 < 1e-3 < outcome.output_uncorrected


def test_unequal_runs_would_be_noticed():
    net, twin = demo._network(demo.CheckpointUNet, (4, 8)), demo._network(demo.UNet, (4, 8))
    assert demo._same_path(net, twin)
    parameter = next(net.parameters())
    with torch.no_grad():
        parameter[0, 0, 0, 0, 0] += 1e-15
    assert not demo._same_path(net, twin)


def test_the_patches_hold_brain_and_are_the_same_every_time():
    (scan, brain), (again, _) = (next(demo._patches(32)) for _ in range(2))
    assert scan.shape == brain.shape == (2, 1, 32, 32, 32)
    assert torch.equal(scan, again)
    assert set(brain.unique().tolist()) == {0.0, 1.0}
    assert scan[brain == 1].mean() > 2 * scan[brain == 0].mean()


def test_the_table_has_a_row_a_layer_and_the_conclusion_says_what_is_equal(outcome):
    header, *rows = demo.table(outcome)
    assert len(header) == len(rows[0]) == 6
    assert [int(row[0]) for row in rows] == [2, 3, 4, 5, 5, 4, 3, 2]
    assert [float(row[4]) for row in rows] == pytest.approx(outcome.calibrated, rel=0.1)
    assert "bit-for-bit equal" in demo.conclusion(outcome)
    assert "NOT equal" in demo.conclusion(replace(outcome, same_path=False))
    assert "3 steps" in demo.heading(outcome)


def test_the_picture_is_written_also_where_a_deviation_is_zero(outcome, tmp_path):
    demo.picture(outcome, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(PNG)


def test_fewer_than_one_step_is_refused(capsys):
    assert main(["demo", "--steps", "0"]) == 2
    assert (
        capsys.readouterr().err == "momentum-fix demo: steps is 0, but must be at least 1: the first one calibrates\n"
    )


def test_a_picture_that_cannot_be_written_is_refused_before_training(capsys, tmp_path):
    assert main(["demo", "-o", str(tmp_path / "nowhere" / "picture.png")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demonstration_runs_as_the_readme_says(tmp_path):
    command = [sys.executable, "-m", "momentum_fix", "demo", "-o", "picture.png"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    rows = re.findall(r"^(\d)  +0\.1 +(\S+) +(\S+) +(\S+) +model\.\S+$", run.stdout, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [2, 3, 4, 5, 5, 4, 3, 2]
    for k, corrected, uncorrected_off, calibrated_off in rows:
        assert float(corrected) == pytest.approx(corrected_momentum(0.1, int(k)), rel=1e-5)
        assert float(uncorrected_off) > 1e-2
        assert float(calibrated_off) < 1e-13
    assert "bit-for-bit equal" in run.stdout
    assert re.search(r"training three networks.*100%", run.stderr)
    assert (tmp_path / "picture.png").read_bytes().startswith(PNG)
