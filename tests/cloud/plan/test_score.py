"""The score in the plan: how many answers, at which speed, and their share of hours and dollars."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.cli.main import main
from finetune.cloud.plan.plan import MAX_PREEMPTIONS, Plan, run_cost
from finetune.cloud.plan.table import render, to_json
from finetune.cloud.plan.workload import EvaluationSize, evaluation_size
from finetune.config.schema import PlanSection
from finetune.estimate.generation import HF_LOADING_SECONDS, VLLM_LOADING_SECONDS
from finetune.machine.price import Ceilings
from tests.helpers.errors import raises
from tests.helpers.plan_examples import ALL, plan_of, priced, row_of, run_config, write_manifest

QUESTIONS = {"plan": {"questions": 1000, "answer_tokens": 50.0}}


def size(**sections: dict[str, Any]) -> EvaluationSize | None:
    return evaluation_size(run_config(**sections))


def known(**sections: dict[str, Any]) -> EvaluationSize:
    found = size(**sections)
    assert found
    return found


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return plan_of(run_config(**QUESTIONS), priced(tmp_path, **ALL))


# how many


def test_every_question_is_answered_by_both_models() -> None:
    found = known(**QUESTIONS)
    assert (found.questions, found.answers, found.new_tokens) == (1000, 2000, 100_000)
    assert found.basis == "questions (plan.questions), 50 tokens an answer"


def test_the_questions_of_a_prepared_set_are_counted(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path)
    found = known(data={"output_dir": str(tmp_path)}, **QUESTIONS)
    assert (found.questions, found.answers, found.new_tokens) == (50, 100, 2000), "20,000 tokens of 1,000 gold answers"
    assert found.basis == f"questions counted in {manifest}, 20 tokens an answer"
    validation = known(data={"output_dir": str(tmp_path)}, evaluation={"split": "val"})
    assert validation.questions == 50


def test_a_sample_of_the_questions_is_what_is_counted(tmp_path: Path) -> None:
    write_manifest(tmp_path)
    found = known(data={"output_dir": str(tmp_path)}, evaluation={"max_questions": 30})
    assert found.questions == 30 and found.basis.startswith("evaluation.max_questions, of 50 questions counted in ")
    assert known(data={"output_dir": str(tmp_path)}, evaluation={"max_questions": 70}).questions == 50


def test_tokens_that_nobody_has_counted_are_assumed(tmp_path: Path) -> None:
    write_manifest(tmp_path, tokens=None)
    found = known(data={"output_dir": str(tmp_path)})
    assert found.new_tokens == 100 * 64


def test_samples_and_retries_are_answers_of_the_tuned_model() -> None:
    config = run_config(**QUESTIONS)
    for key, value, answers in (("samples", 8, 10_000), ("samples", 1, 2000), ("retries", 2, 2400)):
        asked = replace(config, evaluation=_with(config.evaluation, key, value))
        found = evaluation_size(asked)
        assert found and found.answers == pytest.approx(answers), key


def _with(section: Any, key: str, value: int) -> Any:
    """The section with a key that it may not have in this version."""
    from copy import copy

    changed = copy(section)
    setattr(changed, key, value)
    return changed


@pytest.mark.parametrize("files", [{}, {"train.jsonl": {}}])
def test_data_without_databases_are_not_scored(files: dict[str, Any], tmp_path: Path) -> None:
    write_manifest(tmp_path, files=files)
    assert size(data={"output_dir": str(tmp_path)}) is None
    write_manifest(tmp_path, files={"databases/shop/shop.sqlite": {}})
    assert known(data={"output_dir": str(tmp_path)}).questions == 50


def test_questions_of_local_sources_are_counted(tmp_path: Path) -> None:
    lines = tmp_path / "records.jsonl"
    lines.write_text("{}\n" * 40)
    source = {"kind": "jsonl", "path": str(lines), "databases": str(tmp_path)}
    own = known(data={"sources": [{**source, "split": "test"}], "test_fraction": 0.0})
    assert (own.questions, own.basis) == (40, "questions counted in the local sources, 64 tokens an answer")
    shared = known(data={"sources": [source], "test_fraction": 0.25})
    assert shared.questions == 10
    without = {"kind": "jsonl", "path": str(lines)}
    assert size(data={"sources": [without], "test_fraction": 0.25}) is None, "without databases nothing can be scored"
    both = known(data={"sources": [without, source], "test_fraction": 0.25})
    assert both.questions == 10


def test_unknown_questions_are_left_out_and_said_so(tmp_path: Path) -> None:
    assert size() is None, "the source is on the hub"
    text = render(plan_of(run_config(), priced(tmp_path, **ALL)), "c.yaml")
    assert "\nscore: not counted, because the number of questions with a database is unknown or 0; " in text
    assert "new tokens/s" not in text


@pytest.mark.parametrize(
    "changes",
    [
        {"counts": {"train": 5, "val": 1}},
        {"counts": {"train": 5, "val": 1, "test": -1}},
        {"counts": {"train": 5, "val": 1, "test": "many"}},
        {"tokens": {"train": {"total": 9, "completion": "x"}}},
        {"tokens": {"train": {"total": 9, "completion": 0}}},
        {"tokens": 7},
        {"counts": {"train": 0, "val": 1, "test": 1}},
    ],
)
def test_a_broken_manifest_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    write_manifest(tmp_path, **changes)
    with raises("data.bad_manifest"):
        size(data={"output_dir": str(tmp_path)})


# how long, for how much


def test_the_score_is_part_of_the_hours_and_dollars_and_shown_apart(plan: Plan, tmp_path: Path) -> None:
    without = plan_of(run_config(**QUESTIONS), priced(tmp_path / "other", **ALL), scored=False)
    for name, loading in (("L4", VLLM_LOADING_SECONDS), ("T4", HF_LOADING_SECONDS)):
        row, bare = row_of(plan, name, spot=False), row_of(without, name, spot=False)
        assert row.cost and bare.cost and row.on_gpu.scoring and row.offer
        speed = row.on_gpu.scoring.speed
        assert row.cost.score_hours == pytest.approx((loading + 100_000 / speed.tokens_per_second) / 3600)
        assert row.cost.hours == pytest.approx(bare.cost.hours + row.cost.score_hours)
        assert row.cost.score_usd == pytest.approx(row.cost.score_hours * row.offer.usd_per_hour)
        assert row.cost.usd == pytest.approx(bare.cost.usd + row.cost.score_usd)


def test_a_preemption_while_scoring_costs_another_start_but_no_answers(plan: Plan) -> None:
    on_gpu = row_of(plan, "T4", spot=True).on_gpu
    assert on_gpu.scoring
    section = PlanSection(setup_minutes=12, spot_preemptions_per_hour=0.05)
    bare = run_cost(replace(on_gpu, scoring=None), 1.0, True, section)
    cost = run_cost(on_gpu, 1.0, True, section)
    assert cost.preemptions - bare.preemptions == pytest.approx(0.05 * on_gpu.scoring.hours)
    again = 12 / 60 + HF_LOADING_SECONDS / 3600
    assert cost.lost_hours - bare.lost_hours == pytest.approx(0.05 * on_gpu.scoring.hours * again)
    assert cost.hours == pytest.approx(0.2 + on_gpu.work_hours + on_gpu.scoring.hours + cost.lost_hours)
    assert cost.preemptions < MAX_PREEMPTIONS


def test_a_ceiling_holds_for_training_and_score_together(plan: Plan, tmp_path: Path) -> None:
    cost = row_of(plan, "T4", spot=False).cost
    assert cost
    between = cost.usd - cost.score_usd / 2
    bounded = plan_of(run_config(**QUESTIONS), priced(tmp_path / "other", **ALL), Ceilings(run_usd=between))
    assert any("for the run" in refusal for refusal in row_of(bounded, "T4", spot=False).refusals)


def test_the_table_and_the_json_have_the_split_and_name_the_speeds(plan: Plan) -> None:
    text = render(plan, "c.yaml")
    assert (
        "\nscore: 1,000 questions (plan.questions), 50 tokens an answer; 2,000 answers of base and tuned model\n"
        in text
    )
    notes = text.split("new tokens/s of the score, which is part of the hours and of the dollars:\n")[1].splitlines()
    assert sorted(line.split(":")[0].strip() for line in notes) == sorted(ALL)
    assert all("s of loading, estimated (" in line and "2026-11-29" in line for line in notes)
    value = json.loads(json.dumps(to_json(plan)))
    assert value["evaluation"]["questions"] == 1000
    lines = {tuple(line.split()[1:3]): line.split() for line in text.splitlines() if line[:2].strip(".").isdigit()}
    for row in value["rows"]:
        line = lines[row["gpu"], "spot" if row["spot"] else "on-demand"]
        hours, score_hours, hourly, usd, score_usd = line[line.index("est.") + 1 :][:5]
        assert float(score_hours) == pytest.approx(row["score_hours"], abs=0.0051)
        assert float(score_usd) == pytest.approx(row["score_usd"], abs=0.0051)
        assert float(hours) == pytest.approx(row["hours"], abs=0.051)
        assert float(usd) == pytest.approx(row["usd"], abs=0.0051) and hourly
        assert row["generation"]["basis"] == "estimated"
        assert row["generation"]["generator"] == ("hf" if row["gpu"] in ("T4", "V100") else "vllm")


def test_the_command_can_leave_it_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = "configs/mistral_7b_qlora.yaml"
    assert main(["plan", config, "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["evaluation"]["questions"] == 1034
    assert main(["plan", config, "--no-score"]) == 0
    assert "\nscore: left out (--no-score, or EVALUATE=0 in the task)\n" in capsys.readouterr().out
    task = tmp_path / "task.yaml"
    task.write_text("resources:\n  any_of:\n    - {accelerators: L4:1}\n")
    assert main(["plan", config, "--no-score", "--write", str(task)]) == 0
    assert f"finetune plan {config} --no-score" in task.read_text()
