"""Which queries the SQLite sandbox runs."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.sql.engines.base import QueryResult
from finetune.sql.engines.sqlite import SqlSandbox


def executed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The text of every query from now on, as it runs."""
    texts: list[str] = []
    run = SqlSandbox.run

    def recorded(sandbox: SqlSandbox, database: Any, sql: str, *limits: Any, **settings: Any) -> QueryResult:
        texts.append(sql)
        return run(sandbox, database, sql, *limits, **settings)

    monkeypatch.setattr(SqlSandbox, "run", recorded)
    return texts
