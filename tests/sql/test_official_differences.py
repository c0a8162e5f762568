"""Our side of the table in docs/evaluation.md; the official verdicts there come from a run of the evaluator itself."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from finetune.sql.compare import as_test_suite_runs_it, gold_is_ordered, results_equal
from finetune.sql.difficulty import difficulty
from finetune.sql.engines.registry import open_sessions

CASES = [
    # gold, prediction, our verdict
    ("SELECT a, b*1.0 FROM t", "SELECT a, b FROM t", True),
    ("SELECT a FROM t WHERE b IN (SELECT b FROM t ORDER BY b)", "SELECT a FROM t ORDER BY a", True),
    ("WITH s AS (SELECT a FROM t ORDER BY a LIMIT 3) SELECT a FROM s", "SELECT a FROM t ORDER BY a DESC", True),
    ("SELECT a, row_number() OVER (ORDER BY a) FROM t", "SELECT a, row_number() OVER (ORDER BY a) FROM t ORDER BY a DESC", True),
    ("SELECT a FROM t -- no order by here", "SELECT a FROM t ORDER BY a DESC", True),
    ("SELECT a FROM t WHERE name <> 'order by'", "SELECT a FROM t ORDER BY b DESC", True),
    ("SELECT a FROM t ORDER\nBY a", "SELECT a FROM t ORDER BY a DESC", False),
    ("SELECT a FROM t ORDER  BY a", "SELECT a FROM t ORDER BY a DESC", False),
    ("SELECT a FROM t ORDER/**/BY a", "SELECT a FROM t ORDER BY a DESC", False),
    ("SELECT name FROM odd", "SELECT 'caf'", False),
    ("SELECT 'a > = b'", "SELECT 'a >= b'", True),
    ("SELECT a FROM t WHERE 0", "SELECT a, b FROM t WHERE 0", True),
    ("SELECT '1'", "SELECT 1", False),
    ("SELECT 1", "SELECT 1.0", True),
]  # fmt: skip


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("differences") / "x.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t (a INT, b INT, name TEXT)")
        connection.executemany("INSERT INTO t VALUES (?, ?, ?)", [(10, 1, "x"), (3, 4, "y"), (5, 6, "z")])
        connection.execute("CREATE TABLE odd (name TEXT)")
        connection.execute("INSERT INTO odd VALUES (CAST(x'636166e9' AS TEXT))")
    connection.close()
    return path


def test_our_verdicts_are_those_of_the_table(database: Path) -> None:
    with open_sessions() as session:
        sqlite = session("sqlite")
        for gold, prediction, right in CASES:
            first = sqlite.run(database, as_test_suite_runs_it(gold), 10.0).rows
            second = sqlite.run(database, as_test_suite_runs_it(prediction), 10.0).rows
            assert first is not None and second is not None, (gold, prediction)
            ordered = gold_is_ordered(gold)
            assert results_equal(first, second, ordered=ordered, rule="test_suite") is right, (gold, prediction)


def test_the_one_query_of_spider_with_another_label() -> None:
    sql = "SELECT T1.city FROM city AS T1 JOIN temperature AS T2 ON T1.city_id = T2.city_id WHERE {}"
    assert difficulty(sql.format("T2.Mar < T2.Jul OR T2.Mar > T2.Oct")) == "hard"
    assert difficulty(sql.format("T2.Mar < 3")) == "medium", "officially it has this label: the OR is lost"
