"""Requests to stop: their sources, when a run stops, and that a step in progress is abandoned only if necessary."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from typing import Any

import pytest

pytest.importorskip("torch")
from transformers import TrainerControl, TrainerState

from finetune.runtime import distributed
from finetune.runtime.stop_request import NOTICE_SECONDS, ONE_SIGNAL_SECONDS, SAVE_SECONDS, Stop, StopSignals
from finetune.training.save_policy import EndOfStep, StepAbandoned


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def stop(clock: Clock, said: list[str]) -> Stop:
    return Stop(said.append, clock)


def ends(stop: Stop, clock: Clock, save_steps: int | None = None, every_minutes: float | None = None) -> EndOfStep:
    made = EndOfStep(stop, save_steps=save_steps, every_minutes=every_minutes, clock=clock)
    made.on_train_begin(*nothing())
    return made


def nothing() -> tuple[Any, TrainerState, TrainerControl]:
    return None, TrainerState(), TrainerControl()


def end(callback: EndOfStep, step: int, last: int = 100) -> TrainerControl:
    control = TrainerControl()
    callback.on_step_end(None, TrainerState(global_step=step, max_steps=last), control)  # type: ignore[arg-type]
    return control


def saves(callback: EndOfStep, clock: Clock, steps: int, seconds: float) -> list[int]:
    """The steps after which a checkpoint is saved, with steps of `seconds` each."""
    found = []
    for step in range(1, steps + 1):
        callback.on_step_begin(*nothing())
        clock.now += seconds
        if end(callback, step, last=steps).should_save:
            callback.on_save(*nothing())
            found.append(step)
    return found


def test_a_checkpoint_is_saved_every_so_many_steps_and_at_the_end(stop: Stop, clock: Clock) -> None:
    assert saves(ends(stop, clock, save_steps=4), clock, steps=10, seconds=1) == [4, 8, 10]


def test_a_checkpoint_is_saved_every_so_many_minutes_since_the_last_one(stop: Stop, clock: Clock) -> None:
    assert saves(ends(stop, clock, every_minutes=1), clock, steps=10, seconds=25) == [3, 6, 9, 10]


def test_a_checkpoint_is_saved_when_the_first_of_two_intervals_ends(stop: Stop, clock: Clock) -> None:
    both = ends(stop, clock, save_steps=5, every_minutes=1)
    assert saves(both, clock, steps=10, seconds=25) == [3, 5, 8, 10]


def test_without_an_interval_only_the_end_is_saved(stop: Stop, clock: Clock) -> None:
    assert saves(ends(stop, clock), clock, steps=10, seconds=3600) == [10]


@pytest.mark.parametrize(("reason", "budget"), [("signal", False), ("preemption", False), ("budget", True)])
def test_a_request_saves_and_stops_at_the_end_of_the_step(stop: Stop, clock: Clock, reason: Any, budget: bool) -> None:
    callback = ends(stop, clock)
    before = end(callback, 1)
    assert not before.should_save and not before.should_training_stop
    stop.ask(reason, "whatever")
    control = end(callback, 2)
    assert control.should_save and control.should_training_stop
    assert callback.budget_stop is budget


def test_a_budget_that_ends_with_the_last_step_has_not_stopped_the_run(stop: Stop, clock: Clock) -> None:
    stop.ask("budget", "the dollars are used up")
    callback = ends(stop, clock)
    assert end(callback, 100, last=100).should_save
    assert not callback.budget_stop


def test_a_budget_stop_that_follows_a_preemption_is_a_budget_stop(stop: Stop, clock: Clock) -> None:
    stop.ask("preemption", "the machine goes")
    stop.ask("budget", "the dollars are used up")
    callback = ends(stop, clock)
    end(callback, 7)
    assert callback.budget_stop and stop.first and stop.first.reason == "preemption"


def test_a_step_that_ends_in_time_is_waited_for(stop: Stop, clock: Clock) -> None:
    callback = ends(stop, clock)
    saves(callback, clock, steps=3, seconds=12)
    callback.on_step_begin(*nothing())
    stop.ask("preemption", "the machine goes", within=NOTICE_SECONDS)
    clock.now += 2
    callback.abandon_if_too_late()  # 10 s of the step remain, of 23 s less the time for saving
    assert stop.seconds_left() == NOTICE_SECONDS - 2 - SAVE_SECONDS


def test_a_step_that_would_end_too_late_is_abandoned(stop: Stop, clock: Clock) -> None:
    callback = ends(stop, clock)
    saves(callback, clock, steps=3, seconds=20)
    callback.on_step_begin(*nothing())
    callback.abandon_if_too_late()  # no request to stop
    stop.ask("signal", "SIGTERM", within=NOTICE_SECONDS)
    with pytest.raises(StepAbandoned):
        callback.abandon_if_too_late()


def test_the_next_step_is_expected_to_take_as_long_as_the_longest_recent_one(stop: Stop, clock: Clock) -> None:
    callback = ends(stop, clock)
    saves(callback, clock, steps=1, seconds=20)
    saves(callback, clock, steps=1, seconds=1)
    assert stop.step_seconds == 16.0
    saves(callback, clock, steps=10, seconds=1)
    assert stop.step_seconds == pytest.approx(16 * 0.8**10, abs=0.01)


def test_a_step_longer_than_any_before_is_abandoned_when_the_time_is_over(stop: Stop, clock: Clock) -> None:
    callback = ends(stop, clock)
    saves(callback, clock, steps=3, seconds=1)
    callback.on_step_begin(*nothing())
    stop.ask("preemption", "the machine goes", within=NOTICE_SECONDS)
    clock.now += NOTICE_SECONDS - SAVE_SECONDS - 0.1
    callback.abandon_if_too_late()
    clock.now += 0.2
    with pytest.raises(StepAbandoned):
        callback.abandon_if_too_late()


def test_the_time_reserved_for_saving_is_twice_the_last_save(stop: Stop) -> None:
    assert stop.time_to_save() == SAVE_SECONDS
    stop.step_seconds = 7.0
    stop.save_took(4.0)
    assert stop.time_to_save() == 15.0
    stop.save_took(0.01)
    assert stop.save_seconds == 3.0
    stop.save_took(1000.0)
    assert stop.save_seconds == NOTICE_SECONDS


def test_without_a_deadline_no_step_is_abandoned(stop: Stop, clock: Clock) -> None:
    callback = ends(stop, clock)
    saves(callback, clock, steps=2, seconds=3600)
    stop.ask("signal", "SIGINT")
    callback.on_step_begin(*nothing())
    callback.abandon_if_too_late()


def test_several_processes_finish_the_step(stop: Stop, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = ends(stop, clock)
    saves(callback, clock, steps=2, seconds=100)
    stop.ask("preemption", "the machine goes", within=NOTICE_SECONDS)
    monkeypatch.setenv("WORLD_SIZE", "2")
    callback.abandon_if_too_late()


def test_all_processes_stop_when_one_gets_a_request(stop: Stop, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "any_of_each", lambda flags: [True, False, False, False])
    control = end(ends(stop, clock), 3)
    assert control.should_save and control.should_training_stop


def test_a_save_due_in_one_process_is_done_by_all(stop: Stop, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "any_of_each", lambda flags: [False, False, False, True])
    control = end(ends(stop, clock), 3)
    assert control.should_save and not control.should_training_stop


def test_any_thread_may_request_a_stop_and_no_request_is_lost(stop: Stop) -> None:
    threads = [threading.Thread(target=stop.ask, args=("signal", str(number))) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(request.detail) for request in stop.requests) == list(range(50))


# --- signals


def test_the_same_signal_sent_twice_at_once_counts_once(stop: Stop, clock: Clock) -> None:
    """SkyPilot signals the job's whole process group, and `timeout` in it forwards the signal."""
    with StopSignals(stop, clock):
        signal.raise_signal(signal.SIGTERM)
        clock.now += ONE_SIGNAL_SECONDS / 2
        signal.raise_signal(signal.SIGTERM)
        assert [request.detail.split()[0] for request in stop.requests] == ["SIGTERM"]
        assert stop.requests[0].within == NOTICE_SECONDS


def test_a_second_ctrl_c_exits_at_once(stop: Stop, clock: Clock) -> None:
    with StopSignals(stop, clock):
        signal.raise_signal(signal.SIGINT)
        assert stop.first and stop.first.within is None
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


SECOND_TERM = f"""
import os, signal, time
from finetune.runtime.stop_request import Stop, StopSignals
with StopSignals(Stop(lambda text: print(text, flush=True))):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep({ONE_SIGNAL_SECONDS} + 0.2)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
"""


def test_a_second_sigterm_ends_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", SECOND_TERM], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGTERM
    assert "SIGTERM (once more: exit at once): finishing this step" in done.stdout


def test_the_previous_signal_handlers_are_restored(stop: Stop) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals(stop):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_outside_the_main_thread_training_runs_without_signal_handlers(stop: Stop) -> None:
    faults: list[BaseException] = []

    def train() -> None:
        try:
            with StopSignals(stop):
                pass
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert not faults
