"""The paper: every number is computed, every figure is drawn, every citation resolves, and the page builds."""

import re
import subprocess

import pytest
import sympy as sp

import paper
from momentum_fix import corrected_momentum, symbolic

TEXT = paper.TEXT.read_text(encoding="utf-8")
BIBLIOGRAPHY = (paper.ROOT / "paper.bib").read_text(encoding="utf-8")
NUMBER = re.compile(r"\d[\d.,]*(?:e-?\d+)?%?")


@pytest.fixture(scope="module")
def values():
    return paper.numbers()


def prose(text):
    """The text without front matter, named numbers, formulas, code, links, citations and the places of figures."""
    text = text.split("---\n", 2)[2]
    text = paper.NAMED.sub("", text)
    text = re.sub(
        r"<!-- study -->.*?<!-- /study -->", "", text, flags=re.DOTALL
    )  # test_study.py compares it with the data
    for left_out in (r"\$\$.*?\$\$", r"\$.*?\$", r"`.*?`", r"\]\([^)]*\)(\{.*?\})?", r"\[-?@.*?\]"):
        text = re.sub(left_out, "", text, flags=re.DOTALL)
    return text


def test_every_named_number_is_what_is_computed(values):
    assert len(paper.NAMED.findall(TEXT)) > 40
    for printed, name in paper.NAMED.findall(TEXT):
        assert (name, printed) == (name, values[name])
    assert paper.fill(TEXT, values) == TEXT


def test_no_number_stands_in_the_text_without_a_name():
    years = {"2017", "2018", "2019", "2021", "2023", "2024"}  # of what is cited
    assert {number.rstrip(".,") for number in NUMBER.findall(prose(TEXT))} <= years
    formulas = " ".join(re.findall(r"\$.*?\$", TEXT, flags=re.DOTALL))
    assert set(re.findall(r"\d+\.\d+", formulas)) == {"0.1"}  # PyTorch's default momentum


def test_the_search_for_bare_numbers_finds_one():
    assert NUMBER.findall(prose("---\n---\nabout 1.99<!-- noise --> or 7.5 and $2$, [@a2015], `3`, 4%")) == [
        "7.5",
        "4%",
    ]


def test_filling_puts_a_number_before_its_name():
    assert paper.fill("(0.5<!-- a -->, | x<!-- b --> |", {"a": "1e-3", "b": "2"}) == "(1e-3<!-- a -->, | 2<!-- b --> |"


def test_the_measured_noise_and_shares_agree_with_the_theory(values):
    for passes in (2, 3, 5):
        assert float(values[f"noise_{passes}_measured"]) == pytest.approx(float(values[f"noise_{passes}"]), rel=0.05)
    for order in ("share", "pipe"):
        for batch in "ab":
            assert values[f"{order}_{batch}_measured"] == values[f"{order}_{batch}"] != values[f"right_{batch}"]
    assert values["share_a"] != values["pipe_a"]


def test_the_variance_grows_by_less_than_the_passes_and_age_falls_by_more(values):
    for passes in (2, 3, 5):
        assert float(values[f"noise_{passes}"]) < passes < float(values[f"fresher_{passes}"])
        older, younger = (float(values[f"age_{number}"]) for number in (1, passes))
        assert older / younger == pytest.approx(float(values[f"fresher_{passes}"]), rel=0.05)


def numbers_and_rest(drawing):
    number = re.compile(r"-?\d+\.\d+")
    return number.sub("#", drawing), [float(found) for found in number.findall(drawing)]


def test_every_figure_is_what_is_drawn(tmp_path):
    paper.draw(tmp_path)
    names = {file.name for file in paper.FIGURES.iterdir()}
    assert names == {file.name for file in tmp_path.iterdir()} == set(re.findall(r"\(figures/(\S+?)\)", TEXT))
    for name in names:
        stored, fresh = ((folder / name).read_text(encoding="utf-8") for folder in (paper.FIGURES, tmp_path))
        assert numbers_and_rest(fresh)[0] == numbers_and_rest(stored)[0]
        assert numbers_and_rest(fresh)[1] == pytest.approx(numbers_and_rest(stored)[1], rel=1e-5, abs=1e-4)


def test_every_figure_is_referred_to_and_every_reference_leads_somewhere():
    assert set(re.findall(r"\]\(#(\S+?)\)", TEXT)) == set(re.findall(r"\{#(\S+?)[ }]", TEXT))


def test_every_figure_has_a_text_for_those_who_cannot_see_it():
    alternatives = re.findall(r'\{#fig-\w+ alt="([^"]+)"\}', TEXT)
    assert len(alternatives) == len(paper.DRAWN)
    assert min(map(len, alternatives)) > 80


def test_every_citation_resolves_and_every_entry_is_cited():
    cited = set(re.findall(r"@(\w+)", TEXT))
    assert cited == set(re.findall(r"^@\w+\{(\w+),", BIBLIOGRAPHY, flags=re.MULTILINE))
    assert len(cited) >= 15


def test_the_paper_has_the_length_of_a_short_paper():
    words = re.sub(r"<!--.*?-->|\{#.*?\}", "", TEXT.split("---\n", 2)[2]).split()
    assert 1500 <= len(words) <= 3400


def test_the_page_builds_with_its_figures_and_references(tmp_path):
    page = tmp_path / "paper.html"
    paper.build(page)
    html = page.read_text(encoding="utf-8")
    assert html.count("<figure") == len(paper.DRAWN)
    assert 'id="ref-ioffe2015"' in html
    assert "<math" in html
    assert html.count('alt="') == len(paper.DRAWN)
    assert "<!-- corrected" not in html
    assert 'src="figures' not in html  # they are inside


def test_a_missing_citation_stops_the_build(tmp_path, monkeypatch):
    for name in ("paper.bib", "figures"):
        (tmp_path / name).symlink_to(paper.ROOT / name)
    (tmp_path / "paper.md").write_text(TEXT + "\n[@nobody1999]\n", encoding="utf-8")
    monkeypatch.setattr(paper, "ROOT", tmp_path)
    with pytest.raises(subprocess.CalledProcessError):
        paper.build(tmp_path / "build" / "paper.html")


def test_the_measured_gradients_of_a_layer_that_reads_its_state_agree_with_the_theory(values):
    claims = next(theorem for theorem in symbolic.theorems() if theorem.name == "Recomputation").claims
    momentum, corrected = sp.Rational(1, 10), corrected_momentum(0.1, 2)
    right, recomputed = claims[1].rhs, claims[3].rhs  # symbols by name: the weight, the batch, the old running value

    def number(expression, m):
        return float(
            expression.subs(
                {symbol: {"w": 1, "b": 1, "R_0": 0}.get(symbol.name, m) for symbol in expression.free_symbols}
            )
        )

    assert float(values["reads"]) == float(values["reads_preserved"]) == pytest.approx(number(right, momentum))
    assert float(values["reads_plain"]) == pytest.approx(number(recomputed, momentum))
    assert float(values["reads_corrected"]) == pytest.approx(number(recomputed, corrected), abs=5e-4)
    assert len({values["reads"], values["reads_plain"], values["reads_corrected"]}) == 3
