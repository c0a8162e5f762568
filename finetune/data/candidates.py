"""What a source yields: examples as read, before anything is checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """One example as read, not yet validated.

    file, line: its place; line is the line of a JSONL file, else the position in the array or dataset, counted from 1.
    where: the same for messages. raw: the value as read. fields: the value under our field names. problem: a fault found
    while reading.
    """

    file: str
    line: int
    where: str
    raw: Any
    fields: Any
    problem: str | None = None


@dataclass(frozen=True)
class Source:
    """An opened source.

    databases: folder of <db_id>/<db_id>.sqlite, or None if there is no database to run gold SQL on.
    schemas: DDL by db_id for candidates without a schema of their own; None if every candidate must have one.
    strict: whether one malformed line is an error, as in the user's own file; otherwise it is only rejected.
    """

    candidates: list[Candidate]
    databases: Path | None
    schemas: Mapping[str, str] | None
    strict: bool
