"""The rows that are kept with each answer: few, small, telling, and without effect on a verdict."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from finetune.data.records import Record
from finetune.evaluation.generators.base import Answer
from finetune.evaluation.judge import Judge
from finetune.evaluation.judging import judging
from finetune.evaluation.result_sample import (
    MOST_BYTES,
    MOST_CHARACTERS,
    MOST_COLUMNS,
    MOST_ROWS,
    samples,
)
from finetune.evaluation.score import Row
from finetune.sql.engines.base import QueryResult, SqlValue
from finetune.sql.engines.sqlite import SqlSandbox
from tests.helpers.data_examples import make_database, row
from tests.helpers.judged_questions import of_shop


def result(*rows: tuple[SqlValue, ...], columns: tuple[str, ...] = ("a",)) -> QueryResult:
    return QueryResult(list(rows), columns, None, None, 0.0)


FAILED = QueryResult(None, (), "no such table: x", "sql_error", 0.0)


def test_a_small_result_is_kept_whole() -> None:
    gold, found = samples(result((1,), (None,)), result(("x",), columns=("name",)))
    assert gold == {"columns": ["a"], "width": 1, "rows": [[1], [None]], "first": 0, "total": 2}
    assert found == {"columns": ["name"], "width": 1, "rows": [["x"]], "first": 0, "total": 1}


def test_a_query_without_rows_to_show_has_no_sample() -> None:
    assert samples(FAILED, None) == (None, None)
    assert samples(result(), FAILED)[0] == {"columns": ["a"], "width": 1, "rows": [], "first": 0, "total": 0}


def test_any_result_becomes_small_json() -> None:
    wide = tuple(f"column {number} " + "n" * 500 for number in range(100))
    evil: tuple[SqlValue, ...] = (
        "\x00" * 5000,
        b"\xff" * 5000,
        float("inf"),
        float("nan"),
        2**63 - 1,
        "ü" * 5000,
        *["x" * 5000] * 94,
    )
    sample, _ = samples(result(*[evil] * 1000, columns=wide), None)
    text = json.dumps(sample, allow_nan=False, ensure_ascii=False)
    assert sample is not None and sample["total"] == 1000 and sample["width"] == 100
    assert len(sample["columns"]) == MOST_COLUMNS and all(len(name) <= MOST_CHARACTERS for name in sample["columns"])
    assert sample["rows"][0][:5] == [
        sample["rows"][0][0],
        {"blob": "f" * 79 + "…"},
        {"number": "inf"},
        {"number": "nan"},
        2**63 - 1,
    ]
    assert len(text.encode()) < 3 * MOST_BYTES


def test_many_rows_are_cut_to_the_limits() -> None:
    sample, _ = samples(result(*[(number,) for number in range(500)]), None)
    assert sample is not None and sample["rows"] == [[number] for number in range(MOST_ROWS)] and sample["total"] == 500
    sample, _ = samples(result(*[("x" * 70,) * 12] * 10), None)
    assert sample is not None and 1 <= len(sample["rows"]) < MOST_ROWS
    assert len(json.dumps(sample["rows"])) <= MOST_BYTES + 100


def test_a_difference_far_down_is_in_the_sample() -> None:
    rows = [(number,) for number in range(100)]
    gold, found = samples(result(*rows), result(*rows[:40], (-1,), *rows[41:]))
    assert gold is not None and found is not None
    assert gold["first"] == found["first"] == 38
    assert gold["rows"][2] == [40] and found["rows"][2] == [-1]
    gold, found = samples(result(*rows), result(*rows[:50]))
    assert gold is not None and found is not None and gold["first"] == 48 and found["rows"] == [[48], [49]]
    assert samples(result(*rows), result(*rows))[0] == samples(result(*rows), None)[0], (
        "equal results begin at the first row"
    )


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("databases")
    return make_database(folder, items=40)


def record(sql: str) -> Record:
    return Record(**row(0, sql=sql))


def test_a_judge_keeps_the_rows_of_both_queries(shop: Path) -> None:
    with SqlSandbox() as sandbox:
        judge = Judge(lambda dialect: sandbox, rule="test_suite", timeout_seconds=10)
        gold = record("SELECT id, name FROM item ORDER BY id")
        outcome = judge.outcome(gold, shop, Answer("SELECT name FROM item WHERE id = 3", 5))
        assert outcome.verdict == "wrong_rows"
        assert outcome.gold_sample is not None and outcome.gold_sample["total"] == 40
        assert outcome.gold_sample["columns"] == ["id", "name"] and len(outcome.gold_sample["rows"]) == MOST_ROWS
        assert outcome.result_sample is not None and outcome.result_sample["total"] == 1
        wrong = judge.outcome(gold, shop, Answer("SELECT nothing FROM item", 5))
        assert wrong.result_sample is None and wrong.gold_sample == outcome.gold_sample
        failed = judge.outcome(record("SELECT x FROM nowhere"), shop, Answer("SELECT 1", 5))
        assert (failed.verdict, failed.gold_sample, failed.result_sample) == ("gold_failed", None, None)


def test_processes_that_judge_keep_the_same_rows(shop: Path) -> None:
    queries = [f"SELECT id, name, price FROM item WHERE id > {number}" for number in range(4)]
    questions = of_shop(shop, queries)
    found = []
    for workers in (0, 2):
        with judging(questions, workers) as judged:
            for number in range(4):
                judged.submit("tuned", number, Answer("SELECT name FROM item", 3))
            found.append([(each.gold_sample, each.result_sample) for each in judged.rows("tuned")])
    assert found[0] == found[1] and all(gold and own for gold, own in found[0])


def test_a_row_of_an_earlier_version_has_no_sample() -> None:
    named = {field.name: field for field in fields(Row)}
    assert named["gold_sample"].default is None and named["result_sample"].default is None
