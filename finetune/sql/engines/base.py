"""What an SQL engine is to everything outside of finetune/sql/engines/: where its databases lie, what they look like, and
sessions in which queries run under limits. finetune/sql/engines/registry.py lists the engines."""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self

SqlValue = None | int | float | str | bytes
ErrorKind = Literal["sql_error", "timeout", "too_large", "forbidden", "crashed"]
"""What went wrong with a query: its text, one of its limits (time, size), a statement that does more than read, or the
process that ran it ended."""

MEMORY_BYTES = 512 << 20
RESULT_BYTES = 32 << 20
MAX_ROWS = 100_000


@dataclass(frozen=True)
class QueryResult:
    """What came of one query: rows and columns, or an error.

    Text that is not UTF-8 has its odd bytes written as ``\\xe9``, so that it can be compared and printed.
    """

    rows: list[tuple[SqlValue, ...]] | None
    columns: tuple[str, ...]
    error: str | None
    """One line, for example ``no such column: nmae``."""
    error_kind: ErrorKind | None
    seconds: float
    """Wall-clock time, measured from the request to the last row."""
    double_quoted_text: bool = False
    """A "double-quoted name" matched nothing, and SQLite read it as text: see `SqlSandbox.run`."""


class Session(Protocol):
    """Runs queries one after the other, in a `with` statement, from one thread. No query sees what another did."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def close(self) -> None:
        """End whatever runs the queries."""

    def run(self, database: Path, sql: str, timeout_seconds: float, max_rows: int = MAX_ROWS) -> QueryResult:
        """Run one query, which may only read, on one database; the next query may name another one.

        Whatever the query does wrong comes back as an error in the result, a result of more than `max_rows` rows too.
        A database that is missing or damaged raises UserError: that is not the query's fault.
        """
        ...


class Engine(Protocol):
    """One dialect of SQL, and who runs it."""

    @property
    def dialect(self) -> str:
        """The name that sqlglot and `Record.dialect` have for it."""
        ...

    @property
    def suffix(self) -> str:
        """Of a database's file, which is <db_id>/<db_id><suffix> in a folder of databases."""
        ...

    def check(self, database: Path) -> None:
        """UserError unless the file, which exists, holds all of the database, so that a copy of it is the same database."""

    def schema(self, database: Path) -> str:
        """The database's CREATE TABLE statements, one a line. UserError for a file that is missing, damaged, or without
        tables."""
        ...

    def open(self, *, memory_bytes: int = MEMORY_BYTES, max_result_bytes: int = RESULT_BYTES) -> Session:
        """A new session. memory_bytes: of what runs the queries. max_result_bytes: a result, and any value in it."""
        ...
