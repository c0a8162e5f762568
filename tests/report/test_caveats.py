"""Everything that weakens a result is reported as a caveat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.report import caveats as report_caveats
from finetune.report.render import write_report
from finetune.report.source import read_run
from tests.helpers.report_fixtures import MANIFEST, build_run, change, rows, write_evaluation


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return build_run(tmp_path / "demo")


def caveats(run_dir: Path) -> str:
    return "\n".join(report_caveats.caveats(read_run(run_dir)))


def ask(run_dir: Path, number: int = 600, **changes: Any) -> None:
    base, tuned = rows(number)
    write_evaluation(run_dir, base=base, tuned=tuned, **changes)


def test_a_finished_run_with_many_questions_has_no_caveat(run_dir: Path) -> None:
    ask(run_dir)
    assert caveats(run_dir) == ""


@pytest.mark.parametrize(
    ("run_changes", "evaluation_changes", "said"),
    [
        ({"status": "budget_stop"}, {}, "stopped at its budget after 240 of 240"),
        ({"git_dirty": True}, {}, "changes that are not in the commit"),
        ({"git_commit": None}, {}, "commit of the code that trained is unknown"),
        ({"history": [{"step": 1, "loss": None}]}, {}, "training diverged"),
        (
            {"history": [{"eval_loss": 0.5}, {"eval_loss": 0.7}]},
            {},
            "ended at 0.7, above its lowest value 0.5",
        ),
        ({"data": {"counts": {"test": 1034}, "manifest_sha256": "6f1e" * 16}}, {}, "600 of the 1034"),
        ({}, {"data_manifest_sha256": "0" * 64}, "leaks are possible"),
        ({}, {"prompt_version": "2"}, "another prompt version"),
        ({}, {"split": "val"}, "from the val split, not from the test split"),
    ],
)
def test_what_weakens_the_result_becomes_a_caveat(
    run_dir: Path, run_changes: dict[str, Any], evaluation_changes: dict[str, Any], said: str
) -> None:
    ask(run_dir, **evaluation_changes)
    change(run_dir / "run.json", **run_changes)
    assert said in caveats(run_dir) and "\n" not in caveats(run_dir)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": {"done": 14, "planned": 14}, "step": {"batch_size": 4}}, "56 of the 2,122"),
        ({"steps": {"done": 529, "planned": 529}, "step": {"batch_size": 4}}, "2,116 of the 2,122"),
        ({"steps": {"done": 530, "planned": 530}, "step": {"batch_size": 4}}, ""),
        ({"steps": {"done": 1061, "planned": 1061}, "step": {"batch_size": 4}}, ""),
        ({"epochs": 0.25}, "530 of the 2,122"),  # as earlier versions wrote it
        ({"epochs": None}, ""),
    ],
)
def test_a_run_of_less_than_an_epoch_says_what_it_has_seen(run_dir: Path, changes: dict[str, Any], said: str) -> None:
    """Of the examples that fit into model.max_seq_length; what is left of an epoch, but no whole step, is no caveat."""
    ask(run_dir)
    data = {"counts": {"train": 2130}, "used": {"train": 2122}, "manifest_sha256": MANIFEST}
    change(run_dir / "run.json", data=data, **changes)
    expected = f"Training has seen {said} training examples (measured), less than one epoch: the score is of so short a training."
    assert caveats(run_dir) == (expected if said else "")
    assert bool(said) == ("less than one epoch" in headline_of_page(run_dir))


def headline_of_page(run_dir: Path) -> str:
    """What stands in report.md before its figures."""
    write_report(run_dir)
    return (run_dir / "report.md").read_text().partition("Execution accuracy")[0]


def test_questions_whose_gold_query_fails_are_a_caveat(run_dir: Path) -> None:
    base, tuned = rows(600)
    tuned[1]["verdict"] = "gold_failed"
    write_evaluation(run_dir, base=base, tuned=tuned)
    assert caveats(run_dir) == "Gold queries that failed: 1; these questions count as wrong."


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ("gold_limit", "Gold queries that hit a limit: 1; these questions count as wrong, whatever the answer."),
        ("gold_unstable", "Gold queries that give another result each time: 1; these questions count as wrong."),
    ],
)
def test_a_gold_query_without_a_result_is_a_caveat_of_its_own(run_dir: Path, verdict: str, said: str) -> None:
    base, tuned = rows(600)
    tuned[1]["verdict"] = verdict
    write_evaluation(run_dir, base=base, tuned=tuned)
    assert caveats(run_dir) == said


def with_golds(run_dir: Path, kinds: dict[str, int], share: float | None) -> None:
    path = run_dir / "eval.json"
    evaluation = json.loads(path.read_text())
    for number, name in enumerate(("base", "tuned")):
        scores = evaluation["models"][name]
        scores["by_gold"] = {kind: {"correct": 0, "questions": count} for kind, count in kinds.items()}
        scores["without_hollow"] = {"execution_accuracy": share and share + 0.25 * number}
    path.write_text(json.dumps(evaluation))


@pytest.mark.parametrize(
    ("kinds", "share", "said"),
    [
        ({"sound": 590, "failed": 3, "limit": 7}, 0.5, ""),
        (
            {"sound": 570, "no_rows": 12, "nothing_found": 4, "clock": 14},
            0.5,
            "Hollow gold queries, which a constant answers or which depend on the time: 30 of 600 (12 no_rows, 4 nothing_found, "
            "14 clock); without them the base model has 50.0% and the tuned model has 75.0%.",
        ),
        (
            {"no_rows": 600},
            None,
            "Hollow gold queries, which a constant answers or which depend on the time: 600 of 600 (600 no_rows); "
            "no question is left without them.",
        ),
        (
            {"sound": 582, "arbitrary_rows": 18},
            0.5,
            "In 18 gold queries LIMIT cuts between rows of equal rank: other answers would be as right.",
        ),
    ],
)
def test_gold_queries_that_say_little_are_a_caveat(
    run_dir: Path, kinds: dict[str, int], share: float | None, said: str
) -> None:
    ask(run_dir)
    with_golds(run_dir, kinds, share)
    assert caveats(run_dir) == said


def test_answers_that_do_not_match_the_scores_are_a_caveat(run_dir: Path) -> None:
    ask(run_dir)
    path = run_dir / "eval" / "tuned.jsonl"
    path.write_text(path.read_text().replace('"correct"', '"wrong_rows"', 1))
    assert caveats(run_dir) == "The recorded answers (tuned) do not match the counts in eval.json: evaluate again."


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ("too_long", "positions, prompt or prompt with answer: 0 of the base model, 2 of the tuned model"),
        ("out_of_memory", "did not fit into memory, even alone: 0 of the base model, 2 of the tuned model"),
    ],
)
def test_questions_without_a_whole_answer_are_a_caveat(run_dir: Path, verdict: str, said: str) -> None:
    base, tuned = rows(600)
    tuned[1]["verdict"] = tuned[3]["verdict"] = verdict
    write_evaluation(run_dir, base=base, tuned=tuned)
    assert said in caveats(run_dir) and "count as wrong" in caveats(run_dir) and "\n" not in caveats(run_dir)


def test_prompts_longer_than_those_of_training_are_a_caveat(run_dir: Path) -> None:
    base, tuned = rows(600)
    for row in (*base, *tuned):
        row["prompt_tokens"] = 300
    base[7]["prompt_tokens"] = tuned[7]["prompt_tokens"] = 2359
    write_evaluation(run_dir, base=base, tuned=tuned)
    change(run_dir / "run.json", config={"model": {"max_seq_length": 2048}})
    assert caveats(run_dir).startswith("Prompts longer than the 2048 tokens")
    assert caveats(run_dir).endswith(": 1.")


def test_answers_with_several_statements_are_counted(run_dir: Path) -> None:
    ask(run_dir)
    path = run_dir / "eval.json"
    evaluation = json.loads(path.read_text())
    evaluation["models"]["base"]["several_statements"] = 12
    path.write_text(json.dumps(evaluation))
    assert "more than one statement: 12 of the base model, 0 of the tuned model. Only the first" in caveats(run_dir)
    assert "the official evaluators run the whole text" in caveats(run_dir)
