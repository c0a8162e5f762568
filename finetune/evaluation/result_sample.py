"""A few rows of a result, small enough to be kept with each answer: for people who look why an answer is wrong. No score
depends on them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from finetune.sql.engines.base import QueryResult, SqlValue

SAMPLE_VERSION = 1
"""Raise it when more or others are kept: cached rows are then judged again, which asks no model."""
MOST_ROWS = 10
MOST_COLUMNS = 12
MOST_CHARACTERS = 80
"""Of one value, and of a column's name."""
MOST_BYTES = 2000
"""Of a sample as JSON; one row is kept whatever its size, which the other limits bound."""
BEFORE = 2
"""Equal rows that are shown before the first that differs."""

Sample = dict[str, Any]
"""columns: names of the first ones. width: number of columns. rows: each a list of JSON values, {"number": text} for infinity,
which JSON does not have, and {"blob": hex} for bytes. first: number of the first of them in the result, from 0. total: number of
rows."""


def samples(gold: QueryResult | None, found: QueryResult | None) -> tuple[Sample | None, Sample | None]:
    """Of the rows of gold and of an answer, from the first rows on; None for a query without rows to show, because it failed or
    did not run. If the first MOST_ROWS are equal and later ones are not, both begin shortly before the first that differs."""
    wanted, seen = (result.rows if result and result.rows is not None else None for result in (gold, found))
    first = 0
    if wanted is not None and seen is not None and wanted != seen:
        equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(wanted, seen, strict=False)))
        first = equal - BEFORE if equal >= MOST_ROWS else 0
    return tuple(  # type: ignore[return-value]
        None if result is None or rows is None else _sample(result.columns, rows, first)
        for result, rows in ((gold, wanted), (found, seen))
    )


def _sample(columns: Sequence[str], rows: Sequence[Sequence[SqlValue]], first: int) -> Sample:
    shown = [[_value(value) for value in row[:MOST_COLUMNS]] for row in rows[first : first + MOST_ROWS]]
    sizes = [len(json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace")) for row in shown]
    while len(shown) > 1 and sum(sizes[: len(shown)]) > MOST_BYTES:
        shown.pop()
    return {
        "columns": [_cut(name) for name in columns[:MOST_COLUMNS]],
        "width": len(columns),
        "rows": shown,
        "first": first,
        "total": len(rows),
    }


def _value(value: SqlValue) -> Any:
    if isinstance(value, bytes):
        return {"blob": _cut(value[: MOST_CHARACTERS + 1].hex())}
    if isinstance(value, str):
        return _cut(value)
    return {"number": str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"
