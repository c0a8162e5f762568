"""The meter: what is spent, and ceilings that hold whatever the run, the disk, the clock and the hooks do."""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.budget.ledger import Ledger
from finetune.budget.meter import Ceilings, Meter
from finetune.budget.watchdog import HEARTBEAT_VARIABLE, heartbeat_seconds
from finetune.machine.billed_time import MachineTime
from tests.helpers.errors import raises

BEAT = 0.1


class Run:
    """A ledger, an age that the test sets, and what the meter's hooks were told."""

    def __init__(self, folder: Path) -> None:
        self.ledger, self.age = Ledger(folder / "ledger"), 0.0
        self.said: list[str] = []
        self.asked: list[str] = []
        self.ended: list[str] = []
        self.meters: list[Meter] = []

    def meter(
        self, usd: float | None = 3.6, dollars: float | None = None, hours: float | None = None, **hooks: Any
    ) -> Meter:
        values: dict[str, Any] = {
            "usd_per_hour": usd,
            "basis": None if usd is None else "catalog of 2026-11-20",
            "ceilings": Ceilings(dollars, hours),
            "say": self.said.append,
            "ask_stop": self.asked.append,
            "hard_stop": self.ended.append,
            "last_resort": False,
        }
        self.meters.append(Meter(self.ledger, MachineTime(rented=False, age=lambda: self.age), **values | hooks))
        return self.meters[-1]

    def begin(self, *arguments: Any, resumed_step: int | None = None, **values: Any) -> Meter:
        meter = self.meter(*arguments, **values)
        meter.begin(attempt=self.ledger.next_attempt(), machine={"zone": "z"}, resumed_step=resumed_step)
        return meter

    def seconds(self) -> list[float]:
        return [attempt.seconds for attempt in self.ledger.account().attempts]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.setenv(HEARTBEAT_VARIABLE, str(BEAT))
    monkeypatch.setattr("finetune.budget.meter.RETRY_SECONDS", BEAT)
    run = Run(tmp_path)
    yield run
    for meter in run.meters:
        meter.close("end of the test")


def wait_until(true: Callable[[], object], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "did not come about in time"
        time.sleep(0.01)


def test_heartbeats_reach_the_ledger_while_the_main_thread_does_nothing(run: Run) -> None:
    run.age = 600.0
    meter = run.begin(resumed_step=5)
    assert run.seconds() == [600.0]
    run.age, meter.step = 630.0, 7
    wait_until(lambda: run.seconds() == [630.0])
    meter.note("saved", folder="step-7", seconds=2.5)
    run.age = 640.0
    meter.close("done")
    meter.close("again")
    attempt = run.ledger.account().attempts[0]
    assert (attempt.seconds, attempt.step, attempt.reason, attempt.resumed_step) == (640.0, 7, "done", 5)
    assert '"event": "saved"' in (run.ledger.folder / attempt.file).read_text()
    assert not run.said


def test_spent_counts_every_attempt_with_the_time_since_the_last_beat(run: Run) -> None:
    run.age = 3600.0
    run.begin(usd=1.8).close("preempted")
    run.age = 1800.0
    meter = run.meter(usd=3.6, dollars=25.0, hours=24.0)
    spent = meter.spent()
    assert (spent.usd, spent.hours) == (pytest.approx(3.6), 1.5)
    assert spent.seconds_left == pytest.approx((25 - 3.6) / 3.6 * 3600)
    assert spent.text == (
        "$3.60 of $25.00 (measured hours x $3.6/h, catalog of 2026-11-20), 1.50 of 24 h (measured), 5.9 h left"
    )
    run.age += 1000.0
    assert meter.spent().usd == pytest.approx(4.6)


@pytest.mark.parametrize(
    ("usd", "dollars", "hours", "text", "left"),
    [
        (None, None, None, "0.50 h (measured), no ceiling", None),
        (None, None, 1.0, "0.50 of 1 h (measured), 30.0 min left", 1800),
        (2.0, None, None, "$1.00 (measured hours x $2/h, catalog of 2026-11-20), no ceiling", None),
        (2.0, 1.5, None, "$1.00 of $1.50 (measured hours x $2/h, catalog of 2026-11-20), 15.0 min left", 900),
        (2.0, 0.5, None, "$1.00 of $0.50 (measured hours x $2/h, catalog of 2026-11-20), 0 s left", -900),
        (2.0, 10.0, 0.51, "$1.00 of $10.00 (measured hours x $2/h, catalog of 2026-11-20), 0.50 of 0.51 h (measured), "
         "36 s left", 36),
    ],
)  # fmt: skip
def test_what_is_left(run: Run, usd: Any, dollars: Any, hours: Any, text: str, left: Any) -> None:
    run.age = 1800.0
    spent = run.meter(usd, dollars, hours).spent()
    assert spent.text == text and spent.seconds_left == (None if left is None else pytest.approx(left))


def test_a_run_with_less_left_than_a_save_interval_costs_must_not_begin(run: Run) -> None:
    run.age = 3000.0
    meter = run.meter(dollars=3.5)  # 500 s left
    assert meter.check_start(499.0) is None
    reason = meter.check_start(600.0)
    assert reason and reason.startswith("$3.00 of $3.50") and "10.0 min" in reason and "budget.max_run_usd" in reason
    assert run.meter().check_start(1e9) is None


def test_a_machine_that_may_be_taken_away_keeps_the_longest_start_free(run: Run) -> None:
    run.age = 300.0
    run.begin().close("preempted")
    run.age = 120.0
    meter = run.begin(dollars=2.0, restart_usd_per_hour=0.5, time_to_save=lambda: 30.0)  # 2000 s, 300 of them are spent
    assert meter.check_start(1280.0) is None
    reason = meter.check_start(1281.0)
    assert (
        reason
        and "less than the 21.4 min between two checkpoints and the 5.0 min kept for a start after a preemption"
        in reason
    )
    run.age = 1700.0 - 300 - 35
    time.sleep(4 * BEAT)
    assert not run.asked
    run.age += 6.0
    wait_until(lambda: run.asked)
    assert run.asked[0].endswith("5.5 min left; 5.0 min are kept for a start after a preemption")
    time.sleep(4 * BEAT)
    assert not run.ended
    run.age = 1700.0 - 4
    wait_until(lambda: run.ended)


def test_the_time_that_a_machine_stood_idle_before_is_no_start(run: Run) -> None:
    run.age = 7200.0
    meter = run.meter(hours=3.0, restart_usd_per_hour=9.0)
    assert meter.check_start(2700.0) is None
    reason = meter.check_start(2701.0)
    assert reason and "the 15.0 min kept for a start" in reason


def test_a_start_on_a_dearer_machine_is_kept_free_in_dollars(run: Run) -> None:
    run.age = 100.0
    meter = run.meter(
        dollars=1.0, hours=1.0, restart_usd_per_hour=18.0
    )  # 900 s are left, 500 of them for 100 s at $18/h
    assert meter.check_start(400.0) is None
    reason = meter.check_start(401.0)
    assert reason and "the 8.3 min kept for a start" in reason and "raise budget.max_run_usd" in reason


def test_this_attempt_is_told_with_the_seconds_up_to_now(run: Run) -> None:
    run.begin(usd=1.8).close("preempted")
    meter = run.meter()
    run.age = 1800.0
    before = meter.this_attempt()
    assert (before.number, before.usd, before.began_at) == (2, 1.8, None)
    meter.begin(attempt=2, machine={"zone": "z"}, resumed_step=4)
    run.age, meter.step = 3600.0, 9
    now = meter.this_attempt()
    assert (now.number, now.file, now.usd, now.zone) == (2, "attempt-002.jsonl", 3.6, "z")
    assert (now.resumed_step, now.step, now.reason) == (4, 9, None) and now.began_at


def test_the_projection_goes_by_the_pace_of_this_attempt(run: Run) -> None:
    run.age = 1000.0
    run.begin(usd=3.6).close("preempted")  # $1
    run.age = 2000.0
    meter = run.begin(usd=3.6, resumed_step=50)  # $2 so far
    assert meter.projected_usd(50, 100, 0.0) is None
    assert meter.projected_usd(60, 100, 100.0) == pytest.approx(3.0 + 40 * 10 / 1000)
    assert meter.projected_usd(100, 100, 500.0) == pytest.approx(3.0)
    assert run.meter(usd=None).projected_usd(60, 100, 100.0) is None


def test_a_run_is_asked_in_time_and_ended_before_the_ceiling(run: Run) -> None:
    meter = run.begin(dollars=1.0, time_to_save=lambda: 60.0)  # 1000 s
    run.age = 930.0
    time.sleep(4 * BEAT)
    assert not run.asked and not run.ended
    run.age = 945.0
    wait_until(lambda: run.asked)
    assert "budget.max_run_usd: $0.9" in run.asked[0]
    time.sleep(4 * BEAT)
    assert len(run.asked) == 1 and not run.ended
    run.age = 996.0
    wait_until(lambda: run.ended)
    assert run.seconds() == [996.0]
    assert run.ledger.account().attempts[0].reason == "budget_stop"
    time.sleep(4 * BEAT)
    assert len(run.ended) == len(run.asked) == 1
    meter.close("late")


def test_hours_hold_without_a_price_and_saves_get_twenty_seconds_at_least(run: Run) -> None:
    run.begin(usd=None, hours=1.0, time_to_save=lambda: 0.1)
    run.age = 3575.0
    time.sleep(3 * BEAT)
    assert not run.asked
    run.age = 3581.0
    wait_until(lambda: run.asked)
    assert "budget.max_hours" in run.asked[0]


def test_a_run_that_stops_when_asked_is_not_ended(run: Run) -> None:
    meter = run.begin(hours=1.0)
    run.age = 3585.0
    wait_until(lambda: run.asked)
    meter.close("budget_stop")
    run.age = 3600.0
    time.sleep(3 * BEAT)
    assert not run.ended


def test_hooks_that_fail_do_not_end_the_watch(run: Run) -> None:
    def fails(*_: object) -> Any:
        raise RuntimeError("a hook's own fault")

    calls: list[str] = []

    def fails_once(reason: str) -> None:
        calls.append(reason)
        if len(calls) == 1:
            raise OSError("run.json: no space left")

    run.begin(hours=1.0, time_to_save=fails, ask_stop=fails, hard_stop=fails_once)
    run.age = 3585.0
    wait_until(lambda: any("a hook's own fault" in text for text in run.said))
    run.age = 3597.0
    wait_until(lambda: len(calls) == 2)
    assert sum("time to save" in text for text in run.said) == 1


def test_a_ledger_that_cannot_be_written_is_said_once_and_caught_up(run: Run) -> None:
    meter = run.begin()
    away = run.ledger.folder.rename(run.ledger.folder.with_name("away"))
    run.age = 100.0
    wait_until(lambda: run.said)
    meter.note("saved", step=3)
    time.sleep(5 * BEAT)
    assert len(run.said) == 1 and "has vanished" in run.said[0]
    away.rename(run.ledger.folder)
    wait_until(lambda: run.seconds() == [100.0])
    wait_until(lambda: len(run.said) == 2)
    assert run.said[1] == "the ledger is written again"
    assert '"event": "saved"' in (run.ledger.folder / "attempt-001.jsonl").read_text()
    gone = run.ledger.folder.rename(run.ledger.folder.with_name("gone"))
    began = time.monotonic()
    meter.close("done")
    assert time.monotonic() - began < 5 and gone.is_dir()
    assert run.said[-1].endswith("nor what it cost since its last line there")


def test_a_ledger_that_never_could_be_written_refuses_the_run(run: Run) -> None:
    run.ledger.folder.write_text("a file where the folder belongs")
    with raises("disk.error", match="ledger"):
        run.meter()


def test_the_ceiling_holds_while_the_store_does_not_answer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = run.begin(hours=1.0)
    free = threading.Event()
    monkeypatch.setattr(meter, "_record", free.wait)  # as a bucket hangs in a write
    run.age = 3585.0
    wait_until(lambda: run.asked)
    run.age = 3596.0
    wait_until(lambda: run.ended, 5)
    free.set()


def test_the_clock_on_the_wall_may_jump(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    own = MachineTime(rented=False)
    before = own.seconds()
    meter = Meter(run.ledger, own, usd_per_hour=3600.0, basis="b", ceilings=Ceilings(before + 1000, None),
                  say=run.said.append, ask_stop=run.asked.append, hard_stop=run.ended.append, last_resort=False)  # fmt: skip
    meter.begin(attempt=1, machine={}, resumed_step=None)
    for jump in (1e8, -1e8):
        monkeypatch.setattr(time, "time", lambda jump=jump: 1.8e9 + jump)
        time.sleep(3 * BEAT)
    meter.close("done")
    assert not run.asked and not run.ended
    assert before < run.seconds()[0] < before + 20


@pytest.mark.parametrize("text", ["0", "-1", "31", "nan", "often"])
def test_a_heartbeat_that_is_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HEARTBEAT_VARIABLE, text)
    with raises("budget.bad_heartbeat", match=HEARTBEAT_VARIABLE):
        heartbeat_seconds()
    monkeypatch.delenv(HEARTBEAT_VARIABLE)
    assert heartbeat_seconds() == 30


def test_the_last_resort_is_set_only_where_there_is_a_ceiling(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    timers: list[float | None] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, **_: timers.append(seconds))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: timers.append(None))
    run.begin(last_resort=True).close("done")
    assert not timers
    run.age = 0.0
    meter = run.begin(hours=1.0, last_resort=True)
    wait_until(lambda: len(timers) > 3)
    assert set(timers) == {3600.0}
    run.age = 3598.0  # too near to put it off
    wait_until(lambda: run.ended)
    count = len(timers)
    time.sleep(3 * BEAT)
    assert len(timers) == count
    meter.close("done")
    assert timers[-1] is None and timers.count(None) == 1
    run.age = 0.0
    run.begin(hours=1e12, last_resort=True)
    wait_until(lambda: timers[-1] == 86400.0)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 5000), st.floats(0.1, 10), st.booleans()), min_size=1, max_size=8))
def test_spent_is_the_sum_of_the_attempts(
    tmp_path_factory: pytest.TempPathFactory, attempts: list[tuple[float, float, bool]]
) -> None:
    """Killed or ended, each counts up to when it was last heard of, at its own price."""
    run, usd = Run(tmp_path_factory.mktemp("run")), 0.0
    for seconds, price, killed in attempts:
        run.age = 0.0
        meter = run.meter(usd=price)
        assert (meter.spent().usd or 0.0) == pytest.approx(usd, abs=1e-4)  # milliseconds are the ledger's smallest
        meter._log = run.ledger.begin(
            attempt=run.ledger.next_attempt(),
            machine={},
            usd_per_hour=price,
            basis="b",
            seconds_before=0,
            resumed_step=None,
        )
        run.age = seconds
        meter._record()
        run.age += 25.0
        if not killed:
            meter._end = "done"
            meter._record()
        usd += (seconds if killed else seconds + 25.0) / 3600 * price
    assert run.ledger.account().usd == pytest.approx(usd, abs=1e-4)
    assert len(run.ledger.account().attempts) == len(attempts)
