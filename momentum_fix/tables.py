"""A table of text cells: aligned, or drawn with rich on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lay rows of equal length out in columns, two spaces apart, with no trailing spaces."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def show(rows: Sequence[Sequence[str]]) -> None:
    """Print a table, its header in the first row: drawn on a terminal where rich is installed, else aligned."""
    if not sys.stdout.isatty() or find_spec("rich") is None:
        print(aligned(rows))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console().print(table)


def printable(text: str) -> str:
    """Escape the characters that do not print; a name read from a file may hold any."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def number(value: float | None) -> str:
    """Write a momentum for a table: six significant digits."""
    return "None" if value is None else f"{value:.6g}"
