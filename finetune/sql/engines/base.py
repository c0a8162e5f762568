"""The interface of an SQL engine: the file suffix and schema of its databases, and sessions that run queries under limits.
finetune/sql/engines/registry.py lists the engines."""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self

SqlValue = None | int | float | str | bytes
ErrorKind = Literal["sql_error", "timeout", "too_large", "forbidden", "crashed"]
"""Why a query failed: an error in its text, a limit (time, size), a statement that does more than read, or the end of the
process that ran it."""

MEMORY_BYTES = 512 << 20
RESULT_BYTES = 32 << 20
MAX_ROWS = 100_000


@dataclass(frozen=True)
class QueryResult:
    """The result of one query: rows and columns, or an error.

    In text that is not valid UTF-8 the invalid bytes are written as ``\\xe9``, so that it can be compared and printed.
    """

    rows: list[tuple[SqlValue, ...]] | None
    columns: tuple[str, ...]
    error: str | None
    """One line, for example ``no such column: nmae``."""
    error_kind: ErrorKind | None
    seconds: float
    """Wall-clock time, measured from the request to the last row."""
    double_quoted_text: bool = False
    """Whether a "double-quoted name" matched nothing and SQLite read it as text: see `SqlSandbox.run`."""


class Session(Protocol):
    """Runs queries one after the other, in a `with` statement, from one thread. No query can affect another."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def close(self) -> None:
        """End the process or connection that runs the queries."""

    def run(self, database: Path, sql: str, timeout_seconds: float, max_rows: int = MAX_ROWS) -> QueryResult:
        """Run one query, which may only read, on one database; the next query may use another one.

        Any failure of the query is returned as an error in the result, including a result of more than `max_rows` rows.
        A missing or corrupt database raises UserError, because that is not the query's fault.
        """
        ...


class Engine(Protocol):
    """Runs one SQL dialect."""

    @property
    def dialect(self) -> str:
        """Its name in sqlglot and in `Record.dialect`."""
        ...

    @property
    def suffix(self) -> str:
        """The suffix of a database file, which is <db_id>/<db_id><suffix> in a folder of databases."""
        ...

    def check(self, database: Path) -> None:
        """Raise UserError unless the file, which exists, holds the complete database, so that it can be copied."""

    def schema(self, database: Path) -> str:
        """The database's CREATE TABLE statements, one per line. Raises UserError for a file that is missing, corrupt, or
        without tables."""
        ...

    def open(self, *, memory_bytes: int = MEMORY_BYTES, max_result_bytes: int = RESULT_BYTES) -> Session:
        """A new session. memory_bytes: memory limit of the process that runs the queries. max_result_bytes: size limit of a
        result, and of any value in it."""
        ...
