"""What the gold queries of the sources are worth for a score: found while they are validated, listed by `data check`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from finetune.data.records import Record, Split
from finetune.sql.engines.base import Limits
from finetune.sql.engines.registry import open_sessions
from finetune.sql.gold import SOUND, VOLATILE, WHY, Gold, GoldExaminer, same_rows, without_rows
from finetune.sql.volatility import volatility

SECOND = 1.05
"""Seconds until a query of the clock runs again: most clocks of SQL count whole seconds."""

Key = tuple[str, Path, str]


class Golds:
    """The gold queries that were run, by dialect, database and text. The rows of those that read the clock are kept until
    `changing` has run them again."""

    def __init__(self, limits: Limits | None = None) -> None:
        """limits: of each query that runs again; None for the defaults."""
        self._limits = limits
        self._found: dict[Key, Gold] = {}
        self._clock: dict[Key, Gold] = {}
        self._ran = 0.0

    def examine(self, examiner: GoldExaminer, dialect: str, database: Path, sql: str) -> Gold:
        """The kind of a gold query, which is run on first use only. Raises UserError if the database cannot be read."""
        key = (dialect, database, sql)
        if key not in self._found:
            gold = examiner.examine(database, sql, dialect, twice=True)
            self._found[key] = without_rows(gold)
            if gold.kind == "clock":
                self._clock[key], self._ran = gold, time.monotonic()
        return self._found[key]

    def kind(self, record: Record, database: Path | None) -> str:
        """The kind of a record's gold query; without a database, as far as its text tells."""
        if database is None:
            return volatility(record.sql, record.dialect) or SOUND
        return self._found[record.dialect, database, record.sql].kind

    def changing(self, timeout_seconds: float) -> set[Key]:
        """The queries whose result differs a second later."""
        if not self._clock:
            return set()
        time.sleep(max(0.0, self._ran + SECOND - time.monotonic()))
        with open_sessions(self._limits) as session:
            found = {
                key
                for key, gold in self._clock.items()
                if not same_rows(
                    gold.result.rows, session(key[0]).run(key[1], key[2], timeout_seconds).rows, key[2], key[0]
                )
            }
        self._clock.clear()
        return found


@dataclass(frozen=True)
class Flag:
    """A record that is used, but whose gold query says little about an answer. where: its file and line."""

    where: str
    file: str
    line: int
    db_id: str
    split: Split
    kind: str

    def __str__(self) -> str:
        return f"{self.where}: {self.kind} ({self.split}): the gold query {WHY[self.kind]}"


@dataclass(frozen=True)
class HollowDatabase:
    """A database on which no gold query can tell a right answer from a constant."""

    db_id: str
    kinds: Counter[str]

    def __str__(self) -> str:
        return (
            f"db_id {self.db_id}: every gold query of its {self.kinds.total()} records is hollow ({tally(self.kinds)}), so any "
            "score on it says nothing; is the database filled?"
        )


def tally(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items(), key=lambda pair: (-pair[1], pair[0])))


def hollow_databases(flags: Iterable[Flag], records: Counter[str]) -> list[HollowDatabase]:
    """The databases of at least two records, all of which are flagged as hollow. records: how many a db_id has."""
    kinds: dict[str, Counter[str]] = {}
    for flag in flags:
        if flag.kind not in (*VOLATILE, "arbitrary_rows"):
            kinds.setdefault(flag.db_id, Counter())[flag.kind] += 1
    return [
        HollowDatabase(db_id, found) for db_id, found in sorted(kinds.items()) if found.total() == records[db_id] >= 2
    ]
