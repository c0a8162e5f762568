"""Two lists of verdicts on the same questions: what is counted, tested and bounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.evaluation.paired import difference, differences_by_rule, error_class, gain, gains, paired, telling
from finetune.evaluation.score import Row, score
from finetune.evaluation.statistics import bootstrap_by_database, holm, mcnemar_exact, paired_interval
from tests.helpers.predictions_examples import made


def numbered(verdicts: Sequence[str]) -> list[Row]:
    return [made(verdict, number) for number, verdict in enumerate(verdicts)]


def test_the_gain_counts_what_only_one_of_the_models_answers() -> None:
    base = numbered(["correct", "correct", "wrong_rows", "sql_error", "no_sql", "timeout"])
    tuned = numbered(["correct", "wrong_rows", "correct", "correct", "correct", "sql_error"])
    assert gain(base, tuned) == {"won": 3, "lost": 1, "both": 1, "neither": 1}
    assert gain(base, list(reversed(tuned))) == gain(base, tuned)


def test_the_gain_is_over_the_questions_that_both_were_asked() -> None:
    base, tuned = numbered(["correct", "wrong_rows"]), numbered(["correct", "correct", "correct"])
    assert gain(base, tuned) == {"won": 1, "lost": 0, "both": 1, "neither": 0}
    assert gain(base[:1], tuned[1:]) == {"won": 0, "lost": 0, "both": 0, "neither": 0}


def test_the_gain_has_an_interval_over_questions_and_one_over_databases() -> None:
    names = ("a", "a", "b", "b", "c", "c")
    wrong = [made("wrong_rows", number, db_id=name) for number, name in enumerate(names)]
    right = [made("correct", number, db_id=name) for number, name in enumerate(names)]
    mixed = [*right[:2], *wrong[2:]]
    found = gains(wrong, mixed)["gain_interval95"]
    assert found["databases"] == bootstrap_by_database([(2.0, 2), (0.0, 2), (0.0, 2)]) == (0.0, 1.0)
    assert found["questions"] == paired_interval(2, 0, 6)
    assert gains(wrong[:2], right[:2])["gain_interval95"]["databases"] is None, "of one database"
    assert score(mixed)["execution_accuracy_interval95_by_database"] == (0.0, 1.0)


def test_gains_are_given_under_every_rule_and_without_hollow_golds() -> None:
    rows = [
        replace(made("correct", 1), verdicts={"test_suite": "correct", "strict": "wrong_rows"}),
        replace(made("correct", 2), verdicts={"test_suite": "correct", "strict": "correct"}, gold_kind="no_rows"),
    ]
    wrong = [replace(row, verdict="wrong_rows", verdicts={"test_suite": "wrong_rows"}) for row in rows]
    found = gains(wrong, rows)
    assert found["gain"]["won"] == 2 and found["gain_without_hollow"]["won"] == 1
    assert set(found["gain_by_rule"]) == {"test_suite"}, "under the rules that all rows were judged by"
    assert {rule: one.won for rule, one in differences_by_rule(paired(rows, rows)).items()} == {
        "test_suite": 0,
        "strict": 0,
    }
    assert len(telling(paired(wrong, rows))) == 1


def test_a_difference_is_tested_and_bounded() -> None:
    first, second = numbered(["wrong_rows"] * 8 + ["correct"] * 4), numbered(["correct"] * 9 + ["wrong_rows"] * 3)
    found = difference(paired(first, second))
    assert (found.won, found.lost, found.both, found.neither, found.questions) == (8, 3, 1, 0, 12)
    assert found.share == 5 / 12 and found.p == mcnemar_exact(8, 3)
    assert found.over_questions == paired_interval(8, 3, 12) and found.over_databases is None


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from("abc")), min_size=1, max_size=30))
def test_the_other_way_round_all_signs_change(cells: list[tuple[bool, bool, str]]) -> None:
    verdict = {True: "correct", False: "wrong_rows"}
    first = [made(verdict[one], n, db_id=name) for n, (one, _, name) in enumerate(cells)]
    second = [made(verdict[other], n, db_id=name) for n, (_, other, name) in enumerate(cells)]
    there, back = difference(paired(first, second)), difference(paired(second, first))
    assert (there.won, there.lost, there.share, there.p) == (back.lost, back.won, -back.share, back.p)
    assert there.over_questions == pytest.approx((-back.over_questions[1], -back.over_questions[0]))
    assert (there.over_databases is None) == (back.over_databases is None) == (len({name for *_, name in cells}) < 2)


def test_the_class_of_an_error_is_its_verdict_where_no_other_is_known() -> None:
    assert error_class(made("correct")) is None
    assert error_class(made("timeout")) == "timeout"
    assert error_class(replace(made("sql_error"), error_class="no_such_table")) == "no_such_table"


def test_holm_adjusts_as_published() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2]) == [0.2] and holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values: list[float]) -> None:
    adjusted, order = holm(p_values), sorted(range(len(p_values)), key=lambda place: p_values[place])
    for level in (0.01, 0.05, 0.2):
        rejected = set()
        for rank, place in enumerate(order):
            if (len(p_values) - rank) * p_values[place] > level:
                break
            rejected.add(place)
        assert {place for place, p in enumerate(adjusted) if p <= level} == rejected
    assert all(after >= before for before, after in zip(p_values, adjusted, strict=True))
