"""Keeps a run's ledger up to date while it trains, and holds its ceilings whatever the training loop does.

Two threads: one watches the ceilings, the other writes, so that a bucket that does not answer cannot keep the first from its
work. Before a ceiling the run is asked to stop while there is time to save; if it has not stopped, it is ended shortly before
the ceiling; and if a call that holds Python's global lock keeps even that from happening, the timer of `faulthandler`, a thread
of C that needs no lock, ends the process at the ceiling.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from finetune.budget.ledger import Attempt, AttemptLog, Ledger
from finetune.budget.watchdog import HARD_SECONDS, LastResort, heartbeat_seconds
from finetune.errors import UserError
from finetune.machine.billed_time import MachineTime
from finetune.machine.price import Ceilings

KEPT_FOR_SAVE_SECONDS = 20.0
"""Kept free for a save before a ceiling, at least."""
MOST_KEPT_SECONDS = 900.0
"""For a start on another machine. Before one that took longer its machine stood idle, which no recovery does."""
RETRY_SECONDS = 1.0
END_SECONDS = 15.0
"""For the ledger's last line when a run closes; a store that takes longer is left alone."""


@dataclass(frozen=True)
class Spent:
    """By all attempts up to now, measured. usd: None without a price. seconds_left: to the nearer ceiling; None without one."""

    usd: float | None
    hours: float
    ceilings: Ceilings
    seconds_left: float | None
    text: str


class Meter:
    """Of one attempt, from `begin` to `close`.

    usd_per_hour, basis: the machine's price and its source. time_to_save: seconds that a save needs now. ask_stop: sets a flag
    for the end of the step. hard_stop: records the stop and ends the process. The hooks are called by a thread, with the reason
    in words. restart_usd_per_hour: of the dearest machine on which the run may begin again, where this one may be taken away. A
    start costs before the ledger can be looked at there, so what the longest one of this run would cost on that machine is kept
    free before the ceilings. last_resort: whether faulthandler's timer, of which a process has one, is set where there is a
    ceiling.
    """

    def __init__(
        self,
        ledger: Ledger,
        time: MachineTime,
        *,
        usd_per_hour: float | None,
        basis: str | None,
        ceilings: Ceilings,
        say: Callable[[str], None],
        time_to_save: Callable[[], float] = lambda: KEPT_FOR_SAVE_SECONDS,
        ask_stop: Callable[[str], None] = lambda reason: None,
        hard_stop: Callable[[str], None] = lambda reason: None,
        restart_usd_per_hour: float | None = None,
        last_resort: bool = True,
    ) -> None:
        """Reads what earlier attempts have cost. Raises UserError where the ledger's folder cannot be listed."""
        self.ledger, self.ceilings, self.earlier = ledger, ceilings, ledger.account()
        self.step: int | None = None  # optimizer steps done; the training loop sets it
        self._time, self._price, self._basis = time, usd_per_hour, basis
        self._say, self._time_to_save, self._ask_stop, self._hard_stop = say, time_to_save, ask_stop, hard_stop
        self._kept = self._kept_free(restart_usd_per_hour)
        self._heartbeat = heartbeat_seconds()
        self._resumed_step: int | None = None
        self._log: AttemptLog | None = None
        self._notes: deque[tuple[str, dict[str, Any]]] = deque()
        self._end: str | None = None  # why the attempt ends, for the writer
        self._wake, self._ended, self._closing = threading.Event(), threading.Event(), threading.Event()
        self._asked = self._stopped = False
        self._faults: dict[str, str] = {}
        self._timer = LastResort() if last_resort else None
        self._threads = [
            threading.Thread(target=work, name=f"meter {name}", daemon=True)
            for name, work in (("ceilings", self._watch), ("ledger", self._write))
        ]

    def check_start(self, save_interval_seconds: float) -> str | None:
        """Why this attempt must not begin: less is left than the work between two saves costs. None if it may."""
        name, left = self._nearest()
        if left >= save_interval_seconds:
            return None
        kept = (
            f" and the {_duration(self._kept[name])} kept for a start after a preemption" if name in self._kept else ""
        )
        return (
            f"{self.spent().text}: less than the {_duration(save_interval_seconds)} between two checkpoints{kept}; raise "
            f"{name} to go on"
        )

    def begin(self, *, attempt: int, machine: dict[str, Any], resumed_step: int | None) -> None:
        """Opens the attempt in the ledger and starts the threads. Raises UserError where the ledger cannot be written."""
        self.step = self._resumed_step = resumed_step
        self._log = self.ledger.begin(
            attempt=attempt,
            machine=machine,
            usd_per_hour=self._price,
            basis=self._basis,
            seconds_before=self._time.take(),
            resumed_step=resumed_step,
        )
        self._keep("marker", self._time.mark)
        for thread in self._threads:
            thread.start()

    def note(self, event: str, **facts: Any) -> None:
        """Into the ledger, soon, by the writing thread; never raises and never waits."""
        self._notes.append((event, facts))
        self._wake.set()

    def close(self, reason: str) -> None:
        """Writes the end of the attempt and lets go of the ceilings; a second call does nothing. Never raises."""
        if self._closing.is_set():
            return
        self._end = reason
        self._closing.set()
        self._wake.set()
        for thread in reversed(self._threads):
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(END_SECONDS)
        if self._timer is not None:
            self._timer.cancel()
        if self._log is not None and not self._ended.is_set():
            self._say(
                f"{self._log.path}: the end of this attempt is not in it, nor what it cost since its last line there"
            )

    def spent(self) -> Spent:
        usd, left = self._usd(), self._seconds_left()
        return Spent(usd, self._hours(), self.ceilings, left if math.isfinite(left) else None, self._text(usd, left))

    def this_attempt(self) -> Attempt:
        """As the ledger has it, with the seconds up to now; before `begin` with what is known."""
        seconds = self._time.seconds()
        if self._log is None:
            return Attempt(self.ledger.next_attempt(), "", seconds, self._price, self._basis)
        return replace(self._log.told(), seconds=seconds, step=self.step)

    def projected_usd(self, done_steps: int, total_steps: int, training_seconds: float) -> float | None:
        """Estimated US dollars of the whole run: spent, and the steps that are left at the pace so far.

        training_seconds: in which this attempt went from the step that it began with to done_steps. None without a price, or
        before a step is done.
        """
        usd, mine = self._usd(), done_steps - (self._resumed_step or 0)
        if usd is None or self._price is None or mine <= 0:
            return None
        return usd + max(0, total_steps - done_steps) * training_seconds / mine / 3600 * self._price

    def _hours(self) -> float:
        return self.earlier.hours + self._time.seconds() / 3600

    def _usd(self) -> float | None:
        if self._price is None:
            return self.earlier.usd
        return (self.earlier.usd or 0.0) + self._time.seconds() / 3600 * self._price

    def _limits(self) -> dict[str, float]:
        """Seconds that each ceiling leaves, by the name of its key."""
        left: dict[str, float] = {}
        usd = self._usd()
        if self.ceilings.run_usd is not None and usd is not None:
            more = self.ceilings.run_usd - usd
            left["budget.max_run_usd"] = more / self._price * 3600 if self._price else math.copysign(math.inf, more)
        if self.ceilings.hours is not None:
            left["budget.max_hours"] = (self.ceilings.hours - self._hours()) * 3600
        return left

    def _seconds_left(self) -> float:
        return min(self._limits().values(), default=math.inf)

    def _nearest(self) -> tuple[str, float]:
        """The key of the ceiling that stops the run first, and the seconds until then, less what is kept free before it."""
        room = {name: left - self._kept.get(name, 0.0) for name, left in self._limits().items()}
        return min(room.items(), key=lambda item: item[1], default=("the budget", math.inf))

    def _kept_free(self, restart_usd_per_hour: float | None) -> dict[str, float]:
        """Seconds of this machine for a start of the run on another, by the name of the ceiling's key."""
        if restart_usd_per_hour is None:
            return {}
        starts = [self._time.seconds(), *(attempt.seconds_before for attempt in self.earlier.attempts)]
        seconds = min(max(starts), MOST_KEPT_SECONDS)
        dearer = max(1.0, restart_usd_per_hour / self._price) if self._price else 1.0
        return {"budget.max_run_usd": seconds * dearer, "budget.max_hours": seconds}

    def _text(self, usd: float | None, left: float) -> str:
        parts = []
        if usd is not None:
            limit = "" if self.ceilings.run_usd is None else f" of ${self.ceilings.run_usd:.2f}"
            price = f" x ${self._price:g}/h, {self._basis}" if self._price is not None else ""
            parts.append(f"${usd:.2f}{limit} (measured hours{price})")
        if usd is None or self.ceilings.hours is not None:
            limit = "" if self.ceilings.hours is None else f" of {self.ceilings.hours:g} h"
            parts.append(f"{self._hours():.2f}{limit or ' h'} (measured)")
        parts.append(f"{_duration(max(0.0, left))} left" if math.isfinite(left) else "no ceiling")
        return ", ".join(parts)

    def _watch(self) -> None:
        """The thread that holds the ceilings; it outlives whatever the hooks raise."""
        while not self._closing.is_set():
            wait = RETRY_SECONDS
            try:
                wait = self._hold()
                self._faults.pop("ceilings", None)
            except Exception as error:
                self._complain("ceilings", f"the watch over the budget goes on after: {error!r}")
            self._closing.wait(wait)

    def _hold(self) -> float:
        """One look at the ceilings; returns seconds until the next one."""
        left = self._seconds_left()
        if math.isinf(left) and left > 0:
            return self._heartbeat
        if self._timer is not None:
            self._timer.set(left)
        if left <= HARD_SECONDS and not self._stopped:
            self._write_end("budget_stop")
            self._hard_stop(f"{self._nearest()[0]}: {self.spent().text}; the run did not stop by itself")
            self._stopped = True
        name, room = self._nearest()
        save = self._save_seconds()
        if room <= save and not self._asked:
            self._asked = True
            kept = (
                f"; {_duration(self._kept[name])} are kept for a start after a preemption" if name in self._kept else ""
            )
            self._ask_stop(f"{name}: {self.spent().text}{kept}")
        due = [self._heartbeat, left - HARD_SECONDS if left > HARD_SECONDS else RETRY_SECONDS]
        return max(0.05, min([*due, room - save] if room > save else due))

    def _save_seconds(self) -> float:
        try:
            return max(KEPT_FOR_SAVE_SECONDS, self._time_to_save())
        except Exception as error:
            self._complain("save", f"the time to save is not known: {error!r}")
            return KEPT_FOR_SAVE_SECONDS

    def _write_end(self, reason: str) -> None:
        """The last line, by the writing thread; a store that does not answer is not waited for."""
        self._end = reason
        self._wake.set()
        self._ended.wait(HARD_SECONDS / 2)

    def _write(self) -> None:
        """The thread that writes: heartbeats, notes, the end."""
        while not self._ended.is_set():
            near = max(RETRY_SECONDS, self._seconds_left() / 2)
            self._wake.wait(min(self._heartbeat, near))
            self._wake.clear()
            closing = (
                self._closing.is_set()
            )  # looked at before the end is: else a close in between would go without a line
            if self._keep("ledger", self._record):
                self._keep("marker", self._time.mark)
            if closing:
                return

    def _record(self) -> None:
        assert self._log is not None
        seconds, reason = self._time.take(), self._end
        while self._notes:
            event, facts = self._notes.popleft()
            self._log.note(event, **facts)
        if reason is None:
            self._log.beat(seconds, self.step)
        else:
            self._log.end(seconds, reason, self.step)
            self._ended.set()

    def _keep(self, what: str, action: Callable[[], object]) -> bool:
        try:
            action()
        except Exception as error:
            why = str(error) if isinstance(error, UserError) else repr(error)
            self._complain(what, f"the {what} is not up to date, and is tried again at each heartbeat: {why}")
            return False
        if self._faults.pop(what, None):
            self._say(f"the {what} is written again")
        return True

    def _complain(self, what: str, message: str) -> None:
        """Once, until it works again."""
        if what not in self._faults:
            self._faults[what] = message
            self._say(message)


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
