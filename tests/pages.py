"""The examples on a page of docs/, for tests that go on where the page stops."""

import ast
import contextlib
import io
import re
import textwrap
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
_BLOCK = re.compile(r"^```(python|py)\n(.*?)^```\n(?:^```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def blocks(page, heading=""):
    """Give (language, code, what it prints) of each example in the section of this heading, or on the whole page.

    `python` blocks are run as they stand by test_documents.py; `py` blocks by the test of their page, which gives them
    what they need, or sees to what they leave behind.
    """
    text = (DOCS / page).read_text(encoding="utf-8")
    if heading:
        (text,) = re.findall(rf"^##+ {heading}\n(.*?)(?=^##+ |\Z)", text, re.MULTILINE | re.DOTALL)
    return _BLOCK.findall(text)


def headings(page):
    """Give the heading above each example on the page."""
    text, above, found = (DOCS / page).read_text(encoding="utf-8"), "", []
    for heading, language in re.findall(r"^(?:##+ (.+)|```(python|py))$", text, re.MULTILINE):
        above = heading or above
        found += [above] if language else []
    return found


def rows(page, header):
    """Give the cells of each row of the table with this header."""
    below = (DOCS / page).read_text(encoding="utf-8").partition(f"\n{header}\n")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in below.splitlines()[1:]]


def wrapped(text, width=118):
    """Lay a paragraph out in lines."""
    return "\n".join(textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False))


def quoting(text, mark, answer):
    """Put lines into a document, between the comments `<!-- mark -->` and `<!-- /mark -->`, if it has them."""
    quoted = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    return quoted.sub(lambda found: f"{found[1]}{answer}\n{found[2]}", text)


def run(code, page, names):
    """Run one example in a namespace; give what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, page, "exec"), names)
    return printed.getvalue()


def definitions(code, page, names):
    """Run nothing of an example but its imports and the classes and functions that it defines."""
    tree = ast.parse(code, page)
    kept = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
    tree.body = [statement for statement in tree.body if isinstance(statement, kept)]
    exec(compile(tree, page, "exec"), names)
