"""Validates candidates: fields, schema, SQL that parses, gold SQL that runs on the database.

Each candidate becomes an `Accepted` record or a `Rejection` with a reason that the user can act on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.data.golds import Golds
from finetune.data.records import REQUIRED, Record, field_problems
from finetune.data.sources import Candidate, Source
from finetune.errors import UserError
from finetune.sql.engines.base import Engine
from finetune.sql.engines.registry import ENGINES, engine_for, open_sessions
from finetune.sql.gold import Gold, GoldExaminer
from finetune.sql.parsing import parses
from finetune.sql.references import tables_not_shown
from finetune.sql.schema import parse_ddl

MALFORMED = "malformed"
DATABASE_MISSING = "database_missing"
DATABASE_UNREADABLE = "database_unreadable"
SCHEMA_MISSING = "schema_missing"
SCHEMA_DOES_NOT_PARSE = "schema_does_not_parse"
SQL_DOES_NOT_PARSE = "sql_does_not_parse"
GOLD_FAILS = "gold_fails"
GOLD_HITS_LIMIT = "gold_hits_limit"
GOLD_UNSTABLE = "gold_unstable"
TABLE_NOT_SHOWN = "table_not_shown"
DUPLICATE_ID = "duplicate_id"
DUPLICATE_QUESTION = "duplicate_question"
LEAK = "leak"
FAULTS = (
    MALFORMED,
    DATABASE_MISSING,
    DATABASE_UNREADABLE,
    SCHEMA_MISSING,
    SCHEMA_DOES_NOT_PARSE,
    SQL_DOES_NOT_PARSE,
    GOLD_FAILS,
    GOLD_HITS_LIMIT,
    GOLD_UNSTABLE,
    TABLE_NOT_SHOWN,
)
"""Reasons for which the record itself is wrong, as opposed to repeating another one."""

MAX_FAULTY_FRACTION = 0.1
"""If a larger fraction of a source is faulty, the whole source is refused: a mistyped databases folder or the wrong
dialect should stop the run, not shrink the data set to the records that happen to pass."""


@dataclass(frozen=True)
class Accepted:
    """A record, where it came from, and its database file if there is one and an engine runs its dialect."""

    record: Record
    candidate: Candidate
    database: Path | None


@dataclass(frozen=True)
class Rejection:
    candidate: Candidate
    reason: str
    detail: str

    def row(self) -> dict[str, Any]:
        """One line of rejected.jsonl."""
        place = {"file": self.candidate.file, "line": self.candidate.line}
        return place | {"reason": self.reason, "detail": self.detail, "record": self.candidate.raw}

    def __str__(self) -> str:
        return f"{self.candidate.where}: {self.reason}: {self.detail}"


class _Fault(Exception):
    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def validate(
    source: Source, *, timeout_seconds: float, golds: Golds | None = None, progress: bool = True
) -> tuple[list[Accepted], list[Rejection]]:
    """Separate one source's candidates into usable records and rejections, each in the source's order.

    timeout_seconds: limit of each gold query. The gold SQL of a dialect without an engine is not run. golds: takes up what was
    found out about each gold query.
    """
    accepted: list[Accepted] = []
    rejections: list[Rejection] = []
    golds = golds or Golds()
    with open_sessions() as session:
        gold_of = functools.partial(golds.examine, GoldExaminer(session, timeout_seconds))

        @functools.cache
        def schema_of(dialect: str, database: Path) -> str:
            return ENGINES[dialect].schema(database)

        for candidate in tqdm(source.candidates, desc="Checking records", unit="record", delay=1, disable=not progress):
            try:
                record, database = _record(candidate, source, schema_of)
                _check_texts(record, database, gold_of)
                accepted.append(Accepted(record, candidate, database))
            except _Fault as fault:
                rejections.append(Rejection(candidate, fault.reason, fault.detail))
    return accepted, rejections


def _record(candidate: Candidate, source: Source, schema_of: Callable[[str, Path], str]) -> tuple[Record, Path | None]:
    required = REQUIRED if source.schemas is None else [name for name in REQUIRED if name != "schema"]
    problems = [candidate.problem] if candidate.problem else field_problems(candidate.fields, required)
    if problems:
        raise _Fault(MALFORMED, "; ".join(problems))
    fields = dict(candidate.fields)
    database, engine = None, engine_for(fields["dialect"])
    try:
        if source.databases and engine:
            database = _find_database(source.databases, fields["db_id"], engine)
        if "schema" not in fields:
            known = schema_of(fields["dialect"], database) if database else _listed_schema(fields["db_id"], source)
            fields["schema"] = known
    except UserError as error:
        raise _Fault(DATABASE_UNREADABLE, str(error)) from None
    return Record(**fields), database


def _find_database(folder: Path, db_id: str, engine: Engine) -> Path:
    path = folder / db_id / f"{db_id}{engine.suffix}"
    if not path.is_file():
        raise _Fault(DATABASE_MISSING, f"no file {path}")
    engine.check(path)
    return path


def _listed_schema(db_id: str, source: Source) -> str:
    assert source.schemas is not None
    if db_id not in source.schemas:
        raise _Fault(SCHEMA_MISSING, f"no schema of {db_id}, neither as a database nor in tables.json")
    return source.schemas[db_id]


def _check_texts(record: Record, database: Path | None, gold_of: Callable[[str, Path, str], Gold]) -> None:
    """Check that schema and gold SQL parse in the record's dialect, that the gold SQL runs on the database, and that the schema
    shows the tables it reads."""
    try:
        problem = parses(record.sql, record.dialect)
    except UserError as error:
        raise _Fault(MALFORMED, f"dialect: {error}") from None
    if problem:
        raise _Fault(SQL_DOES_NOT_PARSE, problem)
    if problem := _schema_problem(record.schema, record.dialect):
        raise _Fault(SCHEMA_DOES_NOT_PARSE, problem)
    if database is not None:
        _check_gold_runs(record, database, gold_of)
    if missing := tables_not_shown(record.sql, record.schema, record.dialect):
        raise _Fault(TABLE_NOT_SHOWN, f"the gold SQL reads {', '.join(missing)}, which the schema does not create")


def _check_gold_runs(record: Record, database: Path, gold_of: Callable[[str, Path, str], Gold]) -> None:
    try:
        gold = gold_of(record.dialect, database, record.sql)
    except UserError as error:
        raise _Fault(DATABASE_UNREADABLE, str(error)) from None
    if gold.kind == "failed":
        raise _Fault(GOLD_FAILS, gold.detail)
    if gold.kind == "limit":
        raise _Fault(
            GOLD_HITS_LIMIT, f"{gold.detail}; raise the limits of the section evaluation, or shorten the query"
        )
    if gold.kind == "unstable":
        raise _Fault(GOLD_UNSTABLE, str(gold))


@functools.lru_cache(maxsize=1024)
def _schema_problem(schema: str, dialect: str) -> str | None:
    try:
        parse_ddl(schema, dialect)
    except UserError as error:
        return str(error)
    return None


def stopping_problem(rejections: Iterable[Rejection], read: int, strict: bool) -> str | None:
    """Why a source of `read` candidates cannot be used, in one line that names the first faulty record; None if it can."""
    faulty = [rejection for rejection in rejections if rejection.reason in FAULTS]
    malformed = [rejection for rejection in faulty if rejection.reason == MALFORMED]
    if strict and malformed:
        more = f" (and {len(malformed) - 1} more such lines; `finetune data check` lists them)" if malformed[1:] else ""
        return f"{malformed[0].candidate.where}: {malformed[0].detail}{more}"
    if len(faulty) <= MAX_FAULTY_FRACTION * read:
        return None
    return (
        f"{faulty[0]}; {len(faulty)} of {read} records of this source are faulty, "
        f"{MAX_FAULTY_FRACTION:.0%} is the limit; `finetune data check` lists them all"
    )
