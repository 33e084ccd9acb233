"""The examples on a page of docs/, for tests that go on where the page stops."""

import contextlib
import io
import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
_BLOCK = re.compile(r"^```(python|py)\n(.*?)^```\n(?:^```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def blocks(page, heading=""):
    """Give (language, code, what it prints) of each example in the section of this heading, or on the whole page.

    `python` blocks are run as they stand by test_documents.py; `py` blocks need something that their test gives.
    """
    text = (DOCS / page).read_text(encoding="utf-8")
    if heading:
        (text,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return _BLOCK.findall(text)


def run(code, page, names):
    """Run one example in a namespace; give what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, page, "exec"), names)
    return printed.getvalue()
