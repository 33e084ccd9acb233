"""The site builds without a warning, has every page and all their words, and asks for nothing from elsewhere."""

import html.parser
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from fontTools.ttLib import TTFont

import momentum_fix

ROOT = Path(__file__).parents[1]
MARKDOWN = sorted(path.relative_to(ROOT) for folder in (ROOT, ROOT / "docs") for path in folder.glob("*.md"))


def sphinx(source, output):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", ROOT / "docs" / "site", source, output]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = sphinx(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


class Page(html.parser.HTMLParser):
    """What a page links to, what it loads, where it can be linked to, and what its article says."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.names, self.text, self.inside = [], [], {"", "top"}, "", False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.names |= {attributes.get("id")}
        self.inside |= tag == "article"
        links = [attributes[name] for name in ("src", "href", "data", "poster", "srcset") if attributes.get(name)]
        links += re.findall(r"url\(([^)]*)\)", attributes.get("style") or "")
        self.links += links
        self.loaded += [] if tag == "a" else links

    def handle_endtag(self, tag):
        self.inside &= tag != "article"

    def handle_data(self, data):
        self.text += data if self.inside else ""


def faults(folder):
    """Give what pages and styles load from elsewhere, and where their links lead nowhere."""
    found = []
    pages = {path: Page(path) for path in folder.rglob("*.html")}
    for path, page in pages.items():
        found += [f"{path.name} loads {link}" for link in page.loaded if urlsplit(link).netloc]
        for link in page.links:
            address = urlsplit(link)
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            if address.scheme or address.netloc:
                continue
            if not target.is_file() or (target in pages and unquote(address.fragment) not in pages[target].names):
                found.append(f"{path.name} links to {link}")
    for path in [*folder.rglob("*.css"), *folder.rglob("*.js")]:
        text = path.read_text(encoding="utf-8")
        pattern = r"(?:url\(|@import|import\(|fetch\(|\.src ?=)\s*[\"']?((?:https?:)?//[^\s\"')]+)"
        found += [f"{path.name} loads {link}" for link in re.findall(pattern, text)]
    return found


def test_nothing_is_loaded_from_elsewhere_and_every_link_leads_somewhere(site):
    assert faults(site) == []
    readme = Page(site / "README.html")
    assert {str(path.with_suffix(".html")) for path in MARKDOWN} <= {*readme.links, "README.html"}


def test_faults_are_seen(tmp_path):
    wrong = '<script src="//a.example/a.js"></script><link rel="stylesheet" href="https://b.example"><img src="no.png">'
    (tmp_path / "wrong.html").write_text(f'{wrong}<a href="right.html#b"></a><a href="#c"></a>', encoding="utf-8")
    (tmp_path / "right.html").write_text('<p id="a"></p><a href="wrong.html"></a><a href="#a"></a>', encoding="utf-8")
    (tmp_path / "style.css").write_text("@font-face {src: url(https://c.example/font)}", encoding="utf-8")
    assert faults(tmp_path) == [
        "wrong.html loads //a.example/a.js",
        "wrong.html loads https://b.example",
        "wrong.html links to no.png",
        "wrong.html links to right.html#b",
        "wrong.html links to #c",
        "style.css loads https://c.example/font",
    ]


MARKUP = re.compile(r"<!--.*?-->|</?\w[^>]*>|^```\w*$|^\d+\. |!\[[^]]*|\]\([^)]*\)|\\\w+", re.DOTALL | re.MULTILINE)


def words(text):
    return Counter(re.findall(r"[a-z]{2,}|\d+", text.lower()))


def test_no_word_of_a_page_is_lost(site):
    for path in MARKDOWN:
        if path.name != "paper.md":
            source = MARKUP.sub("", (ROOT / path).read_text(encoding="utf-8"))
            assert words(source) - words(Page(site / path.with_suffix(".html")).text) == Counter(), path


def test_the_paper_has_its_formulas_figures_tables_and_references(site):
    source, page = (ROOT / "paper.md").read_text(encoding="utf-8"), (site / "paper.html").read_text(encoding="utf-8")
    assert page.count("<math") >= source.count("$") // 4
    assert page.count("<figure") == source.count("](figures/")
    assert page.count("<caption") == len(re.findall(r"^: ", source, flags=re.MULTILINE))
    assert {*re.findall(r"@(\w+)", source)} <= {*re.findall(r'id="ref-(\w+)"', page)}
    assert not re.search(
        r":\w+:`|``|\[@|<!-- \w+ -->", Page(site / "paper.html").text
    )  # markup that was not understood


def test_the_notebook_has_its_pictures_and_formulas(site):
    cells = json.loads((ROOT / "notebooks" / "derivation.ipynb").read_text(encoding="utf-8"))["cells"]
    kinds = Counter(kind for cell in cells for output in cell.get("outputs", []) for kind in output.get("data", {}))
    page = (site / "notebooks" / "derivation.html").read_text(encoding="utf-8")
    assert page.count("<img") == kinds["image/svg+xml"] > 0
    assert page.count('<math display="block"') == kinds["text/latex"] > 0


def test_the_reference_has_every_public_name_and_its_docstring_as_written(site):
    pages = [Page(path) for path in (site / "docs" / "site").glob("reference*.html")]
    names, text = {name for page in pages for name in page.names}, "".join(page.text for page in pages)
    assert {f"momentum_fix.{name}" for name in momentum_fix.__all__} <= names
    assert {"momentum_fix.symbolic.theorems", "momentum_fix.plots.figure"} <= names
    assert "\nm' = 1 - (1 - m)**(1 / passes)\n" in text  # as code: straight quotes, stars
    assert "Exact for: a constant number of passes" in text
    assert "Return type" not in text  # what becomes of a colon in the first line below "Returns:"


def test_the_contents_stand_in_groups_each_page_once(site):
    page = (site / "README.html").read_text(encoding="utf-8")
    groups = re.findall(r'<span class="caption-text">(\w+)</span>.*?<ul>(.*?)</ul>', page, re.DOTALL)
    assert [caption for caption, _ in groups] == ["Start", "Use", "Understand", "Reference"]
    listed = [link for _, group in groups for link in re.findall(r'href="([^"#]+)"', group)]
    assert sorted(listed) == sorted({str(path.relative_to(site)) for path in site.rglob("*.html")} - LEFT_OUT)


LEFT_OUT = {"README.html", "search.html"}


def test_a_sentence_that_a_program_prints_is_folded_on_a_phone_and_a_row_of_a_table_is_not(site):
    page = (site / "README.html").read_text(encoding="utf-8")
    folded = re.findall(r'<span class="sentence">(.*?)</span>', page)
    assert any(line.startswith("Clean: ") for line in folded)
    assert not any("  " in line or "<" in line for line in folded)
    assert "running_mean, running_var" in page


def test_the_font_of_the_formulas_says_where_scripts_stand(site):
    (mathfont,) = (site / "_static").glob("formulas.*")
    heights = TTFont(mathfont)["MATH"].table.MathConstants
    assert 0 < heights.SubscriptShiftDown.Value < heights.SuperscriptShiftUp.Value
    assert mathfont.name in (site / "_static" / "site.css").read_text(encoding="utf-8")


SMALL = {
    "README.md": "# A",
    "CHANGELOG.md": "# B",
    "docs/c.md": "# C",
    "docs/site/d.md": "# D",
    "notebooks/e.md": "# E",
}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[a](c.md) [b](../paper.md) [c](#c) [d](../README.md#a) $\\frac{1}{2}$", []),
        ("[a](nowhere.md) [b](#there) [c](../README.md#here)", ["'nowhere.md'", "'there'", "'here'"]),
        ("$\\frac{1}$", ["Could not convert TeX math"]),
    ],
)
def test_a_link_to_nowhere_or_a_formula_that_cannot_be_set_stops_the_build(tmp_path, line, said):
    for name, text in SMALL.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "paper.md").write_text("---\ntitle: P\n---\n\ntext", encoding="utf-8")
    (tmp_path / "docs" / "c.md").write_text(f"# C\n\n{line}\n", encoding="utf-8")
    done = sphinx(tmp_path, tmp_path / "build")
    assert (done.returncode == 0) == (not said), done.stderr
    assert all(each in done.stderr for each in said)
