"""Every example in a document runs and prints what the document says."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

import momentum_fix

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {
    "configs.md": "hydra",
    "preserving.md": "snntorch",
    "remat.md": "torch_remat",
    "trainers.md": "accelerate",
}  # what the core's tests do without
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:^```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_examples_run_and_print_what_the_document_says(document):
    if document.name in NEEDS:
        pytest.importorskip(NEEDS[document.name], reason="the page is about libraries that are not in the core")
    torch.set_default_dtype(torch.float32)
    names = {}
    for code, expected in BLOCK.findall(document.read_text(encoding="utf-8")):
        if document.name == "README.md":  # its blocks run alone; those of another page, one after the other
            names = {}
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, document.name, "exec"), names)
        assert printed.getvalue() == expected


def test_the_readme_has_an_example_that_prints_and_none_that_no_test_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = BLOCK.findall(readme)
    assert any(expected for _, expected in blocks)
    assert len(blocks) == readme.count("```py")


def test_the_bibtex_entry_says_what_the_citation_file_and_the_license_say():
    (entry,) = re.findall(r"^```bibtex\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.DOTALL)
    found = {name: re.sub(r"[{}\\]", "", value) for name, value in re.findall(r"(\w+) += (\{.*\}),?$", entry, re.M)}
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f'title: "{found["title"]}"' in citation
    assert f'name: "{found["author"]}"' in citation
    assert f"version: {found['version']}\nlicense: {found['license']}\n" in citation
    assert f"(c) {found['year']} {found['author']}" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_the_versions_agree():
    assert f"version: {momentum_fix.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {momentum_fix.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
