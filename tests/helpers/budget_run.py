"""A run's ledger and its meters on a fake clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.budget.ledger import AttemptLog, Ledger
from finetune.budget.meter import Meter
from finetune.budget.watchdog import SAVE_RESERVE_SECONDS, Watchdog
from finetune.machine.billed_time import MachineTime
from finetune.machine.price import Ceilings, MachinePrice
from tests.helpers.fake_clock import FakeClock

BASIS = "catalog of 2026-11-20"


class BudgetRun:
    """clock: of the current attempt, which began at 0. said: messages of the watchdogs. asked, ended: the reasons that they
    passed to ask_stop and hard_stop."""

    def __init__(self, folder: Path) -> None:
        self.ledger, self.clock = Ledger(folder / "ledger"), FakeClock()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.ended: list[str] = []
        self.watchdogs: list[Watchdog] = []

    def meter(
        self,
        usd: float | None = 3.6,
        dollars: float | None = None,
        hours: float | None = None,
        restart_usd: float | None = None,
    ) -> Meter:
        """usd: US dollars an hour of the machine. dollars, hours: the ceilings."""
        price = None if usd is None else MachinePrice(usd, BASIS)
        time = MachineTime(provisioned=False, age=self.clock)
        return Meter(self.ledger.account(), time, price, Ceilings(dollars, hours), restart_usd_per_hour=restart_usd)

    def log(self, meter: Meter, resumed_step: int | None = None) -> AttemptLog:
        return self.ledger.new_attempt(
            self.ledger.next_attempt(), machine={"zone": "z"}, price=meter.price, resumed_step=resumed_step
        )

    def watch(self, meter: Meter, *, resumed_step: int | None = None, **hooks: Any) -> Watchdog:
        """A watchdog over a new attempt, which has begun."""
        values: dict[str, Any] = {
            "say": self.said.append,
            "time_to_save": lambda: SAVE_RESERVE_SECONDS,
            "ask_stop": self.asked.append,
            "hard_stop": self.ended.append,
            "last_resort": False,
            "event": self.clock.event,
        }
        watchdog = Watchdog(meter, self.log(meter, resumed_step), **values | hooks)
        self.watchdogs.append(watchdog)
        watchdog.start()
        self.clock.settle()
        return watchdog

    def past_attempt(self, seconds: float, usd: float | None = 3.6) -> None:
        """A preempted attempt of this many seconds."""
        log = self.log(self.meter(usd))
        log.begin(seconds)
        log.end(seconds, "preempted", None)

    def seconds(self) -> list[float]:
        return [attempt.seconds for attempt in self.ledger.account().attempts]

    def close(self) -> None:
        for watchdog in self.watchdogs:
            watchdog.close("end of the test")
