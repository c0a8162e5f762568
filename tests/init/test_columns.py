"""Which column is which, under the names and orders that data sets use, and when nobody can tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from finetune.init.columns import map_columns, plain
from finetune.init.rows import Rows, read_rows
from tests.helpers.errors import raises
from tests.init.conftest import as_csv, questions

SQL = [
    "SELECT name FROM author",
    "select count(*) from book where year > 1990;",
    "WITH t AS (SELECT 1 AS a) SELECT a FROM t",
]
QUESTION = ["Who are the authors?", "How many books are newer than 1990?", "Show one."]
SCHEMA = ["CREATE TABLE author (id INT, name TEXT)"] * 3


def table(**columns: Sequence[Any]) -> Rows:
    names = list(columns)
    rows = [dict(zip(names, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    return Rows(Path("pairs.csv"), names, rows, [f"pairs.csv:{n}" for n in range(2, 2 + len(rows))])


@pytest.mark.parametrize(
    ("question", "sql"),
    [("question", "sql"), ("question", "query"), ("query", "sql"), ("prompt", "completion"), ("instruction", "output"),
     ("input", "response"), ("frage", "abfrage"), ("query", "answer"), ("a", "b"), ("sql", "question")],
)  # fmt: skip
def test_question_and_sql_are_told_by_their_content(question: str, sql: str) -> None:
    for names in ((question, sql), (sql, question)):
        columns = {name: QUESTION if name == question else SQL for name in names}
        assert map_columns(table(**columns), None).columns == {"question": question, "sql": sql}


def test_the_other_fields_are_found_too_and_the_rest_is_named() -> None:
    found = map_columns(
        table(
            nr=[1, 2, 3], db_name=["shop"] * 3, sql_context=SCHEMA, utterance=QUESTION, goldSQL=SQL, hint=["a b", "", "c d"],
            split=["train", "dev", "test"], difficulty=["easy", "hard", "easy"], question_id=[7, 8, 9],
        ),
        None,
    )  # fmt: skip
    assert found.columns == {
        "sql": "goldSQL", "schema": "sql_context", "question": "utterance", "evidence": "hint", "db_id": "db_name",
        "split": "split", "id": "question_id",
    }  # fmt: skip
    assert "not used: 'nr', 'difficulty'" in found.why and "--column" in found.why


def test_the_more_telling_name_decides_between_two() -> None:
    assert map_columns(table(answer=SQL, sql=SQL, text=QUESTION, question=QUESTION), None).columns == {
        "sql": "sql",
        "question": "question",
    }


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"gold_a": SQL, "gold_b": SQL, "question": QUESTION}, "'gold_a' and 'gold_b' could each be the SQL"),
        ({"sql": SQL, "one": QUESTION, "two": QUESTION}, "'one' and 'two' could each be the question"),
        ({"question": QUESTION, "gold": ["", "", ""]}, "no column reads as SQL.*'gold' .empty"),
        ({"question": QUESTION, "sql": QUESTION}, "no column reads as SQL"),
        ({"question": ["a", "b", "c"], "sql": SQL}, "no column reads as a question.*'question' .neither prose nor SQL"),
        ({"sql": ["Select the names from the list."] * 3, "question": QUESTION}, "no column reads as SQL"),
    ],
)
def test_what_cannot_be_told_is_asked_for(columns: dict[str, list[str]], why: str) -> None:
    with raises("init.which_column", match=why):
        map_columns(table(**columns), None)


def test_what_is_typed_wins_and_is_checked() -> None:
    both = table(gold_a=SQL, gold_b=SQL, question=QUESTION)
    assert map_columns(both, None, ["sql=gold_b"]).columns["sql"] == "gold_b"
    for wrong in ("sql=none", "sql", "answer=gold_a"):
        with raises("init.bad_column", match=wrong):
            map_columns(both, None, [wrong])


def test_sql_that_does_not_parse_is_still_the_sql() -> None:
    broken = ["SELECT name FROM", "SELECT FROM WHERE a", "SELECT a, FROM t"]
    assert map_columns(table(query=broken, question=QUESTION), None).columns["sql"] == "query"


@pytest.mark.parametrize(
    ("dialect", "sql"),
    [
        ("sqlite", "SELECT a FROM t WHERE b GLOB 'x*'"),
        ("postgres", "SELECT a::text FROM t WHERE b ILIKE 'x%' AND c @> '{1}'"),
        ("mysql", "SELECT GROUP_CONCAT(a SEPARATOR ', ') FROM `t`"),
    ],
)
def test_the_dialect_is_the_first_in_which_it_parses(dialect: str, sql: str) -> None:
    assert map_columns(table(question=QUESTION, sql=[sql] * 3), None).dialect == dialect


def test_a_dialect_that_is_known_is_kept() -> None:
    assert map_columns(table(question=QUESTION, sql=SQL), "postgres").dialect == "postgres"


def test_names_are_compared_without_their_writing() -> None:
    assert {plain(name) for name in ("gold_sql", "goldSQL", "Gold SQL", "gold-sql ")} == {"gold sql"}


def test_a_file_without_a_header_does_not_lose_its_first_pair(file: Callable[..., Path]) -> None:
    text = as_csv(questions(20)).partition("\n")[2]
    with raises("init.no_header", match="the first line is a pair"):
        map_columns(read_rows(file("pairs.csv", text)), None)
