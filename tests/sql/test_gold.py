"""Gold queries that cannot tell a right answer from a wrong one are recognised."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.sql.engines.base import QueryResult
from finetune.sql.engines.sqlite import SqlSandbox
from finetune.sql.gold import Gold, GoldExaminer
from finetune.sql.volatility import volatility

SCRIPT = """
CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price REAL, made DATE, note TEXT);
INSERT INTO item VALUES (1, 'a', 3, '2020-01-01', NULL), (2, 'b', 3, '2021-01-01', NULL), (3, 'c', 9, '2022-01-01', NULL);
CREATE TABLE sale (item INTEGER, day DATE);
CREATE TABLE "odd name" (x);
CREATE VIEW dear AS SELECT * FROM item WHERE price > 5;
CREATE VIEW age AS SELECT name, date('now') - made AS years FROM item;
CREATE VIEW lottery AS SELECT name FROM item ORDER BY random() LIMIT 1;
"""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gold") / "shop.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript(SCRIPT)
    connection.close()
    return path


class Counting(SqlSandbox):
    """Remembers the queries that it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.queries: list[str] = []

    def run(self, database: Path, sql: str, *limits: Any, **settings: Any) -> QueryResult:
        self.queries.append(sql)
        return super().run(database, sql, *limits, **settings)


@pytest.fixture(scope="module")
def worker() -> Iterator[Counting]:
    with Counting() as sandbox:
        yield sandbox


def examine(worker: Counting, database: Path, sql: str, *, twice: bool = True, seconds: float = 10.0) -> Gold:
    return GoldExaminer(lambda dialect: worker, seconds).examine(database, sql, "sqlite", twice=twice)


@pytest.mark.parametrize(
    ("sql", "kind"),
    [
        ("SELECT name FROM item WHERE price > 5", "sound"),
        ("SELECT COUNT(*) FROM item", "sound"),
        ("SELECT name FROM dear", "sound"),
        ("WITH sale AS (SELECT * FROM item) SELECT name FROM sale", "sound"),
        ("SELECT 0, 1 FROM item WHERE id = 1", "sound"),
        ("SELECT value FROM json_each('[1, 2]')", "sound"),
        # nothing is found
        ("SELECT name FROM item WHERE price > 50", "no_rows"),
        ("SELECT 1 WHERE 1 = 0", "no_rows"),
        ("SELECT item FROM sale", "no_rows"),
        ("SELECT name FROM item INTERSECT SELECT day FROM sale", "no_rows"),
        ("SELECT COUNT(*) FROM item WHERE price > 50", "nothing_found"),
        ("SELECT MAX(day), COUNT(*), TOTAL(item) FROM sale", "nothing_found"),
        ("SELECT AVG(price) FROM item WHERE price > 50", "nothing_found"),
        ("SELECT note FROM item", "nothing_found"),
        ("SELECT EXISTS (SELECT 1 FROM sale)", "nothing_found"),
        # nothing is read
        ("SELECT 1", "constant"),
        ("SELECT 'Paris'", "constant"),
        ("VALUES (1, 2)", "constant"),
        ("WITH w AS (SELECT 1 AS a) SELECT a FROM w", "constant"),
        ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3) SELECT i FROM n", "constant"),
        # an empty table is
        ("SELECT name FROM item WHERE id NOT IN (SELECT item FROM sale)", "empty_table"),
        ("SELECT i.name FROM item AS i LEFT JOIN main.Sale AS s ON s.item = i.id", "empty_table"),
        ("SELECT COUNT(*) + 1 FROM sale", "empty_table"),
        ('SELECT COUNT(*) FROM item, (SELECT COUNT(*) FROM "odd name")', "empty_table"),
        # the clock
        ("SELECT name FROM item WHERE made < date('now')", "clock"),
        ("SELECT name FROM item WHERE made < DATE('NOW', '-1 year')", "clock"),
        ('SELECT name FROM item WHERE made < date("now")', "clock"),
        ("SELECT name FROM item WHERE made < CURRENT_DATE", "clock"),
        ("SELECT name FROM item WHERE made < current_timestamp", "clock"),
        ("SELECT name FROM item WHERE made < date()", "clock"),
        ("SELECT name FROM item WHERE strftime('%Y') > '2000'", "clock"),
        ("SELECT strftime('%Y', datetime(made, 'localtime')) FROM item", "clock"),
        ("SELECT name, years FROM age", "clock"),
        ("SELECT julianday('now')", "unstable"),
        ("SELECT strftime('%f', 'now') FROM item", "unstable"),
        # chance
        ("SELECT name FROM item WHERE random() IS NOT NULL", "random"),
        ("SELECT name FROM item ORDER BY random() LIMIT 1", "unstable"),
        ("SELECT RANDOM()", "unstable"),
        ("SELECT name FROM item WHERE id = abs(random() % 2)", "unstable"),
        ("SELECT hex(randomblob(4)) FROM item", "unstable"),
        ("SELECT name FROM lottery", "unstable"),
        # rows of equal rank
        ("SELECT name FROM item ORDER BY price LIMIT 1", "arbitrary_rows"),
        ("SELECT name AS n, price AS p FROM item ORDER BY p LIMIT 1", "arbitrary_rows"),
        ("SELECT name, price FROM item ORDER BY 2 LIMIT 1", "arbitrary_rows"),
        ("SELECT name FROM item LIMIT 2", "arbitrary_rows"),
        ("SELECT DISTINCT name FROM item LIMIT 1", "arbitrary_rows"),
        ("SELECT name FROM item ORDER BY price DESC LIMIT 1 OFFSET 1", "arbitrary_rows"),
        ("SELECT price FROM item GROUP BY name ORDER BY COUNT(*) DESC LIMIT 3", "sound"),
        ("SELECT name FROM item GROUP BY name ORDER BY COUNT(*) DESC LIMIT 1", "arbitrary_rows"),
        ("SELECT name FROM item ORDER BY price DESC LIMIT 1", "sound"),
        ("SELECT name FROM item ORDER BY price LIMIT 2", "sound"),
        ("SELECT price FROM item ORDER BY price LIMIT 1", "sound"),
        ("SELECT name FROM item LIMIT 3", "sound"),
        # no result
        ("SELECT title FROM item", "failed"),
        ("WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 100001) SELECT x FROM n", "limit"),
        # words in other places
        ("SELECT 'now', \"name\", 'random()' FROM item", "sound"),
        ("SELECT date(made) FROM item", "sound"),
        ("SELECT strftime('%Y', made) AS now FROM item", "sound"),
        ("SELECT name AS random FROM item -- random()", "sound"),
    ],
)
def test_each_kind_of_gold_query_is_recognised(worker: Counting, database: Path, sql: str, kind: str) -> None:
    assert examine(worker, database, sql).kind == kind


def test_a_gold_query_that_takes_too_long_hits_a_limit(worker: Counting, database: Path) -> None:
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT COUNT(*) FROM n"
    gold = examine(worker, database, endless, seconds=0.1)
    assert (gold.kind, gold.detail) == ("limit", "no answer within 0.1 seconds")


def test_a_gold_query_runs_once_unless_it_may_change(worker: Counting, database: Path) -> None:
    for sql, runs in [
        ("SELECT name FROM item WHERE price > 5", 1),
        ("SELECT name FROM item WHERE made < date('now')", 3),
        ("SELECT name FROM item WHERE random() IS NOT NULL", 20),
    ]:
        worker.queries.clear()
        examine(worker, database, sql, twice=False)
        assert worker.queries.count(sql) == runs


@pytest.mark.parametrize(
    ("sql", "dialect", "expected"),
    [
        ("SELECT now()", "postgres", "clock"),
        ("SELECT CURRENT_DATE - 1", "postgres", "clock"),
        ("SELECT gen_random_uuid()", "postgres", "random"),
        *(
            (f"SELECT name FROM t WHERE {call} > made", "postgres", "clock")
            for call in (
                "age(born)",
                "AGE (born::timestamp)",
                "extract(year FROM age(coalesce(born, made)))",
                "localtime",
                "localtimestamp",
                "LOCALTIMESTAMP(0)",
                "clock_timestamp()",
                "transaction_timestamp()",
                "date 'today'",
                "'now'::timestamp",
                "CAST('yesterday' AS date)",
                "current_time",
            )
        ),
        ("SELECT age(timestamp '2020-01-01', born), x.age FROM t AS x", "postgres", None),
        ("WITH age (x) AS (SELECT 1), b AS (SELECT 2) SELECT x FROM age", "postgres", None),
        ("SELECT 'today', name FROM t WHERE kind = 'now' AND age IN (1)", "postgres", None),
        ("SELECT 'today' AS date, name FROM t", "postgres", None),
        ("SELECT age(born) FROM t", "mysql", None),
        *(
            (f"SELECT name FROM t WHERE {call} > made", "mysql", "clock")
            for call in (
                "UNIX_TIMESTAMP()",
                "UTC_TIME",
                "UTC_TIME()",
                "LOCALTIME",
                "LOCALTIME()",
                "LOCALTIMESTAMP()",
                "CURRENT_TIMESTAMP()",
                "CURRENT_TIME(6)",
                "CURRENT_DATE()",
                "SYSDATE()",
                "CURTIME()",
            )
        ),
        ("SELECT UNIX_TIMESTAMP(made) FROM t", "mysql", None),
        ("SELECT SYSDATETIMEOFFSET()", "tsql", "clock"),
        ("SELECT CURDATE(), `now` FROM t", "mysql", "clock"),
        ("SELECT RAND()", "mysql", "random"),
        ("SELECT GETDATE()", "tsql", "clock"),
        ("SELECT TOP 1 [a] FROM t ORDER BY NEWID()", "tsql", "random"),
        ("SELECT SYSDATE FROM dual", "oracle", "clock"),
        ("SELECT date('now')", "duckdb", None),
        ("SELECT now FROM t WHERE random = 'rand()'", "postgres", None),
        ("SELECT 'it''s", "sqlite", None),
    ],
)
def test_the_clock_and_chance_are_found_in_the_text_of_any_dialect(
    sql: str, dialect: str, expected: str | None
) -> None:
    assert volatility(sql, dialect) == expected
