"""The budget of a run while it trains: what it has cost, its ceilings, its request to stop, and Google's notices."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

from finetune.budget.ledger import Attempt, Ledger
from finetune.budget.meter import Meter
from finetune.budget.watchdog import Watchdog
from finetune.config.schema import RunConfig
from finetune.errors import EXIT_OK
from finetune.machine.billed_time import MachineTime
from finetune.machine.preemption import PREEMPTED, PreemptionWatch
from finetune.machine.price import Ceilings, MachinePrice, dearest_usd_per_hour, facts, provisioned
from finetune.run_folder import RunFolder
from finetune.runtime import distributed
from finetune.runtime.console import say
from finetune.runtime.stop_request import NOTICE_SECONDS, Stop

LEAST_MINUTES = 1.0
"""That must be left of a budget where the config counts steps alone: what those take is not known before the first."""


class RunBudget(Protocol):
    """Of one attempt. Rank 0 keeps it; on the other ranks nothing is known of it and nothing happens."""

    def metered(self, hard_stop: Callable[[], None]) -> AbstractContextManager[None]:
        """Around the whole attempt. hard_stop: what to do before the process is ended where it does not stop by itself."""

    def book(self, reason: str) -> None:
        """An attempt that ends before it begins has cost the machine's boot and set-up all the same."""

    def notices(self) -> AbstractContextManager[None]:
        """While Google may announce that it takes the machine away."""

    def follow(self, progress: Callable[[], tuple[int, int]], wall_seconds: Callable[[], float]) -> None:
        """progress: optimizer steps done and planned. wall_seconds: since this attempt's first step began."""

    def nothing_left(self) -> str | None:
        """Why this attempt must not begin; None if it may. Rank 0 decides for all."""

    def note(self, event: str, **facts: Any) -> None:
        """A line of the ledger, such as a checkpoint; never raises and never waits."""

    def end(self, reason: str) -> None:
        """The last line of this attempt; what comes later is not on its meter."""

    def series(self) -> dict[str, float]:
        """For the trackers, with every loss: US dollars."""

    def short(self) -> str:
        """For the bar: spent of the ceiling, and what the run will have cost."""

    def record(self, reason: str | None = None) -> dict[str, Any]:
        """For run.json. reason: how this attempt ended, once it has."""


def open_budget(
    run: RunFolder, config: RunConfig, price: MachinePrice | None, stop: Stop, *, attempt: int, step: int
) -> RunBudget:
    """Of the attempt that begins. step: optimizer steps done before it. Raises UserError where the ledger cannot be read."""
    if distributed.is_rank0():
        return FirstRankBudget(run, config, price, stop, attempt=attempt, step=step)
    return OtherRankBudget()


class OtherRankBudget:
    """Nothing happens. The methods are those of RunBudget."""

    def metered(self, hard_stop: Callable[[], None]) -> AbstractContextManager[None]:
        return nullcontext()

    def book(self, reason: str) -> None:
        pass

    def notices(self) -> AbstractContextManager[None]:
        return nullcontext()

    def follow(self, progress: Callable[[], tuple[int, int]], wall_seconds: Callable[[], float]) -> None:
        pass

    def nothing_left(self) -> str | None:
        return None

    def note(self, event: str, **facts: Any) -> None:
        pass

    def end(self, reason: str) -> None:
        pass

    def series(self) -> dict[str, float]:
        return {}

    def short(self) -> str:
        return ""

    def record(self, reason: str | None = None) -> dict[str, Any]:
        return {}


class FirstRankBudget:
    """Ties the meter, the ledger and the watchdog to the run. The methods are those of RunBudget."""

    def __init__(
        self, run: RunFolder, config: RunConfig, price: MachinePrice | None, stop: Stop, *, attempt: int, step: int
    ) -> None:
        self._stop, self._first_step = stop, step
        self._save_minutes = config.checkpoint.every_minutes or LEAST_MINUTES
        self._progress: Callable[[], tuple[int, int]] = lambda: (step, 0)
        self._wall_seconds: Callable[[], float] = lambda: 0.0
        self._hard_stop: Callable[[], None] = lambda: None
        ledger, machine = Ledger(run.ledger), facts() if provisioned() else {}
        self._meter = Meter(
            ledger.account(),
            MachineTime(provisioned=provisioned()),
            price,
            Ceilings(run_usd=config.budget.max_run_usd, hours=config.budget.max_hours),
            restart_usd_per_hour=dearest_usd_per_hour() if machine.get("spot") else None,
        )
        self._log = ledger.new_attempt(attempt, machine=machine, price=price, resumed_step=step or None)
        self._watchdog = Watchdog(
            self._meter,
            self._log,
            say=say,
            time_to_save=stop.time_to_save,
            ask_stop=lambda reason: stop.ask("budget", f"the budget is nearly used up ({reason})"),
            hard_stop=self._end_now,
        )

    @contextmanager
    def metered(self, hard_stop: Callable[[], None]) -> Iterator[None]:
        self._hard_stop = hard_stop
        for problem in self._meter.earlier.problems:
            say(f"ledger: {problem}")
        self._watchdog.start()
        try:
            yield
        finally:
            self._watchdog.close("failed")

    def book(self, reason: str) -> None:
        time = self._meter.time
        self._log.begin(time.take())
        self._log.end(time.take(), reason, self._first_step or None)
        time.mark()

    @contextmanager
    def notices(self) -> Iterator[None]:
        with PreemptionWatch(self._on_notice):
            yield

    def _on_notice(self, key: str) -> None:
        if key == PREEMPTED:
            self._stop.ask("preemption", "Google takes this machine back", NOTICE_SECONDS)
        else:  # up to an hour ahead; the machine's own shutdown brings a SIGTERM
            say("Google announces maintenance that will stop this machine; training goes on until then")

    def follow(self, progress: Callable[[], tuple[int, int]], wall_seconds: Callable[[], float]) -> None:
        self._progress, self._wall_seconds = progress, wall_seconds

    def nothing_left(self) -> str | None:
        return self._meter.check_start(60 * self._save_minutes)

    def note(self, event: str, **facts: Any) -> None:
        self._watchdog.note(event, **facts)

    def end(self, reason: str) -> None:
        self._watchdog.reached(self._step)
        self._watchdog.close(reason)

    def series(self) -> dict[str, float]:
        self._watchdog.reached(self._step)
        spent, projected = self._meter.spent(), self._projected()
        values = {
            "spent_usd": spent.usd, "ceiling_usd": spent.ceilings.run_usd, "projected_usd": projected,
            "hours_on_meter": spent.hours,
        }  # fmt: skip
        return {name: round(value, 6) for name, value in values.items() if value is not None}

    def short(self) -> str:
        spent = self._meter.spent()
        if spent.usd is None:
            return ""
        ceiling, projected = spent.ceilings.run_usd, self._projected()
        parts = [f"${spent.usd:.2f}" + (f" of ${ceiling:.2f}" if ceiling else "")]
        if projected is not None:
            parts.append(f"${projected:.2f} at the end (est.)")
        return ", ".join(parts)

    def record(self, reason: str | None = None) -> dict[str, Any]:
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

    @property
    def _step(self) -> int:
        return self._progress()[0]

    def _this(self, reason: str | None) -> Attempt:
        return replace(self._log.told(), seconds=self._meter.time.seconds(), step=self._step, reason=reason)

    def _projected(self) -> float | None:
        done, planned = self._progress()
        if not planned:
            return None
        return self._meter.projected_usd(done - self._first_step, planned - done, self._wall_seconds())

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
