"""The notebook runs, and says and shows again what is stored in it."""

import json
import re
import subprocess
from itertools import groupby
from pathlib import Path

import nbformat
import pypandoc
import pytest
import sympy as sp
from nbclient import NotebookClient

from momentum_fix import corrected_momentum, effective_momentum, symbolic

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
    assert sum(counts) <= 26
    for shown in formulas:
        lines = shown.split(r"\\[1ex]")
        assert sum(line.count(r"\text{") - line.count(r"\quad\text{for}") for line in lines) in (0, len(lines))
    order = formulas[5].split(r"\\[1ex]")
    assert [re.search(r"\\text\{(.*): \}", line)[1] for line in order] == [
        "A in A B B A",
        "A in A B A B",
        "farther from the end by n",
    ]


def printed_of(notebook, words):
    """What the first cell prints that prints these words."""
    return next(text for kind, text in outputs(notebook) if kind == "stdout" and words in text)


def test_its_first_screen_goes_from_two_updates_to_the_square_root(stored):
    first, second = stored.cells[:2]
    lines = re.findall(r"^\d\. (.*)$", first.source, flags=re.MULTILINE)
    assert len(lines) == 5
    assert lines[-1].endswith(r"$m' = 1 - \sqrt{1 - m}$.")
    assert "theorem" not in first.source.lower()
    kept = [float(number) for number in re.findall(r"keeps (\S+) of", "".join(second.outputs[0].text))]
    assert kept == pytest.approx([0.9, 0.81, 0.9, (1 - 0.1**0.5) ** 2], abs=5e-5)


def test_the_sliders_know_the_numbers_of_the_library_and_what_to_say_without_them(stored):
    page = next(text for kind, text in outputs(stored) if kind == "text/html")
    grid = json.loads(re.search(r"data-grid='(.*?)'", page)[1])
    for k, column in grid.items():
        for m, values in enumerate(column, start=1):
            right = corrected_momentum(m / 100, int(k)), effective_momentum(m / 100, int(k))
            assert list(map(float, values)) == pytest.approx(right, abs=5.1e-5)
    assert (list(grid), {len(column) for column in grid.values()}) == (list("12345678"), {50})
    assert "<output>m = 0.1, k = 2: uncorrected, it acts as 0.1900; give the layer 0.0513</output>" in page
    assert "<script" not in page
    assert "http" not in page


def test_an_uncorrected_network_evaluates_worse_in_one_phase_and_better_in_the_other(stored):
    printed = printed_of(stored, "evaluation loss")
    plain, uncorrected, corrected = (
        [float(loss) for loss in re.findall(r"(\d\.\d+) after", line)] for line in printed.splitlines()
    )
    assert corrected == plain
    assert uncorrected[0] < plain[0] - 0.01
    assert uncorrected[1] > plain[1] + 0.01


def test_update_once_is_exact_where_the_corrected_momentum_is_not(stored):
    printed = printed_of(stored, "update_once")
    assert float(re.search(r"off by up to (\S+)", printed)[1]) > 0.001
    assert "update_once: equal to the last bit: True" in printed


def test_what_is_equal_is_compared_without_an_absolute_tolerance(stored):
    code = "\n".join(cell.source for cell in stored.cells if cell.cell_type == "code")
    assert code.count("allclose(") == code.count("atol=0)") == 1


def test_its_links_lead_to_files(stored):
    prose = "\n".join(cell.source for cell in stored.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\((.*?)\)", prose)
    assert {"../docs/study.md", "../paper.md"} == set(links)
    assert all((NOTEBOOK.parent / link).is_file() for link in links)


def test_every_picture_has_a_text_for_those_who_cannot_see_it(stored):
    for cell in stored.cells:
        if any("image/svg+xml" in output.get("data", {}) for output in cell.get("outputs", [])):
            assert len(cell.metadata["mystnb"]["image"]["alt"]) > 80


def test_its_first_example_shows_the_harm_and_that_training_does_not(stored):
    printed = printed_of(stored, "error of the running mean")
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


def test_it_is_readable_in_a_quarter_of_an_hour(stored):
    prose = " ".join(cell.source for cell in stored.cells if cell.cell_type == "markdown")
    shown = " ".join(text for kind, text in outputs(stored) if kind == "text/markdown")
    assert len((prose + shown).split()) < 1300  # and as much time for the formulas and curves as for the words


def test_it_redefines_no_mathematics(stored):
    code = "\n".join(cell.source for cell in stored.cells if cell.cell_type == "code")
    functions = re.findall(r"^ *def (\w+)", code, flags=re.MULTILINE)
    assert functions == ["nested", "train", "show", "sample", "evaluated", "siamese"]
    assert "class " not in code
    assert code.count("(1 - ") == 2  # the textbook expression: at the beginning, and to show how it fails
