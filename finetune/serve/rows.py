"""Runs the SQL of answers on the server's databases: read-only, in the sandbox, with the limits of the config."""

from __future__ import annotations

import asyncio
import math
import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.sql.engines.base import Limits, Session, SqlValue
from finetune.sql.engines.registry import engine_of_file

ROWS_SENT = 1000
WORKERS = 2
"""Queries that run at the same time; each has a process of its own, with the memory of the limits."""


class Rows:
    def __init__(self, limits: Limits, timeout_seconds: float, rows_sent: int = ROWS_SENT) -> None:
        self._limits, self._timeout, self._rows_sent = limits, timeout_seconds, rows_sent
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="finetune-sql")
        self._idle: queue.SimpleQueue[dict[str, Session]] = queue.SimpleQueue()
        for _ in range(WORKERS):
            self._idle.put({})

    async def of(self, database: Path, sql: str) -> dict[str, Any]:
        """{"columns", "rows", "truncated"}, or {"error"}: one line. A blob is written as {"blob": hex}, an infinite number as
        text."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._run, database, sql)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for _ in range(WORKERS):
            for session in self._idle.get().values():
                session.close()

    def _run(self, database: Path, sql: str) -> dict[str, Any]:
        sessions = self._idle.get()
        try:
            engine = engine_of_file(database)
            if engine.dialect not in sessions:
                sessions[engine.dialect] = engine.open(self._limits)
            result = sessions[engine.dialect].run(database, sql, self._timeout)
        except UserError as error:
            return {"error": str(error)}
        finally:
            self._idle.put(sessions)
        if result.rows is None:
            return {"error": result.error}
        rows = result.rows[: self._rows_sent]
        return {
            "columns": list(result.columns),
            "rows": [[_shown(value) for value in row] for row in rows],
            "truncated": len(result.rows) > len(rows),
        }


def _shown(value: SqlValue) -> Any:
    if isinstance(value, bytes):
        return {"blob": value.hex()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
