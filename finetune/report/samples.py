"""The rows that an evaluation keeps of each result (evaluation/result_sample.py), checked and as text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

NULL = None
Cell = str | None
"""The text of a value; None for NULL."""
MISTAKABLE = re.compile(r"\s*|\s*[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?\s*|-?inf|nan|null|x'.*'", re.IGNORECASE | re.DOTALL)
MOST_SHOWN = 50
"""Rows and columns that a page shows, whatever a file holds; an evaluation keeps fewer."""


@dataclass(frozen=True)
class SampleTable:
    """columns: names. rows: texts; None is NULL. note: which rows of how many these are."""

    columns: list[str]
    rows: list[list[Cell]]
    note: str

    def as_dict(self) -> dict[str, Any]:
        return {"columns": self.columns, "rows": self.rows, "note": self.note}


def sample_table(sample: Any) -> SampleTable | None:
    """None for what is no sample, as in files that a person has changed."""
    if not isinstance(sample, dict) or not all(isinstance(sample.get(key), list) for key in ("columns", "rows")):
        return None
    counts = [number for key in ("first", "total", "width") if type(number := sample.get(key)) is int and number >= 0]
    if len(counts) < 3:
        return None
    first, total, width = counts
    rows = [[cell(value) for value in row[:MOST_SHOWN]] for row in sample["rows"][:MOST_SHOWN] if isinstance(row, list)]
    columns = [str(name) for name in sample["columns"][:MOST_SHOWN]]
    return SampleTable(columns, rows, _note(first, len(rows), total, len(columns), width))


def cell(value: Any) -> Cell:
    """Text that could be taken for a number, for NULL or for bytes is in quotes, because '1' and 1 are not equal."""
    if value is None:
        return NULL
    if isinstance(value, dict):
        return f"x'{value['blob']}'" if "blob" in value else str(value.get("number", ""))
    return f"'{value}'" if isinstance(value, str) and MISTAKABLE.fullmatch(value) else str(value)


def _note(first: int, shown: int, total: int, columns: int, width: int) -> str:
    if total == 0:
        return "no rows"
    every = "1 row" if total == 1 else f"{total:,} rows"
    rows = every if shown == total else f"rows {first + 1:,} to {first + shown:,} of {total:,}"
    return rows if columns >= width else f"{rows}, {columns} of {width} columns"
