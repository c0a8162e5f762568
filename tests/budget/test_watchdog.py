"""The watchdog enforces the ceilings whatever the run, the disk, the clock and the hooks do, and keeps the ledger up to date.

Its threads are real, the seconds are a FakeClock's. test_watchdog_stops.py has processes that really hang.
"""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.budget.ledger import Ledger
from finetune.budget.meter import Meter
from finetune.budget.watchdog import HEARTBEAT_VARIABLE, heartbeat_seconds
from finetune.errors import UserError
from finetune.machine.billed_time import MachineTime
from finetune.machine.price import Ceilings, MachinePrice
from tests.helpers.budget_run import BudgetRun
from tests.helpers.errors import raises


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BudgetRun]:
    monkeypatch.delenv(HEARTBEAT_VARIABLE, raising=False)
    run = BudgetRun(tmp_path)
    yield run
    run.close()


def test_heartbeats_reach_the_ledger_while_the_main_thread_does_nothing(run: BudgetRun) -> None:
    run.clock.seconds = 600.0
    watchdog = run.watch(run.meter(), resumed_step=5)
    assert run.seconds() == [600.0]
    run.clock.advance(29.0)
    assert run.seconds() == [600.0]
    watchdog.reached(7)
    run.clock.advance(1.0)
    assert run.seconds() == [630.0]
    assert run.ledger.account().attempts[0].step == 7
    watchdog.note("saved", folder="step-7", seconds=2.5)
    run.clock.settle()
    assert '"event": "saved"' in (run.ledger.folder / "attempt-001.jsonl").read_text()
    run.clock.advance(10.0)
    watchdog.close("done")
    watchdog.close("again")
    attempt = run.ledger.account().attempts[0]
    assert (attempt.seconds, attempt.step, attempt.reason, attempt.resumed_step) == (640.0, 7, "done", 5)
    assert not run.said


def test_a_run_is_asked_in_time_and_ended_before_the_ceiling(run: BudgetRun) -> None:
    watchdog = run.watch(run.meter(dollars=1.0), time_to_save=lambda: 60.0)  # 1000 s
    run.clock.advance(939.0)
    assert not run.asked and not run.ended
    run.clock.advance(2.0)
    assert len(run.asked) == 1 and "budget.max_run_usd: $0.94 of $1.00" in run.asked[0]
    run.clock.advance(53.0)
    assert len(run.asked) == 1 and not run.ended
    run.clock.advance(2.0)
    assert len(run.ended) == 1 and "the run did not stop by itself" in run.ended[0]
    assert run.seconds() == [pytest.approx(995.0)]
    assert run.ledger.account().attempts[0].reason == "budget_stop"
    run.clock.advance(60.0)
    assert len(run.ended) == len(run.asked) == 1
    watchdog.close("late")
    assert run.ledger.account().attempts[0].reason == "budget_stop"


def test_a_machine_that_may_be_preempted_keeps_a_restart_reserve(run: BudgetRun) -> None:
    run.past_attempt(300.0)
    run.clock.seconds = 120.0
    run.watch(run.meter(dollars=2.0, restart_usd=0.5), time_to_save=lambda: 30.0)  # 1700 s are left to this attempt
    run.clock.advance(1700 - 300 - 30 - 120 - 1)
    assert not run.asked
    run.clock.advance(2.0)
    assert run.asked[0].endswith("5.5 min left; 5.0 min are reserved for a restart after a preemption")
    run.clock.advance(300.0)
    assert not run.ended
    run.clock.advance(30.0)
    assert run.ended


def test_hours_hold_without_a_price_and_saves_get_twenty_seconds_at_least(run: BudgetRun) -> None:
    run.clock.seconds = 3500.0
    run.watch(run.meter(usd=None, hours=1.0), time_to_save=lambda: 0.1)
    run.clock.advance(79.0)
    assert not run.asked
    run.clock.advance(2.0)
    assert "budget.max_hours" in run.asked[0]


def test_a_run_that_stops_when_asked_is_not_ended(run: BudgetRun) -> None:
    run.clock.seconds = 3585.0
    watchdog = run.watch(run.meter(hours=1.0))
    assert run.asked
    watchdog.close("budget_stop")
    run.clock.advance(60.0)
    assert not run.ended and run.seconds() == [3585.0]


def test_a_run_without_a_ceiling_is_left_alone(run: BudgetRun) -> None:
    run.watch(run.meter())
    run.clock.advance(3600.0)
    assert not run.asked and not run.ended and run.seconds() == [3600.0]


def test_hooks_that_fail_do_not_end_the_watch(run: BudgetRun) -> None:
    def fails(*_: object) -> Any:
        raise RuntimeError("a hook's own fault")

    calls: list[str] = []

    def fails_once(reason: str) -> None:
        calls.append(reason)
        if len(calls) == 1:
            raise OSError("run.json: no space left")

    run.clock.seconds = 3585.0
    run.watch(run.meter(hours=1.0), time_to_save=fails, ask_stop=fails, hard_stop=fails_once)
    assert any("the budget watchdog continues after an error: RuntimeError" in text for text in run.said)
    run.clock.advance(12.0)
    assert len(calls) == 2
    assert sum("time for a save" in text for text in run.said) == 1


def test_a_ledger_that_cannot_be_written_is_reported_once_and_caught_up(run: BudgetRun) -> None:
    watchdog = run.watch(run.meter())
    away = run.ledger.folder.rename(run.ledger.folder.with_name("away"))
    run.clock.advance(100.0)
    watchdog.note("saved", step=3)
    run.clock.advance(100.0)
    assert len(run.said) == 1 and "has vanished" in run.said[0]
    away.rename(run.ledger.folder)
    run.clock.advance(30.0)
    assert run.seconds() == [220.0]  # a heartbeat every 30 s since the note at 100 s
    assert run.said[1:] == ["the ledger is up to date again"]
    assert '"event": "saved"' in (run.ledger.folder / "attempt-001.jsonl").read_text()
    gone = run.ledger.folder.rename(run.ledger.folder.with_name("gone"))
    watchdog.close("done")
    assert gone.is_dir() and not run.ledger.folder.exists()
    assert run.said[-1].endswith("its cost since the last line is missing")


def test_an_attempt_that_never_began_has_no_end(run: BudgetRun) -> None:
    run.ledger.folder.write_text("a file where the folder belongs")
    meter = BudgetRun(run.ledger.folder.parent / "another").meter()
    log = run.ledger.new_attempt(1, machine={}, price=meter.price, resumed_step=None)
    run.log = lambda *_: log  # type: ignore[method-assign]
    with raises("disk.error", match="ledger"):
        run.watch(meter)
    run.watchdogs[0].close("failed")
    assert not run.said and run.ledger.folder.is_file()


def test_the_ceiling_holds_while_the_store_does_not_respond(run: BudgetRun, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = run.clock.event()
    watchdog = run.watch(run.meter(hours=1.0))
    monkeypatch.setattr(watchdog, "_record", answers.wait)  # as a bucket hangs in a write
    run.clock.advance(3581.0)
    assert run.asked and not run.ended
    run.clock.advance(14.0 + 2.4)
    assert not run.ended, "half of the last five seconds are for the last line"
    run.clock.advance(0.2)
    assert run.ended
    answers.set()


def test_the_wall_clock_may_jump(run: BudgetRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meter reads the real age of this process here."""
    own = MachineTime(provisioned=False)
    before = own.seconds()
    ceilings = Ceilings(run_usd=before + 1000)
    watchdog = run.watch(Meter(run.ledger.account(), own, MachinePrice(3600.0, "b"), ceilings))
    for jump in (1e8, -1e8):
        monkeypatch.setattr(time, "time", lambda jump=jump: 1.8e9 + jump)
        run.clock.advance(90.0)
    watchdog.close("done")
    assert not run.asked and not run.ended
    assert before < run.seconds()[0] < before + 60


@pytest.mark.parametrize("text", ["0", "-1", "31", "nan", "often"])
def test_an_invalid_heartbeat_interval_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HEARTBEAT_VARIABLE, text)
    with raises("budget.bad_heartbeat", match=HEARTBEAT_VARIABLE):
        heartbeat_seconds()
    monkeypatch.delenv(HEARTBEAT_VARIABLE)
    assert heartbeat_seconds() == 30


def test_the_last_resort_is_set_only_where_there_is_a_ceiling(run: BudgetRun, monkeypatch: pytest.MonkeyPatch) -> None:
    timers: list[float | None] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, **_: timers.append(seconds))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: timers.append(None))
    run.watch(run.meter(), last_resort=True).close("done")
    assert not timers
    run.clock.seconds = 0.0
    watchdog = run.watch(run.meter(hours=1.0), last_resort=True)
    run.clock.advance(90.0)
    assert timers == [3600.0, 3570.0, 3540.0, 3510.0]
    run.clock.seconds = 3598.0
    run.clock.advance(5.0)
    assert run.ended and len(timers) == 4, "too near to put it off"
    watchdog.close("done")
    assert timers[4:] == [None]
    run.clock.seconds = 0.0
    run.watch(run.meter(hours=1e12), last_resort=True)
    assert timers[5:] == [86400.0]


@pytest.mark.parametrize("attempts", [2, 3])
def test_attempts_that_spend_at_once_share_the_ceiling(attempts: int, run: BudgetRun) -> None:
    """Each counts what the others have spent since it began, so all together stay below the ceiling ($51 of $25 once)."""
    for _ in range(attempts):
        run.watch(run.meter(dollars=25.0))
    alone = 25.0 / 3.6 * 3600
    run.clock.advance(alone / attempts - 120)
    assert not run.asked and not run.ended
    run.clock.advance(240)
    assert len(run.asked) == len(run.ended) == attempts
    spent = run.ledger.account().usd
    assert spent is not None and 24.7 < spent <= 25.0


def test_an_account_that_cannot_be_read_leaves_the_last_one_and_is_reported_once(
    run: BudgetRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = run.meter(dollars=25.0)
    run.past_attempt(600.0)
    run.watch(meter)
    run.clock.advance(30.0)
    assert meter.usage().usd == pytest.approx(0.63)

    def unreadable(self: object, without: str | None = None) -> None:
        raise UserError("the bucket does not answer", code="disk.error")

    monkeypatch.setattr(Ledger, "account", unreadable)
    run.clock.advance(90.0)
    assert meter.usage().usd == pytest.approx(0.72)
    assert len(run.said) == 1 and "the account of other attempts is not up to date" in run.said[0]
