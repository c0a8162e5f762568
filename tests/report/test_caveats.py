"""Everything that weakens a result is reported as a caveat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.report import caveats as report_caveats
from finetune.report.source import read_run
from tests.helpers.report_fixtures import build_run, change, rows, write_evaluation


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


def test_questions_whose_gold_query_fails_are_a_caveat(run_dir: Path) -> None:
    base, tuned = rows(600)
    tuned[1]["verdict"] = "gold_failed"
    write_evaluation(run_dir, base=base, tuned=tuned)
    assert caveats(run_dir) == "Gold queries that failed: 1; these questions count as wrong."


def test_answers_that_do_not_match_the_scores_are_a_caveat(run_dir: Path) -> None:
    ask(run_dir)
    path = run_dir / "eval" / "tuned.jsonl"
    path.write_text(path.read_text().replace('"correct"', '"wrong_rows"', 1))
    assert caveats(run_dir) == "The recorded answers (tuned) do not match the counts in eval.json: evaluate again."
