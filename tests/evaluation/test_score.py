"""The verdict on one answer, and the scores computed from many verdicts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.records import Record
from finetune.evaluation.generators.base import Answer
from finetune.evaluation.judge import Judge, score_answer
from finetune.evaluation.score import Row, as_dict, score
from finetune.evaluation.statistics import wilson_interval
from finetune.sql.compare import RULES, Rule
from finetune.sql.engines.sqlite import SqlSandbox
from tests.helpers.data_examples import make_database, row
from tests.helpers.executed import executed

ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT COUNT(*) FROM n"
HUGE = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 100001) SELECT x FROM n"
VERDICTS = ("correct", "wrong_rows", "sql_error", "no_sql", "timeout", "forbidden", "gold_failed")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Items 0 to 5, named `item 0`..., at 0, 1.5, ... 7.5 euros."""
    return make_database(tmp_path_factory.mktemp("shop"), items=6)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[SqlSandbox]:
    with SqlSandbox() as worker:
        yield worker


@pytest.fixture
def ask(database: Path, sandbox: SqlSandbox) -> Any:
    """ask(gold, answer, ...) -> the scored row."""

    def scored_row(gold: str, answer: str, *, rule: Rule = "test_suite", seconds: float = 10.0) -> Row:
        record = Record(**row(1, sql=gold))
        return score_answer(
            record, database, "the prompt", answer, 7, sandbox=sandbox, rule=rule, timeout_seconds=seconds
        )

    return scored_row


def made(verdict: str, number: int = 0, *, level: str = "easy", db_id: str = "shop", tokens: int = 5) -> Row:
    return Row(
        id=f"q{number}", db_id=db_id, question="?", difficulty=level, gold="SELECT 1", prediction="SELECT 1", answer="",
        verdict=verdict, error=None, seconds=0.0, new_tokens=tokens, double_quoted_text=False, prompt_sha256="",
        gold_sha256="",
    )  # fmt: skip


# one answer


@pytest.mark.parametrize(
    ("gold", "answer", "verdict", "error"),
    [
        ("SELECT name FROM item WHERE id = 1", "SELECT name FROM item WHERE price = 1.5;", "correct", None),
        ("SELECT name FROM item WHERE id = 1", "```sql\nSELECT 'item 1'\n```", "correct", None),
        ("SELECT name FROM item WHERE id = 1", "SELECT name FROM item", "wrong_rows", None),
        ("SELECT name FROM item WHERE id = 99", "SELECT id FROM item WHERE id = 98", "correct", None),
        ("SELECT name FROM item", "SELECT title FROM item", "sql_error", "no such column: title"),
        ("SELECT name FROM item", "I do not know.", "sql_error", 'near "I": syntax error'),
        ("SELECT name FROM item", "", "no_sql", None),
        ("SELECT name FROM item", " \n;\n", "no_sql", None),
        ("SELECT name FROM item", "DELETE FROM item", "forbidden", "DELETE is not allowed: a query may only read"),
        ("SELECT name FROM item", HUGE, "too_large", "the result has more than 100,000 rows"),
        ("SELECT title FROM item", "SELECT name FROM item", "gold_failed", "no such column: title"),
    ],
)
def test_every_kind_of_answer_has_its_verdict(
    ask: Any, gold: str, answer: str, verdict: str, error: str | None
) -> None:
    scored_row = ask(gold, answer)
    assert (scored_row.verdict, scored_row.error) == (verdict, error)


def test_an_endless_query_ends_at_the_timeout_and_leaves_the_next_one_its_time(ask: Any) -> None:
    scored_row = ask("SELECT COUNT(*) FROM item", ENDLESS, seconds=0.2)
    assert (scored_row.verdict, scored_row.error) == ("timeout", "no answer within 0.2 seconds")
    assert 0.2 <= scored_row.seconds < 5
    assert ask("SELECT COUNT(*) FROM item", "SELECT 6").verdict == "correct"


def test_a_scored_row_says_what_was_asked_and_answered(ask: Any) -> None:
    scored_row = ask("SELECT name FROM item WHERE id = 1", "Sure:\nSELECT name\nFROM item;\nThat is all.")
    asked = row(1)
    assert (scored_row.id, scored_row.db_id, scored_row.question) == (asked["id"], asked["db_id"], asked["question"])
    assert scored_row.gold == "SELECT name FROM item WHERE id = 1" and scored_row.difficulty == "easy"
    assert scored_row.answer == "Sure:\nSELECT name\nFROM item;\nThat is all."
    assert scored_row.prediction == "SELECT name FROM item"
    assert scored_row.new_tokens == 7
    assert scored_row.prompt_sha256 == hashlib.sha256(b"the prompt").hexdigest()
    assert scored_row.gold_sha256 == hashlib.sha256(scored_row.gold.encode()).hexdigest()
    assert Row(**as_dict(scored_row)) == scored_row


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        ("SELECT id FROM item ORDER BY id", "SELECT id FROM item ORDER BY id DESC", "wrong_rows"),
        ("SELECT id FROM item ORDER BY id", "SELECT id FROM item ORDER BY price", "correct"),
        ("SELECT id FROM item", "SELECT id FROM item ORDER BY id DESC", "correct"),
        (
            "SELECT id FROM item WHERE id IN (SELECT id FROM item ORDER BY id LIMIT 3)",
            "SELECT id FROM item WHERE id < 3 ORDER BY id DESC",
            "correct",
        ),
    ],
)
def test_the_order_of_rows_counts_where_gold_orders_them(ask: Any, gold: str, answer: str, verdict: str) -> None:
    assert ask(gold, answer).verdict == verdict


@pytest.mark.parametrize(
    ("gold", "answer", "right_under"),
    [
        ("SELECT id, name FROM item", "SELECT name, id FROM item", {"test_suite"}),
        ("SELECT id FROM item", "SELECT id FROM item UNION ALL SELECT 1", {"bird_set"}),
        ("SELECT id FROM item ORDER BY id", "SELECT id FROM item ORDER BY id DESC", {"bird_set"}),
        ("SELECT id FROM item", "SELECT id FROM item", {"test_suite", "bird_set", "strict"}),
    ],
)
def test_the_rule_decides_when_rows_are_equal(ask: Any, gold: str, answer: str, right_under: set[str]) -> None:
    rules: tuple[Rule, ...] = ("test_suite", "bird_set", "strict")  # the fourth is tested below
    assert {rule for rule in rules if ask(gold, answer, rule=rule).verdict == "correct"} == right_under


TORN = "SELECT id FROM item WHERE price > = 3"
WHOLE = "SELECT id FROM item WHERE price >= 3"


@pytest.mark.parametrize(
    ("gold", "answer", "rule", "verdict"),
    [
        (WHOLE, TORN, "test_suite", "correct"),
        (TORN, WHOLE, "test_suite", "correct"),
        (WHOLE, TORN, "strict", "sql_error"),
        (TORN, WHOLE, "bird_set", "gold_failed"),
    ],
)
def test_under_test_suite_both_queries_run_as_the_official_evaluator_runs_them(
    ask: Any, gold: str, answer: str, rule: Rule, verdict: str
) -> None:
    scored_row = ask(gold, answer, rule=rule)
    assert scored_row.verdict == verdict
    assert (scored_row.gold, scored_row.prediction) == (gold, answer)  # the row keeps what was written


@pytest.mark.parametrize(
    ("answer", "quoted"),
    [
        ('SELECT "nmae" FROM item', True),
        ('SELECT "name" FROM item', False),
        ("SELECT 'nmae' FROM item", False),
        ("SELECT name FROM item", False),
    ],
)
def test_a_misspelt_name_that_sqlite_takes_for_text_is_marked(ask: Any, answer: str, quoted: bool) -> None:
    assert ask("SELECT name FROM item", answer).double_quoted_text is quoted


# every rule, and what gold is worth


CLOCK = "SELECT name FROM item WHERE price < 9 AND date('now') > '2000'"


def test_every_row_has_the_verdict_of_every_rule(ask: Any) -> None:
    found = ask("SELECT DISTINCT id FROM item", "SELECT id FROM item UNION ALL SELECT 1", rule="bird_set")
    assert found.verdict == "correct"
    assert found.verdicts == {
        "test_suite": "wrong_rows", "test_suite_no_distinct": "wrong_rows", "bird_set": "correct", "strict": "wrong_rows",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("gold", "answer", "right_under"),
    [
        ("SELECT DISTINCT price > 2 FROM item", "SELECT price > 2 FROM item", {"test_suite_no_distinct", "bird_set"}),
        ("SELECT price > 2 FROM item", "SELECT DISTINCT price > 2 FROM item", {"test_suite_no_distinct", "bird_set"}),
        ("SELECT COUNT(DISTINCT price > 2) FROM item", "SELECT COUNT(price > 2) FROM item", {"test_suite_no_distinct"}),
        ("SELECT id, name FROM item", "SELECT name, id FROM item", {"test_suite", "test_suite_no_distinct"}),
        ("SELECT id FROM item WHERE price >= 3", "SELECT id FROM item WHERE price > = 3",
         {"test_suite", "test_suite_no_distinct"}),
        ("SELECT id FROM item", "", set()),
        ("SELECT title FROM item", "SELECT id FROM item", set()),
    ],
)  # fmt: skip
def test_one_answer_is_judged_under_all_rules_at_once(ask: Any, gold: str, answer: str, right_under: set[str]) -> None:
    found = ask(gold, answer)
    assert {rule for rule, verdict in found.verdicts.items() if verdict == "correct"} == right_under
    assert set(found.verdicts) == set(RULES)


@pytest.mark.parametrize(
    ("gold", "answer", "verdict", "kind"),
    [
        (HUGE, "SELECT 1", "gold_limit", "limit"),
        (HUGE, "", "gold_limit", "limit"),
        ("SELECT title FROM item", "", "gold_failed", "failed"),
        ("SELECT name FROM item ORDER BY random()", "SELECT name FROM item", "gold_unstable", "unstable"),
        ("SELECT name FROM item WHERE id > 9", "SELECT 1 WHERE 1 = 0", "correct", "no_rows"),
        ("SELECT COUNT(*) FROM item WHERE id > 9", "SELECT 0", "correct", "nothing_found"),
        (CLOCK, CLOCK, "correct", "clock"),
        ("SELECT name FROM item WHERE random() IS NOT NULL", "SELECT name FROM item", "correct", "random"),
        ("SELECT name FROM item WHERE id = 1", "SELECT name FROM item", "wrong_rows", "sound"),
    ],
)
def test_a_row_says_what_its_gold_query_is_worth(ask: Any, gold: str, answer: str, verdict: str, kind: str) -> None:
    found = ask(gold, answer)
    assert (found.verdict, found.gold_kind) == (verdict, kind)
    assert (found.error is not None) == verdict.startswith("gold_")


def test_a_gold_query_that_ends_at_the_time_limit_is_no_wrong_answer(ask: Any) -> None:
    found = ask(ENDLESS, "SELECT 1", seconds=0.1)
    assert (found.verdict, found.error) == ("gold_limit", "no answer within 0.1 seconds")


def test_a_gold_query_runs_once_for_all_answers_and_beside_each_one_if_it_reads_the_clock(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = executed(monkeypatch)
    with SqlSandbox() as sandbox:
        judge = Judge(lambda dialect: sandbox, rule="test_suite", timeout_seconds=10.0)
        for gold, runs in [("SELECT name FROM item WHERE price < 9", 1), (CLOCK, 3 + 4)]:
            ran.clear()
            for question in range(2):
                for answer in ("SELECT 1", "SELECT name FROM item"):
                    judge.row(Record(**row(question, sql=gold)), database, "prompt", Answer(answer, 1))
            assert ran.count(gold) == runs


def test_scores_are_split_by_kind_of_gold_and_given_under_every_rule() -> None:
    rows = [
        replace(made("correct", 1), verdicts={"test_suite": "correct", "strict": "wrong_rows"}),
        replace(made("wrong_rows", 2), verdicts={"test_suite": "wrong_rows", "strict": "wrong_rows"}),
        replace(made("correct", 3), gold_kind="no_rows", verdicts={"test_suite": "correct", "strict": "correct"}),
        replace(
            made("correct", 4), gold_kind="arbitrary_rows", verdicts={"test_suite": "correct", "strict": "correct"}
        ),
        replace(
            made("gold_limit", 5), gold_kind="limit", verdicts={"test_suite": "gold_limit", "strict": "gold_limit"}
        ),
    ]
    found = score(rows)
    assert (found["correct"], found["questions"]) == (3, 5)
    assert found["by_gold"]["no_rows"] == {"correct": 1, "questions": 1}
    apart = found["without_hollow"]
    assert (apart["correct"], apart["questions"], apart["execution_accuracy"]) == (2, 3, 2 / 3)
    assert apart["execution_accuracy_interval95"] == list(wilson_interval(2, 3))
    assert {rule: scores["correct"] for rule, scores in found["rules"].items()} == {"test_suite": 3, "strict": 2}
    assert score(rows[2:3])["without_hollow"]["execution_accuracy"] is None


# many answers


ROWS = st.lists(
    st.builds(
        made,
        st.sampled_from(VERDICTS),
        level=st.sampled_from(["easy", "medium", "hard", "extra"]),
        db_id=st.sampled_from(["shop", "school", "port"]),
        tokens=st.integers(0, 50),
    ),
    min_size=1,
    max_size=40,
)


@given(ROWS)
def test_tallies_add_up(rows: list[Row]) -> None:
    scored = score(rows)
    right = sum(row.verdict == "correct" for row in rows)
    ran = sum(row.verdict in ("correct", "wrong_rows") for row in rows)
    assert (scored["questions"], scored["correct"]) == (len(rows), right)
    assert scored["execution_accuracy"] == right / len(rows)
    assert scored["valid_sql_rate"] == ran / len(rows) >= scored["execution_accuracy"]
    assert scored["new_tokens"] == sum(row.new_tokens for row in rows)
    assert sum(scored["verdicts"].values()) == len(rows)
    assert scored["verdicts"].get("correct", 0) == right
    for key in ("by_difficulty", "by_database"):
        assert sum(group["questions"] for group in scored[key].values()) == len(rows)
        assert sum(group["correct"] for group in scored[key].values()) == right
        assert all(0 <= group["correct"] <= group["questions"] > 0 for group in scored[key].values())
    low, high = scored["execution_accuracy_interval95"]
    assert (low, high) == wilson_interval(right, len(rows))


def test_a_score_counts_each_group_by_itself() -> None:
    rows = [
        made("correct", 1, level="easy", db_id="shop"),
        made("wrong_rows", 2, level="easy", db_id="school"),
        made("sql_error", 3, level="hard", db_id="school"),
        made("correct", 4, level="hard", db_id="school"),
        made("no_sql", 5, level="hard", db_id="school"),
    ]
    scored = score(rows)
    assert (scored["execution_accuracy"], scored["valid_sql_rate"]) == (0.4, 0.6)
    assert scored["by_difficulty"] == {
        "easy": {"correct": 1, "questions": 2},
        "hard": {"correct": 1, "questions": 3},
    }
    assert scored["by_database"] == {
        "school": {"correct": 1, "questions": 4},
        "shop": {"correct": 1, "questions": 1},
    }
    assert scored["verdicts"] == {"correct": 2, "no_sql": 1, "sql_error": 1, "wrong_rows": 1}


# the interval of a proportion


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3 (score without continuity correction)
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_the_published_one(successes: int, trials: int, low: float, high: float) -> None:
    assert [round(bound, 4) for bound in wilson_interval(successes, trials)] == [low, high]


COUNTS = st.integers(1, 2000).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials)))


@given(COUNTS)
def test_the_bounds_are_the_shares_that_the_count_is_just_compatible_with(counts: tuple[int, int]) -> None:
    successes, trials = counts
    share = successes / trials
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):
        # A true share at the bound would lie 1.959964 standard errors of itself away (Wilson 1927).
        distance = 1.959964 * math.sqrt(bound * (1 - bound) / trials)
        assert abs(share - bound) == pytest.approx(distance, abs=1e-7)


@given(COUNTS)
def test_the_interval_is_the_same_seen_from_the_failures(counts: tuple[int, int]) -> None:
    successes, trials = counts
    low, high = wilson_interval(successes, trials)
    assert wilson_interval(trials - successes, trials) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_more_questions_make_it_narrower_and_none_leave_it_open() -> None:
    widths = [high - low for low, high in (wilson_interval(n // 2, n) for n in (2, 10, 100, 1000))]
    assert widths == sorted(widths, reverse=True)
    assert wilson_interval(0, 0) == (0.0, 1.0)
