"""The notebook runs, and says and shows again what is stored in it."""

import re
import subprocess
from itertools import groupby
from pathlib import Path

import nbformat
import pypandoc
import pytest
import sympy as sp
from nbclient import NotebookClient

from momentum_fix import symbolic

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
    """Every output as (kind, text): all that a cell prints as one, and all forms of what it displays."""
    for cell in notebook.cells:
        for stream, group in groupby(cell.get("outputs", []), key=lambda output: output.get("name")):
            if stream:  # it arrives in as many pieces as the machine is slow
                yield stream, "".join(output.text for output in group)
            else:
                for output in group:
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
    assert kinds.count("image/svg+xml") == 4
    assert not {"stderr", "error", "image/png"} & set(kinds)
    shown = [text for kind, text in outputs(stored) if kind == "text/markdown"]
    numbered = enumerate(symbolic.theorems(), start=1)
    assert shown == [f"**Theorem {n} ({theorem.name}).** {theorem.statement}" for n, theorem in numbered]


def test_the_formulas_it_shows_are_claims_of_the_theorems_and_few(stored):
    formulas = [text for kind, text in outputs(stored) if kind == "text/latex"]
    claims = [[sp.latex(claim) for claim in theorem.claims] for theorem in symbolic.theorems()]
    assert len(formulas) == len(claims)
    counts = [sum(claim in shown for claim in of_one) for shown, of_one in zip(formulas, claims, strict=True)]
    assert min(counts) >= 1
    assert sum(counts) <= 25


def test_its_first_example_shows_the_harm_and_that_training_does_not(stored):
    printed = next(text for kind, text in outputs(stored) if kind == "stdout")
    errors = [float(error) for error in re.findall(r"error of the running mean (\S+),", printed)]
    assert printed.count("same gradient: True") == len(errors) == 3
    for error, passes in zip(errors, (1, 2, 5), strict=True):
        assert error / errors[0] == pytest.approx(symbolic.noise_ratio(0.9, passes) ** 0.5, rel=0.05)


def test_every_formula_can_be_set(stored):
    formulas = [theorem._repr_latex_() for theorem in symbolic.theorems()]
    formulas += [cell.source for cell in stored.cells if cell.cell_type == "markdown"]
    for text in [*formulas, r"$$\begin{gathered} \frac{1} \end{gathered}$$"]:
        command = [pypandoc.get_pandoc_path(), "--from=markdown", "--mathml", "--fail-if-warnings"]
        done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
        assert (done.returncode == 0) == (text in formulas), text


def test_it_was_run_once_from_top_to_bottom_and_stays_small(stored):
    counts = [cell.execution_count for cell in stored.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert NOTEBOOK.stat().st_size < 500_000


def test_it_is_readable_in_ten_minutes(stored):
    prose = " ".join(cell.source for cell in stored.cells if cell.cell_type == "markdown")
    shown = " ".join(text for kind, text in outputs(stored) if kind == "text/markdown")
    assert len((prose + shown).split()) < 1000  # and as much time for the formulas and curves as for the words


def test_it_redefines_no_mathematics(stored):
    code = "\n".join(cell.source for cell in stored.cells if cell.cell_type == "code")
    functions = re.findall(r"^ *def (\w+)", code, flags=re.MULTILINE)
    assert functions == ["train", "run", "show"]
    assert "class " not in code
    assert code.count("(1 - ") == 1  # the textbook expression, to show how it fails
