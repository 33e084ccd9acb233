"""Wheel and sdist: what they hold, and that the wheel alone is enough for what needs no library."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import momentum_fix

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\(([^)#:\s]+)\)")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build the sdist, and the wheel from it; give the folder that they are in."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def packed(built):
    """Give the names in the sdist, from its own folder on."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Install the wheel alone, without what it depends on; give the folder of its commands."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", next(built.glob("*.whl"))], check=True)
    return folder / "bin"


def run(*command):
    """Run a command where nothing leads to this clone."""
    elsewhere = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env=elsewhere)


def missing(packed, page):
    """Give what a page links to that is not packed."""
    links = {(page.parent / link).resolve() for link in LINK.findall(page.read_text(encoding="utf-8"))}
    return sorted(str(link) for link in links if str(link.relative_to(ROOT)) not in packed)


def test_the_sdist_holds_what_the_documents_link_to_and_all_that_the_tests_need(packed):
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    assert sum(len(LINK.findall(page.read_text(encoding="utf-8"))) for page in pages) > 20
    assert [missing(packed, page) for page in pages] == [[]] * len(pages)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    assert set(tracked) <= packed


def test_a_link_to_what_is_not_packed_is_found(packed):
    assert missing(packed - {"docs/study.md"}, ROOT / "README.md") == [str(ROOT / "docs" / "study.md")]


def test_the_sdist_holds_nothing_that_is_made_here(packed):
    made = (".venv", ".compat", "build", "dist", "__pycache__", ".git/")
    assert [name for name in packed if any(part in name.split("/") for part in made)] == []


def test_the_wheel_holds_the_package_its_types_and_its_license_and_nothing_else(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    files = (file for file in (ROOT / "momentum_fix").rglob("*") if file.is_file() and file.suffix != ".pyc")
    ours = {str(file.relative_to(ROOT)) for file in files}
    about = f"momentum_fix-{momentum_fix.__version__}.dist-info/"
    said = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    assert names == ours | {about + name for name in said}
    assert {"momentum_fix/py.typed", "momentum_fix/files/reading.py", "momentum_fix/symbolic/proof.py"} <= ours


def test_the_wheel_alone_gives_the_number(installed):
    code = "from momentum_fix import corrected_momentum as m; print(m(0.1, passes=2))"
    done = run(installed / "python", "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0.051316701949486204\n", "")


def test_the_wheel_alone_has_no_torch_and_says_what_is_missing(installed):
    done = run(installed / "python", "-c", "from momentum_fix import calibrate")
    assert "No module named 'torch'" in done.stderr
    done = run(installed / "momentum-fix", "value", "0.1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: needs click: ")


def test_the_installed_package_is_that_of_this_clone_and_not_found_by_chance(installed):
    code = "import momentum_fix; print(momentum_fix.__file__, momentum_fix.__version__)"
    file, version = run(installed / "python", "-c", code).stdout.split()
    assert Path(file).is_relative_to(installed.parent)
    assert version == momentum_fix.__version__
