"""Whether a gold query can tell a right answer from a wrong one on its database.

A query with any mistake passes where the gold result holds nothing of the data: `SELECT 1 WHERE 1=0` is right wherever gold gives
no rows, which 12 of 493 questions of Spider's dev set do. Each gold query is of one kind:

- ``sound``: none of what follows;
- hollow, because a constant has the same result: ``no_rows``; ``nothing_found`` (only 0 and NULL, as an aggregate gives for empty
  tables); ``constant`` (it reads no table); ``empty_table`` (a table that it reads has no rows);
- ``clock`` or ``random``: the result depends on when it runs, or on chance;
- ``arbitrary_rows``: LIMIT cuts between rows that ORDER BY does not tell apart, so that other rows would be as right;
- without a result: ``failed``, ``limit`` (time, size, or the end of its process), ``unstable`` (its own result, computed again,
  differs).

Not recognised: ties inside a nested query, ties in the order of rows that are all returned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from sqlglot import exp
from sqlglot.errors import ParseError

from finetune.errors import UserError
from finetune.sql.compare import Rows, gold_is_ordered, results_equal
from finetune.sql.engines.base import QueryResult, Session
from finetune.sql.parsing import shared_tree
from finetune.sql.volatility import volatility

SOUND = "sound"
HOLLOW = ("no_rows", "nothing_found", "constant", "empty_table")
VOLATILE = ("clock", "random")
ARBITRARY = "arbitrary_rows"
WITHOUT_RESULT = ("failed", "limit", "unstable")
WHY = {
    "no_rows": "gives no rows, as any query does whose condition is never true",
    "nothing_found": "gives only 0 or NULL, as for empty tables",
    "constant": "reads no table",
    "empty_table": "reads a table without rows",
    "clock": "depends on the time at which it runs",
    "random": "uses random numbers",
    ARBITRARY: "has a LIMIT that cuts between rows which its ORDER BY does not tell apart",
    "failed": "does not run",
    "limit": "hits a limit",
    "unstable": "gives another result each time it runs",
}
"""What is wrong with a gold query of each kind but `sound`, to follow its name in a sentence."""

RUNS_OF_RANDOM = 20
"""Runs until a query with random numbers counts as stable: one that picks one of two rows passes with probability 2**-19."""
SECONDS_OF_RUNS = 10.0
TICK_SECONDS = 0.005
"""Between two runs, so that a clock that counts milliseconds (julianday) moves on."""


@dataclass(frozen=True)
class Gold:
    """A gold query's result on its database, and its kind; detail: which table, or the error."""

    kind: str
    result: QueryResult
    detail: str = ""

    @property
    def error(self) -> str | None:
        """Why there is no result; None if there is one."""
        return self.detail if self.kind in ("failed", "limit") else None

    def __str__(self) -> str:
        why = WHY.get(self.kind, self.kind)
        return f"{why}: {self.detail}" if self.detail else why


class GoldExaminer:
    """Runs gold queries and says what they are worth. What it learns about a database's tables is kept."""

    def __init__(self, session: Callable[[str], Session], timeout_seconds: float) -> None:
        """session: the session of a dialect. timeout_seconds: limit of each query."""
        self._session, self._timeout = session, timeout_seconds
        self._is_empty = cache(self._table_is_empty)
        self._views = cache(self._volatile_views)

    def examine(self, database: Path, sql: str, dialect: str, *, twice: bool = False) -> Gold:
        """Run a gold query once, and again where its text uses random numbers or the clock. twice: run any query that takes less
        than a second again. Raises UserError if the database cannot be read."""
        result = self.run(database, sql, dialect)
        if result.rows is None:
            limit = result.error_kind in ("timeout", "too_large", "crashed")
            return Gold("limit" if limit else "failed", result, result.error or "")
        kind = self.volatile(database, sql, dialect)
        if (kind or (twice and result.seconds < 1)) and self._differs(database, sql, dialect, result, kind):
            return Gold("unstable", result)
        return Gold(kind, result) if kind else self._of_result(database, sql, dialect, result)

    def volatile(self, database: Path, sql: str, dialect: str) -> str | None:
        """ "random" or "clock" if the query's result depends on it, itself or through a view; else None."""
        return volatility(sql, dialect) or self._through_a_view(database, sql, dialect)

    def run(self, database: Path, sql: str, dialect: str) -> QueryResult:
        return self._session(dialect).run(database, sql, self._timeout)

    def _differs(self, database: Path, sql: str, dialect: str, first: QueryResult, kind: str | None) -> bool:
        """Whether further runs give other results. A clock has to differ twice in a row: once may be the turn of a second."""
        ends, before, differed = time.monotonic() + SECONDS_OF_RUNS, first.rows, False
        for _ in range({"random": RUNS_OF_RANDOM - 1, "clock": 2}.get(kind or "", 1)):
            if kind == "clock":
                time.sleep(TICK_SECONDS)
            rows = self.run(database, sql, dialect).rows
            same = same_rows(before, rows, sql, dialect)
            if not same and (differed or kind != "clock"):
                return True
            before, differed = rows, not same
            if time.monotonic() > ends:
                break
        return False

    def _of_result(self, database: Path, sql: str, dialect: str, result: QueryResult) -> Gold:
        rows = result.rows or []
        if not rows:
            return Gold("no_rows", result)
        nulls = all(value is None for row in rows for value in row)
        if nulls or (len(rows) == 1 and all(value in (None, 0) for value in rows[0])):
            return Gold("nothing_found", result)
        try:
            tree = shared_tree(sql, dialect)
        except (ParseError, UserError):
            return Gold(SOUND, result)
        tables, functions = _tables(tree)
        if not tables and not functions:
            return Gold("constant", result)
        for table in tables:
            if self._is_empty(database, dialect, table):
                return Gold("empty_table", result, table[0])
        probe = _past_the_limit(tree, dialect)
        if probe and probe.finds_a_tie(self.run(database, probe.sql, dialect).rows):
            return Gold(ARBITRARY, result)
        return Gold(SOUND, result)

    def _table_is_empty(self, database: Path, dialect: str, table: tuple[str, str]) -> bool:
        name, folder = table
        source = exp.table_(name, db=folder or None, quoted=True)
        query = exp.select(exp.Literal.number(1)).from_(source).limit(1).sql(dialect)
        return self.run(database, query, dialect).rows == []

    def _through_a_view(self, database: Path, sql: str, dialect: str) -> str | None:
        if dialect != "sqlite":
            return None
        text = sql.lower()
        return next((kind for name, kind in self._views(database) if name in text), None)

    def _volatile_views(self, database: Path) -> list[tuple[str, str]]:
        """(name, kind) of the views of a SQLite database that use random numbers or the clock."""
        views = self.run(database, "SELECT name, sql FROM sqlite_master WHERE type = 'view'", "sqlite").rows or []
        found = [(str(name).lower(), volatility(str(sql))) for name, sql in views]
        return [(name, kind) for name, kind in found if kind]


def _tables(tree: exp.Expr) -> tuple[list[tuple[str, str]], bool]:
    """(name, schema or "") of the tables that a query reads, without its common table expressions; and whether it reads a
    table-valued function."""
    nodes = list(tree.find_all(exp.Table, exp.CTE))
    own = {node.alias.lower() for node in nodes if isinstance(node, exp.CTE)}
    tables = [node for node in nodes if isinstance(node, exp.Table)]
    found = [table for table in tables if isinstance(table.this, exp.Identifier)]
    names = [(table.name, table.db) for table in found if table.db or table.name.lower() not in own]
    return list(dict.fromkeys(names)), len(found) < len(tables)


@dataclass(frozen=True)
class _Probe:
    """A query whose rows are those of a gold query with LIMIT, one row more, each followed by its sort keys."""

    sql: str
    keys: int
    cuts: tuple[int, ...]  # a cut is before the row of this number

    def finds_a_tie(self, rows: Sequence[tuple[object, ...]] | None) -> bool:
        for cut in self.cuts:
            if rows and 0 < cut < len(rows) and rows[cut - 1] != rows[cut]:
                before, after = rows[cut - 1], rows[cut]
                if not self.keys or before[-self.keys :] == after[-self.keys :]:
                    return True
        return False


def _past_the_limit(tree: exp.Expr, dialect: str) -> _Probe | None:
    """The probe for a plain SELECT with a numeric LIMIT; None for any other query."""
    limit, offset = tree.args.get("limit"), tree.args.get("offset")
    numbers = [_number(node.expression) if node else 0 for node in (limit, offset)]
    order = tree.args.get("order")
    if not isinstance(tree, exp.Select) or not limit or None in numbers or (order and tree.args.get("distinct")):
        return None
    rows, skipped = (int(number or 0) for number in numbers)
    keys = [_resolved(item.this, tree) for item in (order.expressions if order else [])]
    probe = tree.copy().select(*[key.copy() for key in keys], append=True, copy=False)
    probe = probe.limit(rows + skipped + 1, copy=False)
    probe.set("offset", None)
    return _Probe(probe.sql(dialect), len(keys), (rows + skipped, skipped))


def _number(node: exp.Expr | None) -> int | None:
    return int(node.this) if isinstance(node, exp.Literal) and not node.is_string and node.this.isdigit() else None


def _resolved(key: exp.Expr, tree: exp.Select) -> exp.Expr:
    """The expression behind a sort key that is the number or the alias of a column of the result."""
    number = _number(key)
    if number is not None and 0 < number <= len(tree.expressions):
        return tree.expressions[number - 1].unalias()  # type: ignore[no-any-return]
    if isinstance(key, exp.Column) and not key.table:
        for column in tree.expressions:
            if isinstance(column, exp.Alias) and column.alias.lower() == key.name.lower():
                return column.this  # type: ignore[no-any-return]
    return key


def same_rows(one: Rows | None, other: Rows | None, sql: str, dialect: str) -> bool:
    """Whether two results of one gold query are equal; without a result they are not."""
    if one is None or other is None:
        return False
    return one == other or results_equal(one, other, ordered=gold_is_ordered(sql, dialect), rule="test_suite")


def without_rows(gold: Gold) -> Gold:
    """The same finding without the rows of its result, to be kept for many queries."""
    return replace(gold, result=replace(gold.result, rows=None))
