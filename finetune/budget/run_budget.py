"""The budget of a run while it trains: its cost so far, its ceilings, its request to stop, and preemption notices."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

from finetune.budget.attempts import Attempt
from finetune.budget.ledger import Ledger
from finetune.budget.meter import Meter
from finetune.budget.price_watch import TOO_DEAR, PriceWatch
from finetune.budget.watchdog import Watchdog
from finetune.config.schema import RunConfig
from finetune.errors import EXIT_OK, TakenOver
from finetune.machine.billed_time import MachineTime
from finetune.machine.preemption import PREEMPTED, PreemptionWatch
from finetune.machine.price import Ceilings, MachinePrice, dearest_usd_per_hour, facts, provisioned
from finetune.run_folder import RunFolder
from finetune.runtime import distributed, process_group
from finetune.runtime.console import say
from finetune.runtime.quantities import usd_text
from finetune.runtime.stop_request import NOTICE_SECONDS, Stop

MIN_MINUTES = 1.0
"""That must be left of a budget if the config sets the save interval in steps alone: their time is unknown before the first."""


class RunBudget(Protocol):
    """The budget of one attempt. Rank 0 keeps it; on the other ranks every method does nothing."""

    def metered(self, hard_stop: Callable[[], None]) -> AbstractContextManager[None]:
        """Wraps the whole attempt. hard_stop: called before the process is killed because it did not stop by itself."""

    def book(self, reason: str) -> None:
        """Records an attempt that ends before training begins: it has still cost the machine's boot and set-up."""

    def notices(self) -> AbstractContextManager[None]:
        """Listens for Google's preemption notices."""

    def follow(self, progress: Callable[[], tuple[int, int]], wall_seconds: Callable[[], float]) -> None:
        """progress: optimizer steps done and planned. wall_seconds: since this attempt's first step began."""

    def refusal_to_start(self) -> str | None:
        """Why this attempt must not begin; None if it may. Rank 0 decides for all."""

    def note(self, event: str, **facts: Any) -> None:
        """Adds a line to the ledger, such as a checkpoint; never raises and never waits."""

    def end(self, reason: str) -> None:
        """Writes the last line of this attempt; later time is not on its meter."""

    def series(self) -> dict[str, float]:
        """For the trackers, with every loss: cost in US dollars and hours."""

    def short(self) -> str:
        """For the progress bar: cost so far, the ceiling, and the projected cost of the run."""

    def record(self, reason: str | None = None) -> dict[str, Any]:
        """For run.json. reason: how this attempt ended, once it has."""


def open_budget(
    run: RunFolder, config: RunConfig, price: MachinePrice | None, stop: Stop, *, attempt: int, step: int
) -> RunBudget:
    """The budget of a new attempt. step: optimizer steps done before it. Raises UserError if the ledger cannot be read."""
    if distributed.is_rank0():
        return FirstRankBudget(run, config, price, stop, attempt=attempt, step=step)
    return OtherRankBudget(stop)


def book_refused(run: RunFolder, config: RunConfig, price: MachinePrice | None) -> None:
    """Records an attempt that another one has kept from the run: its machine's boot and set-up are part of what the run costs.
    Nothing on a machine that is not paid for."""
    if price is not None and provisioned():
        attempt = Ledger(run.ledger).next_attempt()
        FirstRankBudget(run, config, price, Stop(say), attempt=attempt, step=0).book("refused")


class OtherRankBudget:
    """Does nothing but listen for the preemption of another machine than rank 0's. The methods are those of RunBudget."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def metered(self, hard_stop: Callable[[], None]) -> AbstractContextManager[None]:
        return nullcontext()

    def book(self, reason: str) -> None:
        pass

    @contextmanager
    def notices(self) -> Iterator[None]:
        with PreemptionWatch(self._on_notice) if distributed.is_first_here() else nullcontext():
            yield

    def _on_notice(self, key: str) -> None:
        if key == PREEMPTED:
            self._stop.ask("preemption", "Google takes this machine back", NOTICE_SECONDS)

    def follow(self, progress: Callable[[], tuple[int, int]], wall_seconds: Callable[[], float]) -> None:
        pass

    def refusal_to_start(self) -> str | None:
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
        self._save_minutes = config.checkpoint.every_minutes or MIN_MINUTES
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
        self._prices = PriceWatch(
            self._meter,
            note=self._watchdog.note,
            ask_stop=lambda reason: stop.ask("price", f"this machine costs too much by now ({reason})"),
            say=say,
        )

    @contextmanager
    def metered(self, hard_stop: Callable[[], None]) -> Iterator[None]:
        self._hard_stop = hard_stop
        for problem in self._meter.earlier.problems:
            say(f"ledger: {problem}")
        self._watchdog.start()
        if provisioned():
            self._prices.start()
        try:
            yield
        except TakenOver:
            self._watchdog.close("taken over")
            raise
        finally:
            self._prices.close()
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
            self.note(PREEMPTED)  # for `finetune watch`
        else:  # up to an hour ahead; the machine's own shutdown brings a SIGTERM
            say("Google announces maintenance that will stop this machine; training goes on until then")

    def follow(self, progress: Callable[[], tuple[int, int]], wall_seconds: Callable[[], float]) -> None:
        self._progress, self._wall_seconds = progress, wall_seconds

    def refusal_to_start(self) -> str | None:
        return self._meter.check_start(60 * self._save_minutes)

    def note(self, event: str, **facts: Any) -> None:
        self._watchdog.note(event, **facts)

    def end(self, reason: str) -> None:
        self._prices.close()
        self._watchdog.reached(self._step)
        self._watchdog.close(TOO_DEAR if self._prices.too_dear and reason == "interrupted" else reason)

    def series(self) -> dict[str, float]:
        self._watchdog.reached(self._step)
        usage, projected = self._meter.usage(), self._projected()
        values = {
            "spent_usd": usage.usd, "ceiling_usd": usage.ceilings.run_usd, "projected_usd": projected,
            "hours_on_meter": usage.hours,
        }  # fmt: skip
        return {name: round(value, 6) for name, value in values.items() if value is not None}

    def short(self) -> str:
        usage = self._meter.usage()
        if usage.usd is None:
            return ""
        ceiling, projected = usage.ceilings.run_usd, self._projected()
        parts = [usd_text(usage.usd) + (f" of {usd_text(ceiling)}" if ceiling else "")]
        if projected is not None:
            parts.append(f"{usd_text(projected)} at the end (est.)")
        return ", ".join(parts)

    def record(self, reason: str | None = None) -> dict[str, Any]:
        usage, projected = self._meter.usage(), self._projected()
        return {
            "spent_usd": None if usage.usd is None else round(usage.usd, 4),
            "spent_basis": None if usage.usd is None else usage.text,
            "spending": {
                "usd": None if usage.usd is None else round(usage.usd, 4),
                "hours": round(usage.hours, 4),
                "ceiling_usd": usage.ceilings.run_usd,
                "ceiling_hours": usage.ceilings.hours,
                "projected_usd": None if projected is None else round(projected, 4),
                "basis": f"{usage.text}; projected: estimated from the pace so far",
            },
            "attempt_log": [
                *map(_attempt_record, self._meter.earlier.of("train").attempts),
                _attempt_record(self._this(reason)),
            ],
        }

    @property
    def _step(self) -> int:
        return self._progress()[0]

    def _this(self, reason: str | None) -> Attempt:
        return replace(self._log.attempt(), seconds=self._meter.time.seconds(), step=self._step, reason=reason)

    def _projected(self) -> float | None:
        done, planned = self._progress()
        if not planned:
            return None
        return self._meter.projected_usd(done - self._first_step, planned - done, self._wall_seconds())

    def _end_now(self, reason: str) -> None:
        """Ends a run that did not stop by itself because a step hangs; only its last committed checkpoint remains."""
        say(f"{reason}; ending the run, the newest checkpoint is kept")
        try:
            self._hard_stop()
        finally:
            process_group.end_all(reason, EXIT_OK)
            os._exit(EXIT_OK)


def _attempt_record(attempt: Attempt) -> dict[str, Any]:
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
