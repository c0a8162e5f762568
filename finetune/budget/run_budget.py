"""What a run costs while it trains: the meter of this attempt, tied to the run, its request to stop and Google's notices."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from finetune.budget.ledger import Attempt, Ledger
from finetune.budget.meter import Meter
from finetune.config.schema import RunConfig
from finetune.errors import EXIT_OK
from finetune.machine.billed_time import MachineTime
from finetune.machine.preemption import PREEMPTED, PreemptionWatch
from finetune.machine.price import Ceilings, MachinePrice, dearest_usd_per_hour, facts, rented
from finetune.run_folder import RunFolder
from finetune.runtime import distributed
from finetune.runtime.console import say
from finetune.runtime.stop_request import NOTICE_SECONDS, Stop

LEAST_MINUTES = 1.0
"""That must be left of a budget where the config counts steps alone: what those take is not known before the first."""


class Spending:
    """Of one attempt. Only the first of several processes has a meter; to the others nothing is known and nothing happens.

    step: optimizer steps done before this attempt.
    """

    def __init__(
        self, run: RunFolder, config: RunConfig, price: MachinePrice | None, stop: Stop, *, attempt: int, step: int
    ) -> None:
        """Raises UserError where the ledger cannot be read."""
        self._config, self._stop, self._attempt, self._first_step = config, stop, attempt, step
        self._price, self._time = price, MachineTime(rented=rented())
        self._machine = facts() if distributed.first() and rented() else {}
        self._progress: Callable[[], tuple[int, int]] = lambda: (step, 0)
        self._wall_seconds: Callable[[], float] | None = None
        self._hard_stop: Callable[[], None] = lambda: None
        self._meter = None
        if distributed.first():
            self._meter = Meter(
                Ledger(run.ledger),
                self._time,
                usd_per_hour=price.usd_per_hour if price else None,
                basis=price.basis if price else None,
                ceilings=Ceilings(config.budget.max_run_usd, config.budget.max_hours),
                say=say,
                time_to_save=stop.time_to_save,
                ask_stop=lambda reason: stop.ask("budget", f"the budget is nearly used up ({reason})"),
                hard_stop=self._end_now,
                restart_usd_per_hour=dearest_usd_per_hour() if self._machine.get("spot") else None,
            )

    @property
    def step(self) -> int:
        return self._progress()[0]

    @contextmanager
    def metered(self, hard_stop: Callable[[], None]) -> Iterator[None]:
        """Around the whole attempt. hard_stop: what to do before the process is ended where it does not stop by itself."""
        self._hard_stop = hard_stop
        if self._meter is None:
            yield
            return
        for problem in self._meter.earlier.problems:
            say(f"ledger: {problem}")
        self._meter.begin(attempt=self._attempt, machine=self._machine, resumed_step=self._first_step or None)
        try:
            yield
        finally:
            self._meter.close("failed")

    def book(self, reason: str) -> None:
        """An attempt that ends before it begins has cost the machine's boot and set-up all the same."""
        if self._meter:
            log = self._meter.ledger.begin(
                attempt=self._attempt, machine=self._machine, usd_per_hour=self._price.usd_per_hour if self._price else None,
                basis=self._price.basis if self._price else None, seconds_before=self._time.take(),
                resumed_step=self._first_step or None,
            )  # fmt: skip
            log.end(self._time.take(), reason, self._first_step or None)
            self._time.mark()

    @contextmanager
    def notices(self) -> Iterator[None]:
        """While Google may announce that it takes the machine away."""
        if self._meter is None:
            yield
            return
        with PreemptionWatch(self._on_notice):
            yield

    def _on_notice(self, key: str) -> None:
        if key == PREEMPTED:
            self._stop.ask("preemption", "Google takes this machine back", NOTICE_SECONDS)
        else:  # up to an hour ahead; the machine's own shutdown brings a SIGTERM
            say("Google announces maintenance that will stop this machine; training goes on until then")

    def follow(self, progress: Callable[[], tuple[int, int]], wall_seconds: Callable[[], float]) -> None:
        """progress: optimizer steps done and planned. wall_seconds: since this attempt's first step began."""
        self._progress, self._wall_seconds = progress, wall_seconds

    def nothing_left(self) -> str | None:
        """Why this attempt must not begin; None if it may. The same for all processes."""
        minutes = self._config.checkpoint.every_minutes or LEAST_MINUTES
        return distributed.from_first(lambda: self._meter.check_start(60 * minutes) if self._meter else None)

    def note(self, event: str, **facts: Any) -> None:
        if self._meter:
            self._meter.note(event, **facts)

    def end(self, reason: str) -> None:
        """The last line of this attempt; what comes later is not on its meter."""
        if self._meter:
            self._meter.step = self.step
            self._meter.close(reason)

    def series(self) -> dict[str, float]:
        """For the trackers, with every loss: US dollars."""
        if self._meter is None:
            return {}
        self._meter.step = self.step
        spent, projected = self._meter.spent(), self._projected()
        values = {
            "spent_usd": spent.usd, "ceiling_usd": spent.ceilings.run_usd, "projected_usd": projected,
            "hours_on_meter": spent.hours,
        }  # fmt: skip
        return {name: round(value, 6) for name, value in values.items() if value is not None}

    def short(self) -> str:
        """For the bar: spent of the ceiling, and what the run will have cost."""
        if self._meter is None or (usd := self._meter.spent().usd) is None:
            return ""
        ceiling, projected = self._config.budget.max_run_usd, self._projected()
        parts = [f"${usd:.2f}" + (f" of ${ceiling:.2f}" if ceiling else "")]
        if projected is not None:
            parts.append(f"${projected:.2f} at the end (est.)")
        return ", ".join(parts)

    def record(self, reason: str | None = None) -> dict[str, Any]:
        """For run.json. reason: how this attempt ended, once it has."""
        if self._meter is None:
            return {}
        spent, projected = self._meter.spent(), self._projected()
        return {
            "spent_usd": None if spent.usd is None else round(spent.usd, 4),
            "spent_basis": None if spent.usd is None else spent.text,
            "spending": {
                "usd": None if spent.usd is None else round(spent.usd, 4),
                "hours": round(spent.hours, 4),
                "ceiling_usd": spent.ceilings.run_usd,
                "ceiling_hours": spent.ceilings.hours,
                "projected_usd": None if projected is None else round(projected, 4),
                "basis": f"{spent.text}; projected: estimated from the pace so far",
            },
            "attempt_log": [*map(_told, self._meter.earlier.attempts), _told(self._this(reason))],
        }

    def _this(self, reason: str | None) -> Attempt:
        assert self._meter is not None
        return replace(self._meter.this_attempt(), step=self.step, reason=reason)

    def _projected(self) -> float | None:
        done, planned = self._progress()
        if self._meter is None or self._wall_seconds is None or not planned:
            return None
        return self._meter.projected_usd(done, planned, self._wall_seconds())

    def _end_now(self, reason: str) -> None:
        """The run did not stop by itself: a step hangs. The last committed checkpoint is what there is."""
        say(f"{reason}; ending the run, the newest checkpoint is kept")
        try:
            self._hard_stop()
        finally:
            distributed.end_all(reason, EXIT_OK)
            os._exit(EXIT_OK)


def _told(attempt: Attempt) -> dict[str, Any]:
    return {
        "attempt": attempt.number,
        "started_at": attempt.began_at,
        "machine": attempt.machine.get("name"),
        "zone": attempt.zone,
        "gpu": attempt.gpu,
        "spot": attempt.spot,
        "usd_per_hour": attempt.usd_per_hour,
        "hours": round(attempt.hours, 4),
        "usd": None if attempt.usd is None else round(attempt.usd, 4),
        "from_step": attempt.resumed_step or 0,
        "to_step": attempt.step,
        "reason": attempt.reason,
    }
