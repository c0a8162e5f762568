"""What to type after each stage: it follows from the state, and every command is parsed by the program that it calls."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from finetune.budget.ledger import Ledger
from finetune.cli.main import _parse
from finetune.errors import EXIT_MISSING, EXIT_OK, EXIT_TRANSIENT
from finetune.machine.price import MachinePrice
from finetune.project_folder import ProjectFolder
from finetune.run_folder import RunFolder
from finetune.stage_end import following
from finetune.stage_end.following_job import Job, after_train_job, cost_of_run
from tests.helpers.next_commands import typed

CONFIG, OVERRIDES = Path("configs/demo_cpu.yaml"), ["lora.r=8", "data.output_dir=a b"]
QUESTIONS = {"data_manifest_sha256": "abc", "split": "test", "questions": 9}
JOB = Job("mine", "sky-2026-11-30-a-b_1", 25.0, 24.0)
MANAGED = Job("mine", "sky-managed-2026-11-30-00-00-00_train-spot_1-0", 25.0, 24.0)


def run_of(folder: Path, status: str, steps: int = 10, hours: float = 1.0, **budget: float) -> RunFolder:
    """A run of 40 steps on a machine at $2/h."""
    folder.mkdir(parents=True)
    config = {"model": {"name": "m"}, "data": {"sources": [{"kind": "jsonl", "path": "x"}], "output_dir": "y"}}
    (folder / "config.yaml").write_text(json.dumps(config | {"budget": {"usd_per_hour": 2.0, **budget}}))
    (folder / "run.json").write_text(json.dumps({"status": status, "steps": {"done": steps, "planned": 40}}))
    run = RunFolder(folder)
    log = Ledger(run.ledger).new_attempt(1, machine={}, price=MachinePrice(2.0, "a catalog"), resumed_step=None)
    log.begin(0.0)
    log.end(3600 * hours, status, steps)
    return run


def evaluated(folder: Path, **changes: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter").mkdir(exist_ok=True)
    (folder / "config.yaml").touch()
    (folder / "eval.json").write_text(json.dumps(QUESTIONS | changes))


def test_before_there_is_a_run() -> None:
    assert typed(following.after_doctor(cloud=False, missing=True)) == ["finetune doctor"]
    assert typed(following.after_doctor(cloud=True, missing=True)) == ["finetune doctor --cloud"]
    assert typed(following.after_doctor(cloud=False, missing=False)) == ["finetune data prepare configs/demo_cpu.yaml"]
    assert typed(following.after_doctor(cloud=True, missing=False)) == ["finetune plan configs/mistral_7b_qlora.yaml"]


def test_where_training_needs_a_gpu_the_next_command_says_so() -> None:
    whys = [following.after_prepare(CONFIG, [], on_gpu_only=only)[0].why for only in (False, True)]
    assert whys == ["on this machine", "on this machine, with an NVIDIA GPU"]


def test_doctor_goes_on_with_the_project_that_it_is_typed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert typed(following.after_doctor(cloud=True, missing=False)) == ["finetune init"]
    (tmp_path / "text2sql.yaml").touch()
    assert typed(following.after_doctor(cloud=True, missing=False)) == ["finetune plan text2sql.yaml"]
    assert typed(following.after_doctor(cloud=False, missing=False)) == ["finetune data prepare text2sql.yaml"]
    words = "configs/demo_cpu.yaml lora.r=8 'data.output_dir=a b'"
    assert typed(following.after_check(CONFIG, OVERRIDES)) == [f"finetune data prepare {words}"]
    assert typed(following.after_prepare(CONFIG, OVERRIDES, on_gpu_only=True)) == [
        f"finetune train {words}",
        f"finetune plan {words}",
    ]


def test_a_plan_is_written_then_launched_and_one_that_fits_nowhere_gets_higher_ceilings() -> None:
    plan = ["finetune", "plan", str(CONFIG), "--max-run-usd", "1", "--spot"]
    assert typed(following.after_plan(plan, (2.0, 3.0), fits=True)) == [
        "finetune plan configs/demo_cpu.yaml --max-run-usd 1 --spot --write sky/train_cheapest.yaml"
    ]
    assert typed(following.after_plan(plan, (2.0, 3.0), fits=False)) == [
        "finetune plan configs/demo_cpu.yaml --spot --max-run-usd 2.2"
    ]
    assert typed(following.after_plan([*plan, "--max-hours", "2"], (2.0, 3.0), fits=False, most_hours=2)) == [
        "finetune plan configs/demo_cpu.yaml --spot --max-run-usd 2.2 --max-hours 3.3"
    ]
    assert typed(following.after_plan([*plan, "--max-hours", "4"], (2.0, 3.0), fits=False, most_hours=4)) == [
        "finetune plan configs/demo_cpu.yaml --spot --max-hours 4 --max-run-usd 2.2"
    ], "what suffices stays"
    assert typed(following.after_plan(plan, None, fits=False)) == [
        "finetune plan configs/demo_cpu.yaml --max-run-usd 1 --spot --memory"
    ]
    task = Path("sky/train_cheapest.yaml")
    options: dict[str, Any] = {"variables": [], "managed": True, "scored": True, "usd_per_hour": None}
    assert typed(following.after_written_plan(task, CONFIG, ["lora.r=8", "data.x=1"], **options)) == [
        "finetune launch --jobs sky/train_cheapest.yaml --env CONFIG=configs/demo_cpu.yaml --env 'OVERRIDES=lora.r=8 data.x=1'"
    ]
    options |= {"variables": ["MAX_RUN_USD=2", "EVALUATE=0"], "managed": False, "scored": False, "usd_per_hour": 1.5}
    [command] = following.after_written_plan(task, CONFIG, [], **options)
    assert typed([command]) == [
        "finetune launch sky/train_cheapest.yaml --env CONFIG=configs/demo_cpu.yaml --env MAX_RUN_USD=2 --env EVALUATE=0"
    ]
    assert command.why == "first set max_hourly_cost: 1.5 in it; trains, and takes the machine down"
    assert typed(following.after_launch("mine", managed=False)) == ["sky logs mine"]
    assert typed(following.after_launch(None, managed=False)) == ["sky status"]
    assert typed(following.after_launch(None, managed=True)) == ["sky jobs queue"]


def test_a_plan_without_wishes_leads_to_the_task_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert following.after_plain_plan(CONFIG, []) == []
    Path("sky").mkdir()
    Path(following.TASK).write_text("envs:\n  CONFIG: text2sql.yaml  # ours\n")
    assert typed(following.after_plain_plan(Path("text2sql.yaml"), [])) == ["finetune launch sky/train_cheapest.yaml"]
    assert following.after_plain_plan(CONFIG, [])[0].why == "trains and scores, under the ceilings of the task"
    Path(following.TASK).write_text('envs:\n  CONFIG: text2sql.yaml  # ours\n  EVALUATE: "0"  # no rows\n')
    assert following.after_plain_plan(CONFIG, [])[0].why == "trains, under the ceilings of the task"
    assert typed(following.after_plain_plan(CONFIG, ["lora.r=8", "data.x=1"])) == [
        "finetune launch sky/train_cheapest.yaml --env CONFIG=configs/demo_cpu.yaml --env 'OVERRIDES=lora.r=8 data.x=1'"
    ]
    ProjectFolder(tmp_path, {}, {"task": "sky/train_h100.yaml"}).write_marker()
    Path("sky/train_h100.yaml").write_text("envs:\n  CONFIG: text2sql.yaml\n")
    assert typed(following.after_plain_plan(Path("text2sql.yaml"), [])) == ["finetune launch sky/train_h100.yaml"]


def test_a_trained_run_is_scored_and_an_interrupted_one_resumed(tmp_path: Path) -> None:
    done, stopped = run_of(tmp_path / "done", "done"), run_of(tmp_path / "stopped", "interrupted")
    assert typed(following.after_training(done)) == [f"finetune evaluate {done.path}"]
    assert typed(following.after_training(stopped)) == [f"finetune train --resume {stopped.path}"]


@pytest.mark.parametrize(
    ("budget", "steps", "options"),
    [
        ({"max_run_usd": 2.1}, 10, "--max-run-usd 8.8"),  # $2 for 10 of 40 steps, and a tenth more
        ({"max_hours": 1.0}, 10, "--max-hours 4.4"),
        ({"max_run_usd": 100.0, "max_hours": 1.0}, 10, "--max-hours 4.4"),
        ({"max_run_usd": 3.0, "max_hours": 1.0}, 0, "--max-run-usd 6 --max-hours 2"),  # no pace: twice as much
        ({"max_run_usd": 30.0}, 39, "--max-run-usd 60"),  # the pace says that it would do
    ],
)
def test_a_run_that_the_budget_stopped_gets_the_ceiling_that_it_needs(
    budget: dict[str, float], steps: int, options: str, tmp_path: Path
) -> None:
    run = run_of(tmp_path / "run", "budget_stop", steps, **budget)
    assert typed(following.after_training(run)) == [
        f"finetune train --resume {run.path} {options}",
        f"finetune evaluate {run.path}",
    ]


def test_a_score_is_reported_then_exported_or_compared_with_the_run_before_it(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "done")
    (run.path / "adapter").mkdir()
    assert typed(following.after_evaluation(run)) == [f"finetune report {run.path}"]
    assert typed(following.after_report(run)) == [f"finetune evaluate {run.path}"]
    evaluated(run.path)
    export = f"finetune export {run.path} --to merged"
    evaluated(tmp_path / "other-data", data_manifest_sha256="xyz")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.yaml").touch()
    (tmp_path / "damaged" / "eval.json").write_text("[1")
    assert typed(following.after_report(run)) == [export]
    for seconds, name in enumerate(("a", "b")):
        evaluated(tmp_path / name)
        os.utime(tmp_path / name / "eval.json", (seconds, seconds))
    assert typed(following.after_report(run)) == [export, f"finetune compare {tmp_path / 'b'} {run.path}"]


def test_a_run_is_compared_with_one_that_was_scored_before_it_and_judged_in_the_same_way(tmp_path: Path) -> None:
    judging = {"rule": "test_suite", "timeout_seconds": 10.0, "versions": ["3.40"]}

    def scored(name: str, seconds: float, **changes: Any) -> RunFolder:
        evaluated(tmp_path / name, **({"judging": judging} | changes))
        os.utime(tmp_path / name / "eval.json", (seconds, seconds))
        return RunFolder(tmp_path / name)

    def compared(run: RunFolder) -> list[str]:
        return typed(following.after_report(run))[1:]

    first, last = scored("first", 1), scored("last", 9)
    assert compared(last) == [f"finetune compare {first.path} {last.path}"]
    assert compared(first) == [], "the other one was scored after it"
    scored("slow", 2, judging=judging | {"timeout_seconds": 30.0})
    scored("earlier-format", 3, judging=None, rule="strict", timeout_seconds=10.0)
    scored("damaged", 4, judging=3, rule=None)
    assert compared(last) == [f"finetune compare {first.path} {last.path}"], "compare refuses the others"
    alike = scored("earlier-and-alike", 5, judging=None, rule="test_suite", timeout_seconds=10.0)
    assert compared(last) == [f"finetune compare {alike.path} {last.path}"]


def test_the_demo_ends_with_a_question_about_a_database_that_it_has_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_of(Path("runs/demo"), "done")
    (run.path / "adapter").mkdir()
    evaluated(run.path)
    assert typed(following.after_demo(run)) == ["finetune export runs/demo --to merged"], "without that database"
    following.FARMS.parent.mkdir(parents=True)
    following.FARMS.touch()
    [command] = typed(following.after_demo(run))
    assert command == f"finetune ask runs/demo --db {following.FARMS} 'How many farms are there?'"


def test_a_demo_that_was_stopped_goes_on_with_make_or_as_it_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(words: str) -> list[str]:
        arguments = _parse(words.split())
        return typed(
            following.after_stopped_demo(arguments.config, arguments.overrides, arguments.minutes, arguments.typed)
        )

    assert stopped(f"demo {following.SMALL}") == stopped(f"demo {following.SMALL} --minutes 10") == ["make demo"]
    assert stopped(f"demo {following.SMALL} --minutes 2.5") == ["make demo DEMO_MINUTES=2.5"]
    for other in ("demo mine.yaml", f"demo {following.SMALL} training.run_name=mine"):
        assert stopped(other) == [f"finetune {other}"], "make would go on with another run"
    monkeypatch.chdir(tmp_path)
    assert stopped(f"demo {following.SMALL} --minutes 3") == [f"finetune demo {following.SMALL} --minutes 3"]


def test_the_minutes_of_a_demo_are_those_of_make() -> None:
    assert f"DEMO_MINUTES ?= {following.DEMO_MINUTES:g}\n" in Path("Makefile").read_text()


def test_predictions_are_compared_with_a_run(tmp_path: Path) -> None:
    run, result = run_of(tmp_path / "run", "done"), tmp_path / "predictions" / "theirs"
    assert typed(following.after_predictions(run.path, run.path, "theirs")) == [f"finetune evaluate {run.path}"]
    evaluated(run.path)
    judged = run.eval_predictions("theirs")
    judged.parent.mkdir()
    judged.write_text(json.dumps(QUESTIONS))
    compare = f"finetune compare {run.path} {run.path}:theirs"
    assert typed(following.after_predictions(run.path, run.path, "theirs")) == [compare]
    evaluated(run.path, questions=1)
    assert typed(following.after_predictions(run.path, run.path, "theirs")) == [f"{compare} --common"], "a sample"
    evaluated(run.path, split="val")
    assert typed(following.after_predictions(run.path, run.path, "theirs")) == [
        f"finetune evaluate {run.path} evaluation.split=test"
    ], "no question in common"
    evaluated(run.path)
    assert following.after_predictions(CONFIG, result, "theirs") == []
    evaluated(result)
    assert typed(following.after_predictions(CONFIG, result, "theirs")) == [f"finetune compare {run.path} {result}"]


def test_after_the_base_score_a_comparison_an_export_and_a_server(tmp_path: Path) -> None:
    evaluated(tmp_path / "a")
    words = [str(tmp_path / "a"), f"{tmp_path / 'a'}:base"]
    assert typed(following.after_scored_base(CONFIG, ["evaluation.rule=bird_set", "lora.r=8"])) == [
        "finetune train configs/demo_cpu.yaml lora.r=8"
    ]
    assert typed(following.after_comparison(words, [0.6, 0.4])) == [f"finetune export {words[0]} --to merged"]
    assert following.after_comparison(words, [0.3, 0.4]) == [], "a base model is not exported"
    assert typed(following.after_export(tmp_path)) == [f"finetune serve {tmp_path}"]
    words = [
        "serve",
        str(tmp_path),
        "--db",
        "shop=a b.sqlite",
        "--execute",
        "--api-key-env",
        "SERVE_KEY",
        "--port",
        "8001",
    ]
    assert typed(following.after_serving(words)) == [f"finetune {shlex.join(words)}"]


def test_a_job_ends_with_commands_for_the_machine_that_launched_it(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "done")
    report = "gcloud storage cp gs://mine/runs/run/report.html ."
    score = "finetune launch sky/evaluate.yaml --env RUN_NAME=run"
    serve = "finetune launch sky/serve.yaml --env RUN_NAME=run"
    assert typed(after_train_job(run, JOB, EXIT_OK, scored=True)) == [report, serve]
    assert typed(after_train_job(run, JOB, EXIT_OK, scored=False)) == [score]
    assert typed(after_train_job(run, JOB, EXIT_MISSING, scored=False)) == [score], "only the score has failed"
    stopped = run_of(tmp_path / "stopped", "interrupted", hours=5.0)
    assert after_train_job(stopped, JOB, EXIT_MISSING, scored=False) == [], "the message says what is wrong"
    assert typed(after_train_job(stopped, MANAGED, EXIT_TRANSIENT, scored=False)) == ["sky jobs queue"]
    again = "finetune launch sky/train_cheapest.yaml --env RUN_NAME=stopped"
    assert typed(after_train_job(stopped, JOB, EXIT_TRANSIENT, scored=False)) == [again]
    # 5 of 22 hours, and $10 of $44, are done
    assert typed(after_train_job(stopped, JOB, EXIT_OK, scored=False)) == [f"{again} --env MAX_RUN_USD=44"]
    assert typed(after_train_job(stopped, Job("mine", MANAGED.task_id, 50.0, 10.0), EXIT_OK, scored=False)) == [
        "finetune launch --jobs sky/train_spot.yaml --env RUN_NAME=stopped --env MAX_HOURS=17"
    ]
    (stopped.path / "adapter").mkdir()
    assert len(typed(after_train_job(stopped, JOB, EXIT_OK, scored=False))) == 2, "what there is can be scored"


def test_a_job_says_what_training_and_score_have_cost(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "done")
    log = Ledger(run.ledger, "evaluate").new_attempt(
        1, machine={}, price=MachinePrice(2.0, "a catalog"), resumed_step=None
    )
    log.begin(0.0)
    log.end(360, "scored", None)
    assert cost_of_run(run) == (
        "training $2.00 (measured hours, price: a catalog) for 1.0 h in 1 attempt (measured); "
        "score $0.20 (measured hours, price: a catalog) for 6.0 min in 1 attempt (measured)"
    )
    assert cost_of_run(RunFolder(tmp_path)).startswith("not recorded")
