"""The interface of an SQL engine: the file suffix and schema of its databases, and sessions that run queries under limits.
finetune/sql/engines/registry.py lists the engines."""

import math
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self

SqlValue = None | int | float | str | bytes
ErrorKind = Literal["sql_error", "timeout", "too_large", "forbidden", "crashed"]
"""Why a query failed: an error in its text, a limit (time, size), a statement that does more than read, or the end of the
process that ran it."""
LIMIT_KINDS: frozenset[ErrorKind] = frozenset({"timeout", "too_large"})
"""The errors that say nothing about the query's correctness: with higher limits it might give a result."""
RESULT_FACTOR = 8
"""The limits of a result grow by this factor at most, because results are kept and compared in memory."""


@dataclass(frozen=True)
class Limits:
    """What one query may use, on a database of up to `large_database_bytes`; for a larger one each limit grows in proportion.

    The time limit, which is an argument of `Session.run`, grows by the same factor.
    """

    memory_bytes: int = 512 << 20
    """Address space of the process that runs the queries; it grows to half of the machine's memory at most."""
    temp_bytes: int = 512 << 20
    """Size of one temporary file, to which sorts and groups are written that need more than a few megabytes. 0: no such files."""
    max_rows: int = 100_000
    max_result_bytes: int = 32 << 20
    """Size of a result as JSON, and of any single value."""
    large_database_bytes: int | None = 128 << 20
    """None: the limits are the same for databases of any size."""

    def factor(self, database_bytes: int) -> int:
        """By how much the limits grow: a whole number, so that databases of similar size can share a process."""
        if not self.large_database_bytes:
            return 1
        return max(1, math.ceil(database_bytes / self.large_database_bytes))

    def times(self, factor: int) -> "Limits":
        return Limits(
            self.memory_bytes * factor,
            self.temp_bytes * factor,
            self.max_rows * min(factor, RESULT_FACTOR),
            self.max_result_bytes * min(factor, RESULT_FACTOR),
            self.large_database_bytes,
        )


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

    @property
    def hit_limit(self) -> bool:
        """Whether it failed only because it reached a limit."""
        return self.error_kind in LIMIT_KINDS


class Session(Protocol):
    """Runs queries one after the other, in a `with` statement, from one thread. No query can affect another."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def close(self) -> None:
        """End the process or connection that runs the queries."""

    def run(self, database: Path, sql: str, timeout_seconds: float, max_rows: int | None = None) -> QueryResult:
        """Run one query, which may only read, on one database; the next query may use another one.

        Any failure of the query is returned as an error in the result, including a result of more than `max_rows` rows (None:
        as many as the session's limits allow). timeout_seconds: for a database of up to `Limits.large_database_bytes`.
        A missing or corrupt database, or one that another program does not let us read, raises UserError, because that is not
        the query's fault.
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
        """Raise UserError unless the file, which exists, looks like a database of this engine."""

    def copy(self, database: Path, target: Path) -> None:
        """Copy a database into one file that holds all of its committed rows. The same database gives the same bytes.

        Nothing is written beside the database. Raises UserError if it cannot be read, and OSError if the target cannot be
        written."""

    def files(self, database: Path) -> list[Path]:
        """All files that hold the database: databases are equal if theirs have equal bytes."""
        ...

    def schema(self, database: Path) -> str:
        """The database's CREATE TABLE statements, one per line. Raises UserError for a file that is missing, corrupt, or
        without tables."""
        ...

    def open(self, limits: Limits = ...) -> Session:
        """A new session, whose queries all run under these limits."""
        ...
