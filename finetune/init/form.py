"""For a database without questions: how many are needed, and a form to fill them in."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from finetune.init.config_text import interval_points
from finetune.init.database import Database
from finetune.sql.tables import Table

FORM = "data/questions.csv"
FIRST, GOOD, LEAST = 100, 300, 20
"""Pairs for a first try, for a run worth comparing, and below which nothing can be split into train, val and test."""
HEADER = ("question", "sql", "about")
SHAPES = (
    "how many rows, or how many with some property",
    "the rows with some property, and what of them",
    "the largest, smallest or newest ones (ORDER BY ... LIMIT)",
    "a total, an average or a count for each {group} (GROUP BY)",
)
COLUMNS_SHOWN = 8


def rule_of_thumb() -> str:
    """How many pairs; the intervals are computed, the rest is experience and is said to be."""
    held_out = [round(0.2 * number) for number in (FIRST, GOOD)]
    points = [round(interval_points(number)) for number in held_out]
    return (
        f"{FIRST} pairs for a first try, {GOOD} for a run worth comparing, more for more tables (a rule of thumb, not measured "
        f"on your data). A fifth is held out for the score: with {FIRST} pairs 50% right means plus or minus {points[0]} points, "
        f"with {GOOD} plus or minus {points[1]} (computed, 95%)"
    )


def form_text(database: Database) -> str:
    """A CSV with empty questions; the last column says what a row could be about, and is not read."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(HEADER)
    for hint in hints(database.tables):
        writer.writerow(("", "", hint))
    return stream.getvalue()


def hints(tables: Sequence[Table]) -> list[str]:
    """What a question could be about: FIRST of them, each shape for each table and each pair of tables in turn."""
    found = [f"{_shown(table)}: {shape.format(group=_group(table))}" for shape in SHAPES for table in tables]
    found += [
        f"{table.name} with {key.table} (by {', '.join(key.columns)}): what one says about the other (JOIN)"
        for table in tables
        for key in table.foreign_keys
    ]
    found += [
        f"{table.name}: rows that have no counterpart in another table, or more than others have (NOT IN, HAVING)"
        for table in tables
    ]
    return [found[number % len(found)] for number in range(FIRST)] if found else []


def _shown(table: Table) -> str:
    names = [column.name for column in table.columns]
    more = ", ..." if len(names) > COLUMNS_SHOWN else ""
    return f"{table.name} ({', '.join(names[:COLUMNS_SHOWN])}{more})"


def _group(table: Table) -> str:
    """A column to group by: the first text that is no key."""
    keys = {*table.primary_key, *(name for key in table.foreign_keys for name in key.columns)}
    texts = [
        column.name
        for column in table.columns
        if column.name not in keys and "CHAR" in column.type.upper() + "CHAR" * (column.type.upper() == "TEXT")
    ]
    return texts[0] if texts else "group"
