"""A table of text cells, aligned."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lay rows of equal length out in columns, two spaces apart, with no trailing spaces.

    Characters that do not print (a name read from a file may hold any) are escaped.
    """
    rows = [["".join(c if c.isprintable() else ascii(c)[1:-1] for c in cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def number(value: float | None) -> str:
    """Write a momentum for a table: six significant digits."""
    return "None" if value is None else f"{value:.6g}"
