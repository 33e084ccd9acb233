"""A table of text cells: aligned, or drawn on a terminal. Nothing in it is ever cut."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from html import escape

_MOST_DRAWN = 1000  # rows, from which on drawing takes too long
_MOST_ALIGNED = 2**24  # characters, from which on columns are not aligned: one long name would make all rows as long


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lay rows of equal length out in columns, two spaces apart, with no trailing spaces."""
    rows = [[presentable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if len(rows) * sum(widths) > _MOST_ALIGNED:
        widths = [0] * len(widths)
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


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
    """Print a table, its header in the first row: on a terminal drawn, and folded where that is too narrow."""
    if not sys.stdout or not sys.stdout.isatty() or len(rows) > _MOST_DRAWN:
        print(aligned(rows))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    table = Table()
    for header, *_ in columns:
        table.add_column(Text(header.replace(" ", "\n")), overflow="fold")  # a word a line leaves room for numbers
    for row in zip(*(column[1:] for column in columns), strict=True):
        table.add_row(*(Text(presentable(cell)) for cell in row))
    Console().print(table)


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
