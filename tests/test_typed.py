"""The script that the type checkers read is one that runs, and it writes only where it is run."""

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parent / "typed" / "user.py"


def test_a_users_script_runs_and_leaves_its_picture_in_the_folder_that_it_is_run_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(SCRIPT))
    assert [each.name for each in tmp_path.iterdir()] == ["decay.svg"]
