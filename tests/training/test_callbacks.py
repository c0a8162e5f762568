"""Each callback around the training steps on its own, with made-up steps and clocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from finetune.training import callbacks
from finetune.training.callbacks import BeforeFirstStep, History, ProgressBar, Throughput

ARGS: Any = None


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=clock, perf_counter=clock))
    return clock


def state(step: int = 1, of: int = 10, **changes: Any) -> Any:
    values = {"global_step": step, "max_steps": of, "is_world_process_zero": True, "log_history": [], "epoch": 0.5}
    return SimpleNamespace(**(values | {"num_input_tokens_seen": 0} | changes))


def control(**changes: bool) -> Any:
    flags = {"should_save": False, "should_training_stop": False, "should_log": False, "should_evaluate": False}
    return SimpleNamespace(**(flags | changes))


# --- Throughput


def train_step(throughput: Throughput, clock: Clock, at: Any, *, tokens: int, seconds: float) -> None:
    throughput.on_step_begin(ARGS, at, control())
    clock.now += seconds
    at.num_input_tokens_seen += tokens
    throughput.on_step_end(ARGS, at, control())


def test_throughput_counts_real_tokens_and_only_time_in_steps_after_the_first(clock: Clock) -> None:
    throughput, at = Throughput(), state(num_input_tokens_seen=500)  # 500 of an earlier attempt
    assert throughput.per_second() is None
    train_step(throughput, clock, at, tokens=100, seconds=50.0)
    assert throughput.per_second() is None
    assert throughput.take_interval() is None
    train_step(throughput, clock, at, tokens=100, seconds=2.0)
    clock.now += 1000  # a validation
    train_step(throughput, clock, at, tokens=200, seconds=1.0)
    assert throughput.per_second() == pytest.approx(300 / 3)
    assert throughput.take_interval() == pytest.approx(300 / 3)
    assert throughput.take_interval() is None
    train_step(throughput, clock, at, tokens=80, seconds=4.0)
    assert throughput.take_interval() == pytest.approx(20)
    assert throughput.per_second() == pytest.approx(380 / 7)


# --- History


def test_history_keeps_training_and_validation_losses_and_nothing_else() -> None:
    written: list[int] = []
    history = History(lambda rows: written.append(len(rows)))
    history.on_train_begin(ARGS, state(), control())
    logs = [
        {"loss": 2.0, "learning_rate": 1e-3, "grad_norm": 0.5, "tokens_per_second": 40.0, "epoch": 0.1, "step": 1,
         "entropy": 3.0},
        {"eval_loss": 1.5, "eval_runtime": 3.0, "epoch": 0.1, "step": 1},
        {"train_runtime": 9.0, "train_loss": 2.0, "epoch": 1.0, "step": 2},
    ]  # fmt: skip
    for number in range(1, len(logs) + 1):
        history.on_log(ARGS, state(log_history=logs[:number]), control())
    assert history.rows == [
        {"step": 1, "epoch": 0.1, "loss": 2.0, "learning_rate": 1e-3, "grad_norm": 0.5, "tokens_per_second": 40.0},
        {"step": 1, "epoch": 0.1, "eval_loss": 1.5},
    ]
    assert written == [1, 2]  # at every log, so that the record stays up to date


def test_a_loss_that_is_not_finite_is_recorded_as_null() -> None:
    history = History(lambda rows: None)
    history.on_log(ARGS, state(log_history=[{"loss": float("nan"), "grad_norm": float("inf"), "step": 3}]), control())
    assert history.rows == [{"step": 3, "epoch": None, "loss": None, "grad_norm": None, "tokens_per_second": None}]


def test_after_a_resume_history_continues_from_the_checkpoint() -> None:
    history = History(lambda rows: None)
    saved = [{"loss": 2.0, "step": 1}, {"loss": 1.9, "step": 2}]
    at = state(log_history=saved)
    history.on_train_begin(ARGS, at, control())
    at.log_history = [*saved, {"loss": 1.8, "step": 3}]
    history.on_log(ARGS, at, control())
    assert [row["step"] for row in history.rows] == [1, 2, 3]


def test_one_process_of_several_writes_the_history() -> None:
    history = History(lambda rows: pytest.fail("written"))
    history.on_log(ARGS, state(is_world_process_zero=False, log_history=[{"loss": 1.0, "step": 1}]), control())


# --- ProgressBar


def test_the_bar_shows_steps_time_left_loss_and_speed(capsys: pytest.CaptureFixture[str]) -> None:
    history = History(lambda rows: None)
    with ProgressBar(history) as bar:
        bar.on_train_begin(ARGS, state(4, 10), control())
        history.rows = [{"step": 5, "loss": 1.25, "tokens_per_second": 321.4}, {"step": 5, "eval_loss": 1.0}]
        bar.on_log(ARGS, state(5), control())
        bar.on_step_end(ARGS, state(7), control())
    shown = capsys.readouterr().err.split("\r")
    assert "4/10" in shown[1]  # a resumed run does not begin at 0
    assert "7/10" in shown[-1]
    assert "loss 1.250, 321 tokens/s" in shown[-1]
    assert "<" in shown[-1]  # elapsed<left


def test_the_bar_ends_its_line_however_training_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), ProgressBar(History(lambda rows: None)) as bar:
        bar.on_train_begin(ARGS, state(4, 10), control())
        raise RuntimeError
    assert capsys.readouterr().err.endswith("\n")
    with ProgressBar(History(lambda rows: None)):
        pass  # training did not begin


def test_the_bar_shows_additional_text(capsys: pytest.CaptureFixture[str]) -> None:
    history = History(lambda rows: None)
    with ProgressBar(history, lambda: "$0.42 of $25.00") as bar:
        bar.on_train_begin(ARGS, state(0), control())
        history.on_log(ARGS, state(1, log_history=[{"loss": 2.0, "step": 1}]), control())
        bar.on_log(ARGS, state(1), control())
        bar.on_step_end(ARGS, state(10), control())
    assert "loss 2.000, $0.42 of $25.00" in capsys.readouterr().err


def test_actions_before_the_first_step_run_in_order() -> None:
    done: list[str] = []
    BeforeFirstStep(lambda: done.append("a"), lambda: done.append("b")).on_train_begin(ARGS, state(), control())
    assert done == ["a", "b"]
