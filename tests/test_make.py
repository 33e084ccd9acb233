"""Each make target that a document names exists, and is run by continuous integration or by a test."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"`make ([a-z-]+)|^make ([a-z-]+) +#", re.MULTILINE)

# What continuous integration does not run, and why; what of it the tests run.
ELSEWHERE = {
    "demo": "tests/test_demo.py runs examples/brain.py, on the same data",
    "documents": "it writes what is committed; each page's test makes it anew and compares",
    "study": "an hour: `make study-small` runs all of it in small",
    "benchmarks": "it measures time, which wants a machine with nothing else to do",
    "mutants": "hours: it lists what no test notices",
    "zoo": "gigabytes: tests/test_zoo.py measures a small model, and compares page and data",
    "compat": "gigabytes: tests/test_versions.py runs it on tests of its own, and compares page and data",
}


def named(pages=PAGES):
    """Give the make targets that documents name."""
    found = [match for page in pages for match in COMMAND.finditer(page.read_text(encoding="utf-8"))]
    return sorted({match[1] or match[2] for match in found})


def planned(target):
    """Give what make would run."""
    return subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_readme_names_targets():
    assert {"demo", "test", "lint", "paper"} <= set(named([ROOT / "README.md"]))


@pytest.mark.parametrize("target", named())
def test_a_target_that_a_document_names_runs_in_continuous_integration_or_is_said_to_run_elsewhere(target):
    assert (f"make {target}" in CI.splitlines()) != (target in ELSEWHERE)


@pytest.mark.parametrize("target", sorted({*named(), *ELSEWHERE}))
def test_make_knows_the_target_and_the_programs_that_it_runs_are_there(target):
    done = planned(target)
    assert done.returncode == 0, done.stderr
    programs = re.findall(r"[\w/]+\.py\b", done.stdout)
    assert [program for program in programs if not (ROOT / program).exists()] == []


def test_a_target_that_is_not_there_is_found():
    assert planned("fly").returncode != 0


def test_make_alone_lists_every_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)", makefile, re.MULTILINE)[1].split()
    listed = re.findall(
        r"^make ([a-z-]+)", subprocess.run("make", cwd=ROOT, capture_output=True, text=True).stdout, re.M
    )
    assert set(listed) == set(targets) - {"help"}
