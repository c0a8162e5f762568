"""`finetune demo`: what fits into its minutes at a given speed, and that an interrupted demo is resumed."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.cli import main as cli
from finetune.demo import pace as pace_of
from finetune.demo import run as demo
from finetune.demo.schedule import (
    LEAST_QUESTIONS,
    LEAST_STEPS,
    REPORT_SECONDS,
    TUNED_SHARE,
    Pace,
    Training,
    questions_that_fit,
    steps_between_logs,
    training_that_fits,
)
from finetune.errors import EXIT_TRANSIENT
from finetune.evaluation.run import evaluate_run
from finetune.run_folder import RunFolder
from finetune.run_record import RunRecord
from finetune.training import resume
from tests.helpers.errors import reported
from tests.helpers.train_helpers import at_step

ConfigWriter = Callable[..., Path]
SLOW = Pace(step_seconds=6.0, question_seconds=2.0, load_seconds=10.0, threads=2)
FAST = Pace(step_seconds=1.2, question_seconds=0.5, load_seconds=3.0, threads=2)


def test_the_answers_of_both_models_fit_into_their_share_of_the_time() -> None:
    asked = questions_that_fit(540, SLOW, most=150)
    assert 0.9 * 0.35 * 540 < asked * 2.0 * (1 + TUNED_SHARE) <= 0.35 * 540
    assert questions_that_fit(540, FAST, most=150) == 150
    assert questions_that_fit(1, SLOW, most=150) == LEAST_QUESTIONS
    assert questions_that_fit(1, SLOW, most=6) == 6, "not more than there are"


@pytest.mark.parametrize("pace", [SLOW, FAST])
@pytest.mark.parametrize("eval_steps", [0, 50])
def test_training_and_all_that_follows_fit_into_the_time_left(pace: Pace, eval_steps: int) -> None:
    found = training_that_fits(400, pace, 90.0, most=10_000, validation_steps=5, eval_steps=eval_steps)
    validations = found.steps // eval_steps + 1 if found.eval_steps else 0
    after = TUNED_SHARE * 90 + 2 * pace.load_seconds + REPORT_SECONDS
    validation = 0.5 * 5 * pace.step_seconds
    needed = found.steps * pace.step_seconds + validations * validation + after
    assert 400 - 2 * pace.step_seconds - validation < needed <= 400
    assert found.eval_steps == eval_steps


def test_a_validation_that_takes_too_much_time_is_left_out() -> None:
    assert training_that_fits(400, SLOW, 90.0, most=500, validation_steps=24, eval_steps=100).eval_steps == 0
    assert training_that_fits(4000, SLOW, 90.0, most=5000, validation_steps=24, eval_steps=100).eval_steps == 100


def test_there_are_always_a_few_steps_and_never_more_than_the_examples_allow() -> None:
    assert training_that_fits(1, SLOW, 90.0, most=500, validation_steps=24, eval_steps=0).steps == LEAST_STEPS
    assert training_that_fits(10_000, FAST, 9.0, most=200, validation_steps=24, eval_steps=0).steps == 200


@pytest.mark.parametrize(
    ("steps", "configured", "found"), [(14, 10, 1), (39, 10, 1), (40, 10, 2), (150, 10, 7), (530, 10, 10), (530, 5, 5)]
)
def test_a_short_run_is_logged_often_enough_for_a_curve(steps: int, configured: int, found: int) -> None:
    assert steps_between_logs(steps, configured) == found
    assert found == configured or steps // found >= min(steps, 20)


@pytest.mark.parametrize("busy", [False, True])
def test_beside_a_busy_program_one_thread_less_is_used(busy: bool) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)

        def step() -> None:
            time.sleep(0.05 if (torch.get_num_threads() == 3) == busy else 0.01)

        seconds, threads = pace_of._fastest(step)
        assert threads == (2 if busy else 3) and 0.01 <= seconds < 0.05
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def config(tiny_config: ConfigWriter, tiny_data: Path, tmp_path: Path) -> Path:
    """A demo with its own prepared data; its four steps are not what the minutes allow."""
    source = {"kind": "jsonl", "path": str(tiny_data.parent / "records.jsonl")}
    source["databases"] = str(tiny_data.parent / "databases")
    return tiny_config(
        data={"sources": [source], "output_dir": str(tmp_path / "prepared")},
        training={"run_name": "demo"},
        evaluation={"max_new_tokens": 4},
    )


def test_the_demo_uses_as_many_steps_and_questions_as_fit(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "questions_that_fit", lambda *_: 3)
    assert cli.main(["demo", str(config), "--minutes", "0.5"]) == 0
    run = config.parent / "runs" / "demo"
    record, scores = json.loads((run / "run.json").read_text()), json.loads((run / "eval.json").read_text())
    assert record["steps"] == {"done": 6, "planned": 6}, "24 examples, 4 a step, though the config says 4 steps"
    assert {name: model["questions"] for name, model in scores["models"].items()} == {"base": 3, "tuned": 3}
    printed = capsys.readouterr()
    assert "3 questions fit" in printed.err and "6 training steps fit: 24 of 24 examples" in printed.err
    assert "execution accuracy: 0.0% before" in printed.out and "report.html" in printed.out
    assert "trained on 24 of the 24 training examples (measured)\n" in printed.err and "demo-fresh" not in printed.err
    assert printed.err.startswith("loading torch and transformers")
    announced, measured = (printed.err.index(text) for text in ("measuring this machine's speed", "this machine takes"))
    assert announced < measured
    assert [row["step"] for row in record["history"] if "loss" in row] == [1, 2, 3, 4, 5, 6], "a point for each step"
    rates = [row["learning_rate"] for row in record["history"] if "learning_rate" in row]
    assert max(rates) == record["config"]["training"]["learning_rate"]
    assert "6 steps of 4 examples" in (run / "report.html").read_text()

    evaluated = (run / "eval.json").stat().st_mtime_ns
    assert cli.main(["demo", str(config)]) == 0
    assert "is trained already" in capsys.readouterr().err
    assert (run / "eval.json").stat().st_mtime_ns == evaluated, "nothing is done again"


def test_a_demo_of_few_examples_says_how_to_train_on_more(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "training_that_fits", lambda *_, **__: Training(steps=2, eval_steps=0))
    assert cli.main(["demo", str(config), "--minutes", "4"]) == 0
    more = "another training.run_name with --minutes 30 trains on more"
    assert f"trained on 8 of the 24 training examples (measured); {more}\n" in capsys.readouterr().err
    assert "Training has seen 8 of the 24" in (config.parent / "runs" / "demo" / "report.html").read_text()
    monkeypatch.setattr("finetune.stage_end.following.SMALL", str(config))
    assert cli.main(["demo", str(config), "--minutes", "20.5"]) == 0
    assert "`make demo-fresh DEMO_MINUTES=41` trains" in capsys.readouterr().err, "more than it had"


def test_an_interrupted_demo_is_resumed_as_planned(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        at_step(3, lambda: signal.raise_signal(signal.SIGTERM), patched)
        assert cli.main(["demo", str(config)]) == EXIT_TRANSIENT
    assert f"finetune demo {config}   (goes on where it was)\n" in capsys.readouterr().err
    run = config.parent / "runs" / "demo"
    assert not (run / "adapter").exists()
    monkeypatch.setattr(demo, "measure", lambda *_: pytest.fail("planned a second time"))
    assert cli.main(["demo", str(config), "--minutes", "99"]) == 0
    record = json.loads((run / "run.json").read_text())
    assert record["steps"] == {"done": 6, "planned": 6} and record["attempts"] == 2
    assert (run / "report.html").is_file()
    capsys.readouterr()


def test_an_interrupted_demo_is_resumed_with_the_same_number_of_threads(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """During its training, and before the answers of the tuned model."""
    used: dict[str, int] = {}
    evaluate, before = evaluate_run, torch.get_num_threads()

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def answered(run: RunFolder, **settings: Any) -> None:
        used["answers"] = torch.get_num_threads()
        evaluate(run, **settings)

    def go_on(code: int) -> None:
        torch.set_num_threads(2)  # as a new process has them
        assert cli.main(["demo", str(config)]) == code

    monkeypatch.setattr(resume, "usable_cores", lambda: 2)
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(pace_of, "_fastest", lambda step: (0.1, 1))
            at_step(3, lambda: signal.raise_signal(signal.SIGTERM), patched)
            go_on(EXIT_TRANSIENT)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(demo, "evaluate_run", killed)
            at_step(5, lambda: used.update(training=torch.get_num_threads()), patched)
            go_on(EXIT_TRANSIENT)
        assert f"finetune demo {config}   (goes on where it was)\n" in capsys.readouterr().err
        monkeypatch.setattr(demo, "evaluate_run", answered)
        go_on(0)
    finally:
        torch.set_num_threads(before)
    assert used == {"training": 1, "answers": 1}


@pytest.mark.parametrize(
    ("began", "device", "threads", "warned"),
    [(1, "cpu", 1, False), (2, "cpu", 2, False), (3, "cpu", 2, True), (1, "cuda", 2, False), (None, "cpu", 2, False)],
)
def test_threads_of_a_resumed_run(
    began: int | None,
    device: str,
    threads: int,
    warned: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With two cores; fewer than at the start are reported."""
    monkeypatch.setattr(resume, "usable_cores", lambda: 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        record = RunRecord()
        record.threads = began
        resume.keep_threads(record, torch.device(device))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert ("began with 3 threads, and there are cores for 2" in capsys.readouterr().err) == warned


def test_a_demo_killed_before_its_first_record_starts_again(config: Path) -> None:
    run = config.parent / "runs" / "demo"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("# cut off\n")
    assert cli.main(["demo", str(config)]) == 0
    assert json.loads((run / "run.json").read_text())["status"] == "done"


@pytest.mark.parametrize("minutes", ["0", "-3", "nan", "inf", "ten"])
def test_minutes_are_a_number_above_zero(minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", "configs/demo_cpu.yaml", "--minutes", minutes])
    assert stopped.value.code == 2 and "--minutes" in capsys.readouterr().err


def test_a_demo_without_a_name_cannot_find_its_run_again(
    tiny_config: ConfigWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    with reported("demo.no_run_name"):
        assert cli.main(["demo", str(tiny_config())]) == 2
    assert "training.run_name" in capsys.readouterr().err
