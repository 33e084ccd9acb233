"""The notebook runs, and says and shows again what is stored in it."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "derivation.ipynb"
NUMBER = re.compile(r"[-+]?\d+\.\d+(?:e[-+]?\d+)?")  # with a decimal point: names and counts stay text


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def fresh():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    return NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()


def outputs(notebook):
    """Every output as (kind, text): streams and all forms of the displayed ones."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                yield output.name, output.text
            else:
                yield from sorted(output.get("data", {"error": "".join(output.get("traceback", []))}).items())


def words_and_numbers(kind, text):
    """The text with its numbers taken out, and the numbers; a drawing without date and random ids."""
    if kind == "image/svg+xml":
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r'(id="|#)([mp])[0-9a-f]{10}', r"\1\2", text)
    return NUMBER.sub("#", text), [float(number) for number in NUMBER.findall(text)]


def test_fresh_text_and_drawn_curves_are_the_stored_ones(fresh, stored):
    pairs = list(zip(outputs(fresh), outputs(stored), strict=True))
    assert len(pairs) > 20
    for (kind, text), (stored_kind, stored_text) in pairs:
        assert kind == stored_kind
        words, numbers = words_and_numbers(kind, text)
        stored_words, stored_numbers = words_and_numbers(kind, stored_text)
        assert words == stored_words
        assert numbers == pytest.approx(stored_numbers, rel=1e-6, abs=1e-6)


def test_the_comparison_sees_a_changed_number_a_changed_word_and_a_moved_curve():
    drawing = '<path d="M 1.5 2.5" id="m0123456789"/><use xlink:href="#m0123456789"/>'
    same = drawing.replace("0123456789", "fedcba9876")
    assert words_and_numbers("image/svg+xml", drawing) == words_and_numbers("image/svg+xml", same)
    assert words_and_numbers("image/svg+xml", drawing) != words_and_numbers("image/svg+xml", same.replace("2.5", "2.6"))
    assert words_and_numbers("stdout", "True 1.0") != words_and_numbers("stdout", "False 1.0")


def test_it_shows_every_theorem_every_curve_and_no_error(stored):
    kinds = [kind for kind, _ in outputs(stored)]
    assert kinds.count("text/markdown") == 10
    assert kinds.count("image/svg+xml") == 5
    assert not {"stderr", "error", "image/png"} & set(kinds)
    assert sum(text.count("steps hold") for kind, text in outputs(stored) if kind == "text/markdown") == 10


def test_it_was_run_once_from_top_to_bottom_and_stays_small(stored):
    counts = [cell.execution_count for cell in stored.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert NOTEBOOK.stat().st_size < 500_000


def test_it_is_readable_in_ten_minutes(stored):
    prose = " ".join(cell.source for cell in stored.cells if cell.cell_type == "markdown")
    shown = " ".join(re.sub(r"\$\$.*?\$\$", "", text) for kind, text in outputs(stored) if kind == "text/markdown")
    assert len((prose + shown).split()) < 2000  # 200 words a minute


def test_it_redefines_no_mathematics(stored):
    code = "\n".join(cell.source for cell in stored.cells if cell.cell_type == "code")
    functions = re.findall(r"^ *def (\w+)", code, flags=re.MULTILINE)
    assert functions == ["train", "show", "by_name"]
    assert "class " not in code
    assert code.count("(1 - ") == 1  # the textbook expression, to show how it fails
