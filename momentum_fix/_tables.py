"""A table of text cells: aligned, or fitted to a terminal. Nothing in it is ever cut."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from html import escape

_MANY = 1000  # rows, from which on drawing takes too long
_LARGE = 2**24  # characters, from which on columns are not aligned: one long name would make all rows as long


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lay rows of equal length out in columns, two spaces apart, with no trailing spaces."""
    rows = [[presentable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if len(rows) * sum(widths) > _LARGE:
        widths = [0] * len(widths)
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def html(rows: Sequence[Sequence[str]], caption: str) -> str:
    """Write a table for a notebook, its header in the first row; without other rows, the caption alone."""
    kinds = ["th"] + ["td"] * (len(rows) - 1) if len(rows) > 1 else []
    lines = [
        "".join(f"<{kind}>{escape(presentable(cell))}</{kind}>" for cell in row)
        for kind, row in zip(kinds, rows, strict=False)
    ]
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return "\n".join([f"<table>{title}", *(f"<tr>{line}</tr>" for line in lines), "</table>"])


def show(rows: Sequence[Sequence[str]]) -> None:
    """Print a table, its header in the first row: on a terminal drawn, or a paragraph a row where it is too narrow."""
    if not sys.stdout.isatty():
        print(aligned(rows))
        return
    columns = [[presentable(cell) for cell in column] for column in zip(*rows, strict=True) if any(column[1:])]
    rows = list(zip(*columns, strict=True))
    width = shutil.get_terminal_size().columns
    if len(rows) > _MANY or not can_draw() or not _drawn(columns, width):
        print(*(_paragraph(rows[0], row, width) for row in rows[1:]), sep="\n")


def show_lines(text: str) -> None:
    """Print lines; those for which a terminal is too narrow are folded between words."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        print(textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False))


def can_draw() -> bool:
    """Tell whether rich can be imported, for it may also be there and broken."""
    try:
        import rich.progress  # noqa: F401  # which imports all of rich that is used here
    except ImportError:
        return False
    return True


def _drawn(columns: Sequence[Sequence[str]], width: int) -> bool:
    """Draw the table if its longest words have room, in the terminal's cells, of which some characters take two."""
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    widths = [max(cell_len(word) for cell in column for word in cell.split() or [""]) for column in columns]
    room = width - sum(widths) - 3 * len(widths) - 1
    if room < 0:
        return False
    table = Table()
    for column, least in zip(columns, widths, strict=True):  # by hand, for rich would take from the longest column
        more = min(room, max(map(cell_len, column)) - least)
        room -= more
        table.add_column(column[0], width=least + more, overflow="fold")
    for row in zip(*(column[1:] for column in columns), strict=True):
        table.add_row(*map(Text, row))
    Console(width=width).print(table)
    return True


def _paragraph(header: Sequence[str], row: Sequence[str], width: int) -> str:
    named = (f"{name} {cell}" for name, cell in zip(header[1:], row[1:], strict=True) if cell not in ("", "-"))
    whole = ", ".join(
        text.replace(" ", "\0") if len(text) < width // 2 else text for text in named
    )  # \0: no break here
    lines = textwrap.wrap(whole, max(1, width - 4), break_long_words=False, break_on_hyphens=False)
    return "\n    ".join([row[0], *lines]).replace("\0", " ")


def presentable(text: str) -> str:
    """Shorten a text of absurd length, and escape what does not print."""
    return printable(shortened(text))


def printable(text: str) -> str:
    """Escape the characters that do not print; a name read from a file may hold any."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shortened(text: str, longest: int = 300) -> str:
    """Leave the middle out of a text of absurd length."""
    return text if len(text) <= longest else f"{text[: longest // 2]}…{text[-longest // 4 :]}"


def number(value: float | None) -> str:
    """Write a momentum for a table: six significant digits."""
    return "None" if value is None else f"{float(value):.6g}"
