"""Which versions of torch and Python the tests pass with: docs/versions.md, made of tests/versions.json.

`make compat TORCH=2.9.1` runs the core's tests in an environment of its own and notes what came of it, and of which
commit; `make zoo` does the same with the recipes for libraries that want the newest torch; `python tests/versions.py`
writes the page anew.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pages import wrapped

TESTS = Path(__file__).parent
ROOT = TESTS.parent
DATA = TESTS / "versions.json"
DOCUMENT = ROOT / "docs" / "versions.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]  # those that torch has packages for
Run = dict[str, Any]

# Failures that are not this package's: what the test is called, and what is known about it.
_COMPILED = (
    "tests/test_everywhere.py::test_in_a_model_compiled_with_its_checkpoint_nothing_is_preserved_and_a_warning_says_so"
)
EXPLAINED: dict[str, str] = {
    f"{_COMPILED}[{kind}]": (
        "torch warns of Python 3.13.0 itself (3.13.1 has faster guards), and warnings are errors in this test."
    )
    for kind in ("BatchNorm", "running normalizer")
}
OF_THE_CLONE = {"test_make.py", "test_package.py", "test_site.py", "test_versions.py"}  # the same with every torch


# The suites.


IMPORTED_AS = {"z3-solver": "z3"}


def libraries(extra: str) -> set[str]:
    """Give what the package and one of its extras need, by the names to import."""
    found = set()
    for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"][extra]:
        name, extras = re.match(r"([\w-]+)(?:\[(.*)\])?", line).groups()
        own = {IMPORTED_AS.get(name, name)}
        found |= {wanted for extra in extras.split(",") for wanted in libraries(extra)} if extras else own
    return found


def imports(file: Path) -> set[str]:
    """Give what a test module imports at its head, by itself or by another module of the tests."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    ours = {name for name in found if (TESTS / f"{name}.py").exists()}
    return found - ours | {name for other in ours for name in imports(TESTS / f"{other}.py")}


def core() -> list[str]:
    """Give the package, for its doctests, and the test modules that need no library beyond the extra `core`."""
    enough = libraries("core") | sys.stdlib_module_names | {"momentum_fix"}
    files = [
        file for file in sorted(TESTS.glob("test_*.py")) if file.name not in OF_THE_CLONE and imports(file) <= enough
    ]
    return ["momentum_fix", *(f"tests/{file.name}" for file in files)]


def recipes() -> list[str]:
    """Give the tests of what docs/configs.md and docs/calibrate.md say about other libraries."""
    return ["tests/test_configs.py", "tests/test_clients.py", "tests/test_trainers.py"]


SUITES = {"core": core, "recipes": recipes}


# Running one here.


class Outcomes:
    """A plugin of pytest that notes what comes of each test: passed, skipped or failed."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self.of[report.nodeid] = report.outcome

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.of[report.nodeid] = "failed"
        elif report.skipped or report.when == "call":
            self.of.setdefault(report.nodeid, report.outcome)


def run(suite: str) -> Run:
    """Run a suite with the Python and the torch that are here; give what came of it."""
    import torch

    outcomes = Outcomes()
    pytest.main(["--quiet", *SUITES[suite]()], plugins=[outcomes])
    counts = Counter(outcomes.of.values())
    log = ["git", "log", "-1", "--format=%cI %h"]
    return {
        "suite": suite,
        "tests": subprocess.run(log, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip(),
        "torch": torch.__version__.partition("+")[0],
        "python": "{}.{}".format(*sys.version_info),
        **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
        "failing": [name for name, outcome in outcomes.of.items() if outcome == "failed"],
    }


# The data and the page.


def load(file: Path = DATA) -> list[Run]:
    return json.loads(file.read_text(encoding="utf-8"))


def number(version: str) -> tuple[int, ...]:
    """Give a version as something that can be compared."""
    return tuple(map(int, version.split(".")))


def key(run: Run) -> tuple[Any, ...]:
    return run["suite"], number(run["torch"]), number(run["python"])


def noted(runs: list[Run], new: Run) -> list[Run]:
    """Put a run among the others, instead of an older one with the same versions."""
    return sorted([*(run for run in runs if key(run) != key(new)), new], key=key)


def tested(runs: list[Run], what: str) -> list[str]:
    """Give the versions of torch or Python with which all of the core's tests pass, the oldest first."""
    return sorted({run[what] for run in runs if run["suite"] == "core" and not unexplained(run)}, key=number)


def unexplained(run: Run) -> list[str]:
    return [name for name in run["failing"] if name not in EXPLAINED]


def listed(words: Sequence[str]) -> str:
    *first, last = words or ["none"]
    return f"{', '.join(first)} and {last}" if first else last


def table(runs: list[Run]) -> list[str]:
    return [
        "| torch | Python | passed | failed | skipped | tests of |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {r['torch']} | {r['python']} | {r['passed']} | {r['failed']} | {r['skipped']} | {r['tests'][:10]} |"
            for r in runs
        ),
    ]


def failures(runs: list[Run]) -> str:
    """Name the tests that failed, with what is known about them."""
    return "\n".join(
        f"- torch {run['torch']}, Python {run['python']}: `{name}` fails. {EXPLAINED.get(name, 'Not explained yet.')}"
        for run in runs
        for name in run["failing"]
    )


def page(runs: list[Run]) -> str:
    """Write docs/versions.md."""
    suites = {name: [run for run in runs if run["suite"] == name] for name in SUITES}
    untried = [f"Python {version}" for version in PYTHONS if version not in tested(runs, "python")]
    but = ", but for those named below," * any(run["failing"] for run in suites["core"])
    parts = [
        "# Versions",
        f"""The core's tests pass{but} with torch {listed(tested(runs, "torch"))}, and with Python
        {listed(tested(runs, "python"))}. All ran on Linux, on a CPU. Not tried:
        {listed(["other systems", *untried, "torch versions between these"])}. Older torch is known to fail
        ([limits](limits.md)).""",
        f"""The core's tests are those that need no library but {listed(sorted(libraries("core")))}, and the examples in
        the docstrings. `make compat TORCH=2.9.1` runs them with that torch in an environment of its own
        (`PYTHON=python3.12` for another Python) and records the result in [the data](../tests/versions.json) behind
        this page. Tests that need a GPU, or a library that the core does without, are skipped. The last
        column says of which day the tests were.""",
        "\n".join(table(suites["core"])),
        failures(suites["core"]),
        "## The recipes for other libraries",
        """`make test` runs the recipes of [configs](configs.md), [calibrate](calibrate.md) and [trainers](trainers.md)
        beside the pinned torch, where torchvision, timm and segmentation-models-pytorch do not load and have stand-ins.
        `make zoo` runs them with these libraries themselves. detectron2 is skipped: it is in no package index.""",
        "\n".join(table(suites["recipes"])),
        failures(suites["recipes"]),
    ]
    return "\n\n".join(part if part.startswith(("#", "|", "-")) else wrapped(part) for part in parts if part) + "\n"


if __name__ == "__main__":
    new = [run(suite) for suite in sys.argv[1:]]
    runs = functools.reduce(noted, new, load())
    DATA.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    DOCUMENT.write_text(page(runs), encoding="utf-8")
    sys.exit(any(unexplained(run) for run in new))
