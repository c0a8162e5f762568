"""What happens around the training steps, each callback by itself with made-up steps and clocks."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune import callbacks, checkpoint
from finetune.callbacks import Budget, CommitCheckpoints, History, ProgressBar, StopSignals, Throughput

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


# --- CommitCheckpoints


@pytest.fixture
def committer(tmp_path: Path) -> CommitCheckpoints:
    return CommitCheckpoints(tmp_path, keep_last=2, config_hash="c" * 64, data_hash="d" * 64)


def trainer_saves(root: Path, step: int, content: str = "weights") -> None:
    folder = root / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "weights.bin").write_text(content)


def test_what_the_trainer_saved_becomes_a_committed_checkpoint_and_old_ones_go(
    tmp_path: Path, committer: CommitCheckpoints
) -> None:
    for step in (2, 4, 6):
        trainer_saves(tmp_path, step)
        committer.on_save(ARGS, state(step), control())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-4", "step-6"]
    assert checkpoint.latest_valid(tmp_path) == (tmp_path / "step-6", [])
    assert checkpoint.read_manifest(tmp_path / "step-6")["step"] == 6
    checkpoint.check_same_run(tmp_path / "step-6", config_hash="c" * 64, data_hash="d" * 64)


def test_a_second_save_of_the_same_step_leaves_one_checkpoint(tmp_path: Path, committer: CommitCheckpoints) -> None:
    for _ in range(2):
        trainer_saves(tmp_path, 4)
        committer.on_save(ARGS, state(4), control())
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]
    assert checkpoint.fault(tmp_path / "step-4") is None


def test_one_process_of_several_commits(tmp_path: Path, committer: CommitCheckpoints) -> None:
    trainer_saves(tmp_path, 4)
    committer.on_save(ARGS, state(4, is_world_process_zero=False), control())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_all_ranks_wait_before_the_folder_is_renamed_and_after(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    look = lambda: seen.append(sorted(path.name for path in tmp_path.iterdir()))  # noqa: E731
    trainer_saves(tmp_path, 4)
    committer = CommitCheckpoints(tmp_path, keep_last=2, config_hash="c", data_hash="d", wait=look)
    committer.on_save(ARGS, state(4), control())
    committer.on_save(ARGS, state(4, is_world_process_zero=False), control())
    assert seen == [["checkpoint-4"], ["step-4"], ["step-4"], ["step-4"]]


def test_nothing_saved_is_nothing_committed(tmp_path: Path, committer: CommitCheckpoints) -> None:
    committer.on_save(ARGS, state(4), control())
    assert list(tmp_path.iterdir()) == []


# --- StopSignals


@pytest.fixture(autouse=True)
def handlers_are_put_back() -> Iterator[None]:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_training_with_a_checkpoint_when_the_step_has_ended(number: signal.Signals) -> None:
    said: list[str] = []
    with StopSignals(said.append) as stop:
        before = control()
        stop.on_step_end(ARGS, state(), before)
        assert not before.should_save
        assert not before.should_training_stop
        signal.raise_signal(number)
        assert stop.received == number.name
        assert said == [f"{number.name}: finishing this step, then saving a checkpoint (once more: exit at once)"]
        after = control()
        stop.on_step_end(ARGS, state(), after)
        assert after.should_save
        assert after.should_training_stop


def test_a_rank_stops_when_another_has_got_the_signal() -> None:
    asked: list[bool] = []

    def another_has(flag: bool) -> bool:
        asked.append(flag)
        return len(asked) == 2

    with StopSignals(lambda _: None, another_has) as stop:
        first, second = control(), control()
        stop.on_step_end(ARGS, state(1), first)
        stop.on_step_end(ARGS, state(2), second)
    assert asked == [False, False]
    assert (first.should_training_stop, second.should_training_stop, second.should_save) == (False, True, True)


def test_the_clock_of_one_rank_decides_on_the_budget(clock: Clock) -> None:
    late = Budget(max_hours=1.0, max_run_usd=None, usd_per_hour=None, agree=lambda _: True)
    early = Budget(max_hours=1.0, max_run_usd=None, usd_per_hour=None, agree=lambda _: False)
    late.on_step_end(ARGS, state(1), stopped := control())
    clock.now += 7200
    early.on_step_end(ARGS, state(1), goes_on := control())
    assert (late.exhausted, stopped.should_training_stop) == (True, True)
    assert (early.exhausted, goes_on.should_training_stop) == (False, False)


def test_a_second_ctrl_c_exits_at_once() -> None:
    with StopSignals(lambda _: None), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_a_second_sigterm_ends_the_process() -> None:
    with StopSignals(lambda _: None):
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_outside_the_main_thread_training_runs_without_signal_handlers() -> None:
    faults: list[BaseException] = []

    def train() -> None:
        try:
            with StopSignals(lambda _: None):
                pass
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert not faults


# --- Budget


def stops_at(budget: Budget, clock: Clock, *, step: int = 1, of: int = 10) -> bool:
    flags = control()
    budget.on_step_end(ARGS, state(step, of), flags)
    assert flags.should_save == flags.should_training_stop == budget.exhausted
    return budget.exhausted


@pytest.mark.parametrize(
    ("hours", "usd", "price", "before", "seconds"),
    [
        (1.0, None, None, 0.0, 3600),
        (1.0, None, None, 3000.0, 600),  # earlier attempts count
        (None, 5.0, 2.0, 0.0, 9000),  # 2.5 hours
        (None, 5.0, 2.0, 8990.0, 10),
        (1.0, 5.0, 2.0, 0.0, 3600),  # whichever comes first
        (3.0, 5.0, 2.0, 0.0, 9000),
    ],
)
def test_a_run_stops_when_its_hours_or_dollars_are_used_up(
    hours: float | None, usd: float | None, price: float | None, before: float, seconds: float, clock: Clock
) -> None:
    budget = Budget(max_hours=hours, max_run_usd=usd, usd_per_hour=price, seconds_before=before)
    clock.now += seconds - 1
    assert not stops_at(budget, clock)
    clock.now += 1
    assert stops_at(budget, clock)


def test_without_a_limit_a_run_never_stops_for_its_budget(clock: Clock) -> None:
    budget = Budget(max_hours=None, max_run_usd=None, usd_per_hour=2.0)
    clock.now += 1e9
    assert not stops_at(budget, clock)


def test_a_run_at_its_last_step_is_done_not_stopped(clock: Clock) -> None:
    budget = Budget(max_hours=1.0, max_run_usd=None, usd_per_hour=None)
    clock.now += 7200
    assert not stops_at(budget, clock, step=10, of=10)
    assert stops_at(budget, clock, step=9, of=10)


# --- Throughput


def train_step(throughput: Throughput, clock: Clock, at: Any, *, tokens: int, seconds: float) -> None:
    throughput.on_step_begin(ARGS, at, control())
    clock.now += seconds
    at.num_input_tokens_seen += tokens
    throughput.on_step_end(ARGS, at, control())


def test_speed_is_real_tokens_per_second_of_steps_without_the_first_and_without_what_lies_between(clock: Clock) -> None:
    throughput, at = Throughput(), state(num_input_tokens_seen=500)  # 500 of an earlier attempt
    assert throughput.per_second() is None
    train_step(throughput, clock, at, tokens=100, seconds=50.0)
    assert throughput.per_second() is None
    assert throughput.take_window() is None
    train_step(throughput, clock, at, tokens=100, seconds=2.0)
    clock.now += 1000  # a validation
    train_step(throughput, clock, at, tokens=200, seconds=1.0)
    assert throughput.per_second() == pytest.approx(300 / 3)
    assert throughput.take_window() == pytest.approx(300 / 3)
    assert throughput.take_window() is None
    train_step(throughput, clock, at, tokens=80, seconds=4.0)
    assert throughput.take_window() == pytest.approx(20)
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
    assert written == [1, 2]  # at every log, so that the record is never far behind


def test_a_loss_that_is_no_number_is_kept_as_null() -> None:
    history = History(lambda rows: None)
    history.on_log(ARGS, state(log_history=[{"loss": float("nan"), "grad_norm": float("inf"), "step": 3}]), control())
    assert history.rows == [{"step": 3, "epoch": None, "loss": None, "grad_norm": None, "tokens_per_second": None}]


def test_after_a_resume_history_goes_on_where_the_checkpoint_stopped() -> None:
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
