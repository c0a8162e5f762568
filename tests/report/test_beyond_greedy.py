"""The report and the console show greedy, vote, pass@N and retry side by side, each with its gain, intervals and cost."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from finetune.report.beyond_greedy import sentences, variants
from finetune.report.render import write_report
from finetune.report.score_facts import block, facts, gain_line, leak_line, per_point, speed_line
from tests.helpers.errors import raises
from tests.helpers.report_fixtures import Page, build_run, write

COST = {"seconds": 312.5, "loading_seconds": 3.1, "new_tokens": 48210, "new_tokens_per_second": 154.3, "usd": 0.318,
        "usd_basis": "catalog of 2026-11-20"}  # fmt: skip


def gain(won: int, lost: int) -> dict[str, Any]:
    return {
        "gain": {"won": won, "lost": lost, "both": 40, "neither": 110 - won - lost},
        "gain_interval95": {"questions": [0.011, 0.092], "databases": [-0.02, 0.12]},
        "exact_p": 0.0213,
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return build_run(tmp_path / "demo")


@pytest.fixture
def evaluation(run_dir: Path) -> dict[str, Any]:
    """eval.json of an evaluation with samples, a retry, prices and leaks."""
    record: dict[str, Any] = json.loads((run_dir / "eval.json").read_text())
    tuned = record["models"]["tuned"]

    def scored(correct: int) -> dict[str, Any]:
        found: dict[str, Any] = copy.deepcopy(tuned)
        return found | {"correct": correct, "execution_accuracy": correct / 150}

    for name in ("base", "tuned"):
        record["models"][name]["cost"] = COST
    tuned["samples"] = {
        "n": 8, "temperature": 0.8, "seed": 42, "vote": scored(58), "pass_at": scored(75), "no_result": 4, "unanimous": 31,
        "pass_at_k": {"1": 0.31, "2": 0.38, "4": 0.45, "8": 0.5}, "gain": {"vote": gain(11, 3), "pass_at": gain(26, 1)},
        "cost": COST | {"usd": None, "usd_basis": None},
    }  # fmt: skip
    tuned["retry"] = {"rounds": 2, "asked": [31, 12], "score": scored(55), "gain": gain(5, 0), "cost": COST}
    record["leaks"] = {"data_of_training": True, "removed": 3, "same_shape": 63, "questions": 150}
    record["cost"] = COST | {"usd": 0.64, "training_usd": 4.0, "points_gained": 28.7, "usd_per_point": 0.1617}
    return record


def pages(run_dir: Path) -> tuple[str, str]:
    write_report(run_dir)
    return Page((run_dir / "report.html").read_text()).text, (run_dir / "report.md").read_text()


def test_the_report_has_them_in_one_table_with_gain_interval_test_and_cost(
    run_dir: Path, evaluation: dict[str, Any]
) -> None:
    write(run_dir / "eval.json", evaluation)
    for page in pages(run_dir):
        for text in (
            "vote of 8", "38.7% (58 of 150)", "+5.3 points", "11 won, 3 lost", "+1.1 to +9.2 over questions",
            "p = 0.021", "312.5 s, 48,210 new tokens (measured), price unknown",
            "pass@8", "50.0% (75 of 150)", "greedy, 2 more tries after an error", "$0.32 (estimated)",
            "pass@4 45.0%", "31 then 12 questions", "33.3% (50 of 150)",
            "no question and no gold query is in train; 3 removed by data prepare (measured); 63 of the 150 gold queries of "
            "the split (42%) have a shape that is in train", "154 tokens/s, loading 3.1 s apart (measured)",
            "$0.16 a point gained (estimated: training $4.00 by the ledger, evaluation $0.64)",
        ):  # fmt: skip
            assert text.replace("_", r"\_") in page or text in page, text


def test_a_report_without_them_has_no_such_section(run_dir: Path) -> None:
    for page in pages(run_dir):
        assert "Beyond the greedy answer" not in page and "What the score cost" not in page


def test_the_console_shows_a_block_of_a_few_lines_for_each_model(evaluation: dict[str, Any]) -> None:
    assert len(block(evaluation, "base")) == 2
    lines = block(evaluation, "tuned")
    assert len(lines) == 6 and all(len(line) < 300 for line in lines)
    assert lines[0].startswith("execution accuracy 33.3% (50 of 150, 95% interval ")
    assert lines[1].startswith(
        "48,210 new tokens in 312.5 s, 154 tokens/s, loading 3.1 s apart (measured); $0.32 (estimated: "
    )
    assert lines[1].endswith("price: catalog of 2026-11-20)")
    assert lines[2].startswith("leaks: ")
    assert lines[3].startswith(
        "vote of 8: 38.7% (58 of 150); +5.3 points over greedy (11 won, 3 lost, +1.1 to +9.2 over"
    )
    assert gain_line(evaluation).endswith("evaluation $0.64)")


@pytest.mark.parametrize(("databases", "narrow"), [(2, True), (9, True), (10, False)])
def test_an_interval_over_databases_needs_ten_of_them(evaluation: dict[str, Any], databases: int, narrow: bool) -> None:
    tuned = evaluation["models"]["tuned"]
    for scores in (tuned, tuned["samples"]["vote"], tuned["samples"]["pass_at"], tuned["retry"]["score"]):
        scores["by_database"] = {f"database {number}": {"correct": 1, "questions": 2} for number in range(databases)}
        scores["execution_accuracy_interval95_by_database"] = [0.5, 0.5]
    evaluation["gain_interval95"] = {"questions": [0.0, 0.1], "databases": [0.0, 0.0]}
    said = [block(evaluation, "tuned")[0], gain_line(evaluation), *(one.line() for one in variants(tuned)[1:])]
    assert len(said) == 5 and all("over questions" in line for line in said)
    assert all(("over databases" in line) != narrow for line in said), said


def test_dollars_that_are_not_known_are_said_to_be_unknown_and_why(evaluation: dict[str, Any]) -> None:
    cost = evaluation["cost"]
    cost |= {"usd_per_point": None, "usd": None}
    assert per_point(evaluation) == "dollars a point gained: price of evaluation unknown"
    cost |= {"training_usd": None}
    assert per_point(evaluation) == "dollars a point gained: price of training and evaluation unknown"
    cost |= {"points_gained": -1.3}
    assert per_point(evaluation) == "dollars a point gained: undefined, nothing was gained"
    evaluation["models"]["base"]["cost"] = COST | {"usd": None}
    assert speed_line(evaluation["models"]["base"]).endswith("(measured); dollars: price unknown")
    evaluation["gain"] = None
    assert gain_line(evaluation) == ""


def test_leaks_are_unknown_for_other_data(evaluation: dict[str, Any]) -> None:
    evaluation["leaks"]["data_of_training"] = False
    assert leak_line(evaluation) == "leaks: unknown, because these are not the data that it was trained on"
    evaluation["leaks"] |= {"data_of_training": None, "same_shape": None}
    assert leak_line(evaluation) == "leaks: unknown what it was trained on; 3 removed by data prepare (measured)"
    del evaluation["leaks"]
    assert leak_line(evaluation) == ""


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("samples", {"vote": 7}, "models.tuned has a samples.vote that is not an object"),
        ("samples", {"pass_at": {"correct": 1}}, "samples.pass_at that lacks the count questions"),
        ("retry", {"score": {"correct": 1, "questions": 2}}, "retry.score that lacks the number execution_accuracy"),
        ("samples", {"gain": {"vote": {"gain": {"won": -1}}}}, "samples.gain.vote.gain that lacks the count won"),
        (
            "retry",
            {"gain": {"gain_interval95": {"databases": ["a", 1]}}},
            "retry.gain.gain_interval95.databases that is not a pair of numbers",
        ),
    ],
)
def test_a_broken_part_is_named(run_dir: Path, evaluation: dict[str, Any], key: str, value: Any, said: str) -> None:
    evaluation["models"]["tuned"][key] = value
    write(run_dir / "eval.json", evaluation)
    with raises("report.bad_input", match=said):
        write_report(run_dir)


@pytest.mark.parametrize("junk", [7, "x", [1], {}, None, {"a": "b"}])
def test_junk_where_nothing_is_checked_is_left_out(run_dir: Path, evaluation: dict[str, Any], junk: Any) -> None:
    tuned = evaluation["models"]["tuned"]
    for key in ("leaks", "cost"):
        evaluation[key] = junk
    tuned["cost"] = junk
    tuned["samples"] |= {"pass_at_k": junk, "cost": junk, "n": junk}
    tuned["retry"] |= {"asked": junk, "cost": junk, "rounds": junk}
    write(run_dir / "eval.json", evaluation)
    pages(run_dir)
    tuned["samples"] = junk
    write(run_dir / "eval.json", evaluation)
    pages(run_dir)
    assert len(variants(tuned)) == 2 and sentences({}) == [] == variants({}) and facts({}) == []


def test_text_from_a_price_table_is_escaped(run_dir: Path, evaluation: dict[str, Any]) -> None:
    evaluation["models"]["tuned"]["cost"] = COST | {"usd_basis": "<b>\x1b[31m|x"}
    write(run_dir / "eval.json", evaluation)
    write_report(run_dir)
    assert "<b>" not in (run_dir / "report.html").read_text() and "\x1b" not in (run_dir / "report.md").read_text()
