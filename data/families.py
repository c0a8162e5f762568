"""Question families: reads questions.yaml, expands it, and checks the gold SQL that it yields."""

from __future__ import annotations

import itertools
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # PyYAML brings no types

MONTHS = ["January", "February", "March", "April", "May", "June"]
MONTHS += ["July", "August", "September", "October", "November", "December"]
SLOT = re.compile(r"\{(\w+)(?::(\w+))?\}")
ORDERED = re.compile(
    r"SELECT (?P<distinct>DISTINCT )?.+? FROM (?P<source>.+)"
    r" ORDER BY (?P<keys>(?:[^()]|\([^()]*\))+?)(?: LIMIT (?P<limit>\d+))?"
)


class DataError(Exception):
    """A fault in the source files. The message is one line that names the place."""


@dataclass(frozen=True)
class Family:
    """Questions of one shape: an SQL template, the values of its slots, and the phrasings of the question.

    `slots` maps a slot ("brand"), or several that change together ("low, high"), to a list of values or to a
    SELECT that returns them. In `ask`, {d:date} writes 2024-05-03 as 3 May 2024, and {m:month} writes 2024-05
    as May 2024.
    """

    db_id: str
    name: str
    sql: str
    ask: list[str]
    slots: dict[str, Any]

    @property
    def where(self) -> str:
        """The place to name in an error message."""
        return f"{self.db_id}/questions.yaml, family {self.name}"


def read_families(source: Path) -> list[Family]:
    """The families of one database folder. Raises DataError if questions.yaml is broken or repeats a name."""
    path = source / "questions.yaml"
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        families = [Family(source.name, e["name"], e["sql"], e["ask"], e.get("slots", {})) for e in entries]
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"{source.name}/questions.yaml: {' '.join(str(error).split())}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{source.name}/questions.yaml: name, sql and ask expected, {error!r}") from error
    for name, count in Counter(family.name for family in families).items():
        if count > 1:
            raise DataError(f"{source.name}/questions.yaml: {count} families are called {name}")
    return families


def expand(family: Family, connection: sqlite3.Connection) -> Iterator[tuple[str, list[str]]]:
    """Yields each gold SQL of a family with its questions, one for each phrasing."""
    for values in slot_values(family, connection):
        quoted = {name: value.replace("'", "''") for name, value in values.items()}
        yield fill(family, family.sql, quoted), [fill(family, ask, values) for ask in family.ask]


def slot_values(family: Family, connection: sqlite3.Connection) -> Iterator[dict[str, str]]:
    """Yields every combination of slot values; a family without slots has one, which is empty."""
    choices = []
    for slots, values in family.slots.items():
        names = slots.split(", ")
        try:
            rows = connection.execute(values).fetchall() if isinstance(values, str) else values
            cells = [row if isinstance(row, (list, tuple)) else [row] for row in rows]
            choices.append([dict(zip(names, map(str, row), strict=True)) for row in cells])
        except (sqlite3.Error, ValueError) as error:
            raise DataError(f"{family.where}, slot {slots}: {error}") from error
    for combination in itertools.product(*choices):
        yield {name: value for part in combination for name, value in part.items()}


def fill(family: Family, template: str, values: dict[str, str]) -> str:
    """Puts the values into the slots of an SQL template or of a phrasing."""

    def value_of(match: re.Match[str]) -> str:
        name, form = match.groups()
        if name not in values:
            raise DataError(f"{family.where}: no values for the slot {name}")
        return in_words(values[name]) if form else values[name]

    return SLOT.sub(value_of, template)


def in_words(iso: str) -> str:
    """2024-05-03 becomes 3 May 2024, and 2024-05 becomes May 2024."""
    if len(iso) == len("2024-05"):
        return in_words(f"{iso}-01").removeprefix("1 ")
    day = date.fromisoformat(iso)
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def check_gold(family: Family, connection: sqlite3.Connection, sql: str) -> bool:
    """Whether a gold SQL returns a value that is not NULL. Raises DataError if it fails or its order is ambiguous."""
    try:
        rows = connection.execute(sql).fetchall()
        if "ORDER BY" in sql:
            check_order(family, connection, sql)
    except sqlite3.Error as error:
        raise DataError(f"{family.where}: {error} in {sql}") from error
    return any(value is not None for row in rows for value in row)


def check_order(family: Family, connection: sqlite3.Connection, sql: str) -> None:
    """Raises DataError if ORDER BY is ambiguous: two rows with the same key up to the LIMIT, or a NULL."""
    match = ORDERED.fullmatch(sql)
    if not match:
        raise DataError(f"{family.where}: ORDER BY is supported only at the end of a single SELECT: {sql}")
    keys = match["keys"].replace(" DESC", "")
    unlimited = f"SELECT {match['distinct'] or ''}{keys} FROM {match['source']} ORDER BY {match['keys']}"
    ranked = connection.execute(unlimited).fetchall()
    decisive = ranked[: int(match["limit"]) + 1] if match["limit"] else ranked
    if len(set(decisive)) < len(decisive) or any(None in row for row in decisive):
        raise DataError(f"{family.where}: a tie or a NULL decides the order of {sql}")
