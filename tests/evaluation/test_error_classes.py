"""Error classes, each from what SQLite really says about a real schema, or from real rows."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.data.records import Record
from finetune.evaluation.error_classes import ERROR_CLASSES, as_error_class
from finetune.evaluation.generators.base import Answer
from finetune.evaluation.judge import Judge
from finetune.evaluation.score import Row, score
from finetune.sql.compare import RULES, Rule
from finetune.sql.engines.sqlite import SqlSandbox, ddl_of_database

SCHEMA = """
CREATE TABLE singer (singer_id INTEGER PRIMARY KEY, name TEXT, age INTEGER, "Net Worth" REAL);
CREATE TABLE concert (concert_id INTEGER PRIMARY KEY, title TEXT, year INTEGER, singer_id INTEGER REFERENCES singer(singer_id));
INSERT INTO singer VALUES (1, 'Ann', 30, 1.5), (2, 'Bob', 40, 2.5), (3, 'Cid', 30, 3.5);
INSERT INTO concert VALUES (1, 'Rock', 2014, 1), (2, 'Folk', 2015, 2), (3, 'Rock', 2015, 1);
"""
ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT COUNT(*) FROM n"
HUGE = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 100001) SELECT x FROM n"
NAMES = "SELECT name FROM singer"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("databases") / "concerts.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript(SCHEMA)
    connection.close()
    return path


@pytest.fixture(scope="module")
def ask(database: Path) -> Iterator[Any]:
    schema = ddl_of_database(database)
    with SqlSandbox() as sandbox:

        def row(gold: str, answer: Answer | str, *, rule: Rule = "test_suite", schema: str = schema) -> Row:
            judge = Judge(lambda _: sandbox, rule=rule, timeout_seconds=0.3 if answer == ENDLESS else 10.0)
            given = Answer(answer, 3) if isinstance(answer, str) else answer
            return judge.row(Record("q", "concerts", "?", gold, schema), database, "prompt", given)

        yield row


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        (NAMES, NAMES, None),
        # it does not run
        (NAMES, "I do not know.", "syntax_error"),
        (NAMES, "SELECT name FORM singer", "syntax_error"),
        (NAMES, "SELECT name FROM", "syntax_error"),
        (NAMES, "SELECT 'name FROM singer", "syntax_error"),
        (NAMES, "SELECT name FROM singers", "no_such_table"),
        (NAMES, "SELECT s.name FROM singers AS s", "no_such_table"),
        (NAMES, "SELECT title FROM singer", "column_of_another_table"),
        (NAMES, "SELECT TITLE FROM singer", "column_of_another_table"),
        (NAMES, "SELECT T1.year FROM singer AS T1 JOIN concert AS T2 ON T1.singer_id = T2.singer_id", "column_of_another_table"),
        (NAMES, "SELECT concert.title FROM singer", "column_of_another_table"),
        (NAMES, "SELECT name FROM singer JOIN concert USING (age)", "column_of_another_table"),
        (NAMES, "SELECT `Net Worth` FROM concert", "column_of_another_table"),
        (NAMES, "SELECT T1.`Net Worth` FROM concert AS T1", "column_of_another_table"),
        (NAMES, "SELECT nmae FROM singer", "no_such_column"),
        (NAMES, "SELECT T1.nmae FROM singer AS T1", "no_such_column"),
        (NAMES, "SELECT T1.`first.name` FROM singer AS T1", "no_such_column"),
        (NAMES, "SELECT main.singer.title FROM singer", "column_of_another_table"),
        (NAMES, "SELECT `first.name` FROM singer", "no_such_column"),
        (NAMES, "SELECT name FROM singer JOIN concert USING (nmae)", "no_such_column"),
        (NAMES, "SELECT T3.name FROM singer AS T1", "no_such_alias"),
        (NAMES, "SELECT concert.name FROM singer", "no_such_alias"),
        (NAMES, "SELECT singer_id FROM singer JOIN concert", "ambiguous_column"),
        (NAMES, "SELECT YEAR(name) FROM singer", "no_such_function"),
        (NAMES, "SELECT abs(1, 2) FROM singer", "no_such_function"),
        (NAMES, "SELECT name FROM singer WHERE COUNT(*) > 1", "other_sql_error"),
        (NAMES, "SELECT name FROM singer UNION SELECT 1, 2", "other_sql_error"),
        # there is nothing to run
        (NAMES, "", "no_sql"),
        (NAMES, Answer("", 0, "too_long"), "too_long"),
        (NAMES, Answer("", 0, "out_of_memory"), "out_of_memory"),
        (NAMES, Answer("", 0, "failed"), "failed"),
        (NAMES, "DELETE FROM singer", "forbidden"),
        # it runs into a limit
        (NAMES, ENDLESS, "timeout"),
        (NAMES, HUGE, "too_large"),
        # its rows are others
        (NAMES, "SELECT name FROM singer WHERE age > 99", "empty_result"),
        ("SELECT name FROM singer WHERE age > 99", NAMES, "wrong_rows"),
        (NAMES, "SELECT name FROM singer WHERE age = 30", "wrong_rows"),
        (NAMES, "SELECT age FROM singer", "wrong_rows"),
        (NAMES, "SELECT name, age FROM singer", "wrong_columns"),
        ("SELECT name, age FROM singer", NAMES, "wrong_columns"),
        ("SELECT name, age FROM singer", "SELECT name, singer_id FROM singer", "wrong_columns"),
        ("SELECT name, age FROM singer", "SELECT age, singer_id FROM singer", "wrong_columns"),
        ("SELECT name, age FROM singer", "SELECT name, age FROM singer WHERE age = 30", "wrong_rows"),
        ("SELECT title, year FROM concert", "SELECT title, 2014 FROM concert WHERE year = 2015", "wrong_rows"),
        (f"{NAMES} ORDER BY name", f"{NAMES} ORDER BY name DESC", "wrong_order"),
        ("SELECT name, age FROM singer ORDER BY name", "SELECT age, name FROM singer ORDER BY name DESC", "wrong_order"),
        (f"{NAMES} ORDER BY name LIMIT 2", f"{NAMES} ORDER BY name DESC LIMIT 2", "wrong_rows"),
        # gold
        ("SELECT nmae FROM singer", NAMES, "gold_failed"),
        (HUGE, NAMES, "gold_limit"),
        (f"{NAMES} ORDER BY random()", NAMES, "gold_unstable"),
    ],
)  # fmt: skip
def test_each_class(ask: Any, gold: str, answer: Any, expected: str | None) -> None:
    row = ask(gold, answer)
    assert row.error_class == expected, (row.verdict, row.error)
    assert (row.error_class is None) == (row.verdict == "correct")


@pytest.mark.parametrize(
    ("rule", "gold", "answer", "expected"),
    [
        ("strict", "SELECT name, age FROM singer", "SELECT age, name FROM singer", "wrong_columns"),
        ("strict", "SELECT name, age FROM singer ORDER BY name", "SELECT age, name FROM singer", "wrong_columns"),
        ("strict", f"{NAMES} ORDER BY name", f"{NAMES} ORDER BY name DESC", "wrong_order"),
        ("bird_set", "SELECT name, age FROM singer ORDER BY name", "SELECT age, name FROM singer", "wrong_columns"),
        ("bird_set", "SELECT age FROM singer", "SELECT DISTINCT singer_id FROM singer", "wrong_rows"),
        ("test_suite_no_distinct", "SELECT DISTINCT age FROM singer", "SELECT age FROM concert", "column_of_another_table"),
    ],
)  # fmt: skip
def test_the_class_is_that_under_the_chosen_rule(ask: Any, rule: Rule, gold: str, answer: str, expected: str) -> None:
    assert ask(gold, answer, rule=rule).error_class == expected


@pytest.mark.parametrize("schema", ["", "no DDL", "CREATE TABLE other (x)"])
def test_a_schema_that_does_not_show_the_column_makes_it_no_such_column(ask: Any, schema: str) -> None:
    assert ask(NAMES, "SELECT title FROM singer", schema=schema).error_class == "no_such_column"


def test_every_class_has_its_advice_and_every_verdict_a_class() -> None:
    assert all(found.title and found.advice.endswith(".") for found in ERROR_CLASSES.values())
    verdicts = ["timeout", "too_large", "forbidden", "crashed", "no_sql", "too_long", "out_of_memory", "failed"]
    verdicts += ["gold_failed", "gold_limit", "gold_unstable"]
    assert set(verdicts) <= set(ERROR_CLASSES)
    assert [as_error_class(verdict, None) for verdict in verdicts] == verdicts
    assert [as_error_class(verdict, None) for verdict in ("correct", "sql_error", "wrong_rows")] == [
        None,
        "unknown",
        "unknown",
    ]


def test_eval_json_counts_the_classes_the_most_frequent_first(ask: Any) -> None:
    rows = [ask(NAMES, answer) for answer in ("SELECT title FROM singer", "", "SELECT year FROM singer", NAMES)]
    found = score(rows)
    assert list(found["error_classes"].items()) == [("column_of_another_table", 2), ("no_sql", 1)]
    assert sum(found["error_classes"].values()) == found["questions"] - found["correct"]
    assert json.loads(json.dumps(found)) == found and len(RULES) == 4
