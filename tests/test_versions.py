"""The versions that the project names are those that its tests have passed with, and the page is made of the data."""

import copy
import json
import re
import subprocess
import sys

import versions

RUNS = versions.load()
CLAIMED = versions.PROJECT


def floor(requirement):
    """Give the oldest version that a requirement allows, as far as it says."""
    return versions.number(re.search(r">=([\d.]+)", requirement)[1])


def test_the_page_is_made_of_the_data():
    assert versions.DOCUMENT.read_text(encoding="utf-8") == versions.page(RUNS)


def test_the_oldest_torch_that_is_claimed_is_the_oldest_that_passes_and_the_one_that_make_compat_runs():
    (claimed,) = [floor(line) for line in CLAIMED["dependencies"] if line.startswith("torch")]
    oldest = versions.tested(RUNS, "torch")[0]
    assert versions.number(oldest)[: len(claimed)] == claimed
    assert f"\nTORCH ?= {oldest}\n" in (versions.ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_newest_torch_passes_and_is_the_one_of_the_zoo():
    newest = versions.tested(RUNS, "torch")[-1]
    assert f"\nNEWEST ?= {newest}\n" in (versions.ROOT / "Makefile").read_text(encoding="utf-8")
    assert newest in {run["torch"] for run in RUNS if run["suite"] == "recipes"}


def test_the_pythons_that_are_claimed_are_those_that_pass():
    tested = versions.tested(RUNS, "python")
    prefix = "Programming Language :: Python :: 3."
    assert [f"3.{line.removeprefix(prefix)}" for line in CLAIMED["classifiers"] if line.startswith(prefix)] == tested
    assert floor(CLAIMED["requires-python"]) == versions.number(tested[0])


def test_no_failure_is_left_unexplained():
    assert [versions.unexplained(run) for run in RUNS] == [[]] * len(RUNS)


def test_a_version_that_fails_is_not_among_those_that_pass_and_its_failure_is_on_the_page():
    runs = copy.deepcopy([run for run in RUNS if run["suite"] == "core"])
    for run in runs:
        if run["torch"] == versions.tested(RUNS, "torch")[0]:
            run["failing"] = ["tests/test_formula.py::test_that_fails"]
    assert versions.tested(runs, "torch") == versions.tested(RUNS, "torch")[1:]
    assert "`tests/test_formula.py::test_that_fails` fails. Not explained yet." in versions.page(runs)


def test_a_run_takes_the_place_of_the_older_one_with_the_same_versions_and_the_newest_comes_last():
    def run(torch, passed):
        return {"suite": "core", "torch": torch, "python": "3.11", "passed": passed}

    runs = []
    for new in (run("2.10.0", 1), run("2.9.1", 2), run("2.10.0", 3)):
        runs = versions.noted(runs, new)
    assert [(run["torch"], run["passed"]) for run in runs] == [("2.9.1", 2), ("2.10.0", 3)]


def test_the_core_is_what_needs_no_other_library():
    core = versions.core()
    assert {"momentum_fix", "tests/test_once.py", "tests/test_plots.py", "tests/test_smt.py"} <= set(core)
    assert not {"tests/test_trainers.py", "tests/test_study.py", "tests/test_versions.py"} & set(core)
    assert "lightning" in versions.imports(versions.TESTS / "test_trainers.py")
    assert "torch" in versions.imports(versions.TESTS / "twins.py") & versions.imports(versions.TESTS / "test_once.py")


SOME_TESTS = """
import pytest

@pytest.fixture
def broken():
    yield
    raise ValueError

def test_good(): pass
def test_bad(broken): assert False
def test_broken_afterwards(broken): pass
@pytest.mark.skip
def test_skipped(): pass
"""


def test_what_comes_of_tests_is_counted_and_each_is_counted_once(tmp_path):
    (tmp_path / "test_some.py").write_text(SOME_TESTS)
    (tmp_path / "test_unreadable.py").write_text("import nothing_of_this_name")
    (tmp_path / "test_elsewhere.py").write_text("import pytest\npytest.skip('all of it', allow_module_level=True)")
    options = f"['--continue-on-collection-errors', '--rootdir={tmp_path}', '{tmp_path}']"
    code = f"import json, versions as v; v.SUITES['core'] = lambda: {options}; print('\\n' + json.dumps(v.run('core')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=versions.TESTS, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert [found[outcome] for outcome in ("passed", "failed", "skipped")] == [1, 3, 2]
    assert {name.rpartition(":")[2] for name in found["failing"]} == {
        "test_bad",
        "test_broken_afterwards",
        "test_unreadable.py",
    }
