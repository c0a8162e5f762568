"""Validates candidates: fields, schema, SQL that parses, gold SQL that runs on the database.

Each candidate becomes an `Accepted` record or a `Rejection` with a reason that the user can act on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from sqlglot.errors import ParseError
from tqdm import tqdm

from finetune.data.candidates import Candidate, Source
from finetune.data.golds import Golds
from finetune.data.prompts import completion
from finetune.data.records import REQUIRED, Record, field_problems
from finetune.errors import UserError
from finetune.sql.column_references import columns_not_shown
from finetune.sql.dialects import dialect_name
from finetune.sql.engines.base import Engine, Limits
from finetune.sql.engines.registry import ENGINES, engine_for, open_sessions
from finetune.sql.gold import Gold, GoldExaminer
from finetune.sql.lexer import too_long
from finetune.sql.parsing import NotAQueryError, query_tree, same_tree
from finetune.sql.references import tables_not_shown
from finetune.sql.schema import create_database, shared_tables
from finetune.sql.text import is_select, shortened

MALFORMED = "malformed"
DATABASE_MISSING = "database_missing"
DATABASE_UNREADABLE = "database_unreadable"
SCHEMA_MISSING = "schema_missing"
SCHEMA_DOES_NOT_PARSE = "schema_does_not_parse"
SQL_DOES_NOT_PARSE = "sql_does_not_parse"
SQL_CHANGES_ON_ONE_LINE = "sql_changes_on_one_line"
GOLD_FAILS = "gold_fails"
TABLE_NOT_SHOWN = "table_not_shown"
COLUMN_NOT_SHOWN = "column_not_shown"
GOLD_HITS_LIMIT = "gold_hits_limit"
GOLD_UNSTABLE = "gold_unstable"
DUPLICATE_ID = "duplicate_id"
DUPLICATE_QUESTION = "duplicate_question"
LEAK = "leak"
LEFT_OUT = "left_out"
FAULTS = (
    MALFORMED,
    DATABASE_MISSING,
    DATABASE_UNREADABLE,
    SCHEMA_MISSING,
    SCHEMA_DOES_NOT_PARSE,
    SQL_DOES_NOT_PARSE,
    SQL_CHANGES_ON_ONE_LINE,
    GOLD_FAILS,
    TABLE_NOT_SHOWN,
    COLUMN_NOT_SHOWN,
    GOLD_HITS_LIMIT,
    GOLD_UNSTABLE,
)
"""Reasons for which the record itself is wrong, as opposed to repeating another one (duplicate, leak) and to being left out on
purpose."""

LIMIT_ADVICE = (
    "a limit, which timeout_seconds, max_rows and the other limits in the config's section evaluation can raise"
)

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


Examine = Callable[[str, Path, str], Gold]
"""Runs the SQL of a dialect on a database, and says what it is worth as gold."""


def validate(
    source: Source,
    *,
    timeout_seconds: float,
    limits: Limits | None = None,
    statements: Literal["all", "select"] = "all",
    golds: Golds | None = None,
    progress: bool = True,
) -> tuple[list[Accepted], list[Rejection]]:
    """Separate one source's candidates into usable records and rejections, each in the source's order.

    timeout_seconds, limits: of each gold query. The gold SQL of a dialect without an engine is not run. statements: whether gold
    SQL that is no query (INSERT, DELETE, ...) is a fault (`all`) or is left out (`select`). golds: takes up what was found out
    about each gold query.
    """
    accepted: list[Accepted] = []
    rejections: list[Rejection] = []
    with open_sessions(limits) as session, TemporaryDirectory(prefix="finetune-") as scratch:
        examiner = GoldExaminer(session, timeout_seconds)
        gold_of = functools.partial((golds or Golds()).examine, examiner)
        on_empty = functools.partial(Golds().examine, examiner)

        @functools.cache
        def schema_of(dialect: str, database: Path) -> str:
            return ENGINES[dialect].schema(database)

        @functools.cache
        def empty_database(schema: str) -> Path | None:
            path = Path(scratch) / f"{sha256(schema.encode()).hexdigest()}.sqlite"
            try:
                create_database(schema, path)
            except UserError:
                return None
            return path

        for candidate in tqdm(source.candidates, desc="Checking records", unit="record", delay=1, disable=not progress):
            try:
                record, database = _record(candidate, source, schema_of)
                answer, problem = _answer(record, statements)
                _check_schema(record)
                if database is not None:
                    _check_runs(record, database, gold_of, answer, problem)
                elif problem:
                    _check_runs(record, _required(empty_database(record.schema), problem), on_empty, answer, problem)
                if not problem:
                    _check_names_shown(record, columns=database is None)
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
    try:
        fields["dialect"] = dialect_name(fields["dialect"])
    except UserError as error:
        raise _Fault(MALFORMED, f"dialect: {error}") from None
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


def _check_schema(record: Record) -> None:
    if fault := _schema_problem(record.schema, record.dialect):
        raise _Fault(SCHEMA_DOES_NOT_PARSE, fault)


def _check_names_shown(record: Record, *, columns: bool) -> None:
    """columns: also those, which an engine would have checked."""
    if missing := tables_not_shown(record.sql, record.schema, record.dialect):
        raise _Fault(TABLE_NOT_SHOWN, f"the gold SQL reads {', '.join(missing)}, which the schema does not create")
    if columns and (missing := columns_not_shown(record.sql, record.schema, record.dialect)):
        raise _Fault(COLUMN_NOT_SHOWN, f"the gold SQL reads {', '.join(missing)}: no such column in the schema")


def _required(database: Path | None, problem: str) -> Path:
    if database is None:
        raise _Fault(SQL_DOES_NOT_PARSE, problem)
    return database


def _check_runs(record: Record, database: Path, examine: Examine, answer: str, problem: str | None) -> None:
    """Check that the gold SQL runs on the database, and, where it does not parse, that the answer to train on does, too."""
    try:
        gold = examine(record.dialect, database, record.sql)
        trained = examine(record.dialect, database, answer) if problem else gold
    except UserError as error:
        raise _Fault(DATABASE_UNREADABLE, str(error)) from None
    if problem and (refused := next((one for one in (gold, trained) if one.kind == "failed"), None)):
        raise _Fault(SQL_DOES_NOT_PARSE, f"{problem}; SQLite says: {refused.detail}")
    if gold.kind == "failed":
        raise _Fault(GOLD_FAILS, gold.detail)
    if gold.kind == "limit":
        raise _Fault(GOLD_HITS_LIMIT, f"{gold.detail} ({LIMIT_ADVICE})")
    if gold.kind == "unstable":
        raise _Fault(GOLD_UNSTABLE, str(gold))


def _answer(record: Record, statements: Literal["all", "select"]) -> tuple[str, str | None]:
    """The answer to train on, and why the gold SQL does not parse if only the engine can say whether it is valid: SQLite accepts
    more than sqlglot knows (CAST(x AS BIG INT), FROM t, u ON ..., names such as glob)."""
    try:
        tree = query_tree(record.sql, record.dialect)
    except NotAQueryError as error:
        if statements == "select":
            raise _Fault(LEFT_OUT, f"data.statements: {error}") from None
        raise _Fault(SQL_DOES_NOT_PARSE, f"{error} (`data.statements: select` leaves such records out)") from None
    except ParseError as error:
        if record.dialect == "sqlite" and not too_long(record.sql) and is_select(record.sql):
            return completion(record.sql), str(error)
        raise _Fault(SQL_DOES_NOT_PARSE, str(error)) from None
    answer = completion(record.sql, dialect=record.dialect)
    if answer != record.sql and not same_tree(tree, answer, record.dialect):
        detail = "without its comments and line breaks, as it is trained on, the SQL does not read the same: "
        raise _Fault(SQL_CHANGES_ON_ONE_LINE, detail + shortened(answer, dialect=record.dialect))
    return answer, None


@functools.lru_cache(maxsize=1024)
def _schema_problem(schema: str, dialect: str) -> str | None:
    try:
        shared_tables(schema, dialect)
    except UserError as error:
        return str(error)
    return None


def stopping_problem(rejections: Iterable[Rejection], read: int, strict: bool) -> str | None:
    """Why a source of `read` candidates cannot be used, in one line that names the first faulty record; None if it can."""
    rejections = list(rejections)
    faulty = [rejection for rejection in rejections if rejection.reason in FAULTS]
    read -= sum(rejection.reason == LEFT_OUT for rejection in rejections)
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
