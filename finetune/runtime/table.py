"""Aligned tables of text."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], align: str = "l", *, rule: bool = False) -> list[str]:
    """One line per row, with cells two spaces apart and every column as wide as its longest cell.

    align: l (left) or r (right) for each column; the last letter applies to all remaining columns. rule: a line of dashes
    below the first row. Raises ValueError if rows differ in length.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [(align[column] if column < len(align) else align[-1]) == "r" for column in range(len(widths))]
    lines = [
        "  ".join(
            cell.rjust(width) if to_the_right else cell.ljust(width)
            for cell, width, to_the_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]
    if rule:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return lines
