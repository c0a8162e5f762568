"""A toy SQL engine: a database is a JSON file {table: [row, ...]}, on which sqlglot's executor runs DuckDB's dialect."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlglot.errors import SqlglotError
from sqlglot.executor import execute

from finetune.errors import UserError
from finetune.sql.engines.base import Limits, QueryResult

TYPES = {int: "INTEGER", float: "DOUBLE", str: "VARCHAR"}


def read(database: Path) -> Any:
    try:
        return json.loads(database.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{database}: not readable as JSON ({error})", code="sql.database_corrupt") from None


class JsonSession:
    def __init__(self, limits: Limits):
        self.limits = limits

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        pass

    def run(self, database: Path, sql: str, timeout_seconds: float, max_rows: int | None = None) -> QueryResult:
        tables, started = read(database), time.monotonic()
        max_rows = self.limits.max_rows if max_rows is None else max_rows
        try:
            result = execute(sql, tables=tables, dialect="duckdb")
        except SqlglotError as error:
            return QueryResult(None, (), str(error).splitlines()[0], "sql_error", time.monotonic() - started)
        if len(result.rows) > max_rows:
            return QueryResult(None, (), f"more than {max_rows} rows", "too_large", time.monotonic() - started)
        return QueryResult(result.rows, tuple(result.columns), None, None, time.monotonic() - started)


class JsonEngine:
    dialect = "duckdb"
    suffix = ".json"

    def check(self, database: Path) -> None:
        read(database)

    def copy(self, database: Path, target: Path) -> None:
        shutil.copyfile(database, target)

    def files(self, database: Path) -> list[Path]:
        return [database]

    def schema(self, database: Path) -> str:
        return "\n".join(
            f"CREATE TABLE {table} ({', '.join(f'{name} {TYPES[type(value)]}' for name, value in rows[0].items())});"
            for table, rows in read(database).items()
        )

    def open(self, limits: Limits = Limits()) -> JsonSession:  # noqa: B008 (frozen)
        return JsonSession(limits)
