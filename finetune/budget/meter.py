"""What all attempts of a run have cost so far, and what is left of its ceilings."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune.budget.attempts import Account, Attempt
from finetune.machine.billed_time import MachineTime
from finetune.machine.price import Ceilings, MachinePrice
from finetune.runtime.quantities import duration, usd_text

MAX_RESTART_RESERVE_SECONDS = 900.0
"""Upper bound of the restart reserve. If a start took longer, its machine stood idle before it; a recovery does not do that."""
SILENT_SECONDS = 90.0
"""Another attempt whose ledger does not grow for so long, three heartbeats, does not spend any more."""
MAX_RUN_USD, MAX_HOURS = "budget.max_run_usd", "budget.max_hours"
"""The config keys that set the ceilings."""


@dataclass(frozen=True)
class Usage:
    """Of all attempts so far, measured. usd: None without a price. seconds_left: to the nearer ceiling; None without one."""

    usd: float | None
    hours: float
    ceilings: Ceilings
    seconds_left: float | None
    text: str


@dataclass(frozen=True)
class Room:
    """What the run may still use before the ceiling that stops it first.

    key: the config key of that ceiling. seconds: left until it, less the restart reserve. reserve_seconds: the restart reserve,
    kept for a restart after a preemption; None if there is none.
    """

    key: str
    seconds: float
    reserve_seconds: float | None = None


@dataclass(frozen=True)
class _InForce:
    """The price that counts from `since` seconds of the meter on; the seconds before have cost usd_before."""

    price: MachinePrice
    since: float = 0.0
    usd_before: float = 0.0

    def usd(self, seconds: float) -> float:
        return self.usd_before + (seconds - self.since) / 3600 * self.price.usd_per_hour


@dataclass(frozen=True)
class _Running:
    """Another attempt that spends at the same time, as its ledger was last seen. since: an earlier moment, from which on it may
    have spent more; seen: when its ledger had grown. Both in seconds of our own meter."""

    attempt: Attempt
    since: float
    seen: float


class Meter:
    """The meter of one attempt. Any thread may read it.

    earlier: the other attempts, as far as they are known; `see` brings them up to date. time: the seconds billed to it; the
    writer of the ledger calls its `take` and `mark`. price: of this machine. restart_usd_per_hour: price of the dearest machine
    on which the run may restart, if this one can be preempted. A restart costs money before the new machine can read the ledger,
    so the cost of this run's longest start on that machine is reserved below the ceilings. usd_key: what sets the ceiling in
    dollars.
    """

    def __init__(
        self,
        earlier: Account,
        time: MachineTime,
        price: MachinePrice | None,
        ceilings: Ceilings,
        *,
        restart_usd_per_hour: float | None = None,
        usd_key: str = MAX_RUN_USD,
    ) -> None:
        self._usd_key = usd_key
        self.earlier, self.time, self.ceilings = earlier, time, ceilings
        self._in_force = _InForce(price) if price else None  # replaced whole: other threads read it
        self._running: tuple[_Running, ...] = ()
        self._looked = self._own_start = time.seconds()
        self._restart_usd_per_hour = restart_usd_per_hour
        self._reserve = self._restart_reserve()

    @property
    def price(self) -> MachinePrice | None:
        """Of this machine, the newest one."""
        return self._in_force.price if self._in_force else None

    def reprice(self, price: MachinePrice, restart_usd_per_hour: float | None) -> float:
        """A newer price, which counts from now on, also for what a ceiling in US dollars still allows. restart_usd_per_hour: as
        at the beginning. Returns the seconds on the meter."""
        now, before = self.time.seconds(), self._in_force
        self._in_force = _InForce(price, now, before.usd(now) if before else 0.0)
        self._restart_usd_per_hour = restart_usd_per_hour if self._restart_usd_per_hour is not None else None
        self._reserve = self._restart_reserve()
        return now

    def see(self, others: Account) -> None:
        """Count the other attempts as they are now: an earlier one may still be spending, such as one that has lost the run and
        does not know it yet."""
        before, now = {attempt.file: attempt.seconds for attempt in self.earlier.attempts}, self.time.seconds()
        running = []
        for attempt in others.attempts:
            if attempt.reason is None and attempt.seconds > before.get(attempt.file, attempt.seconds):
                running.append(_Running(attempt, since=self._looked, seen=now))
            elif attempt.reason is None:
                running += [one for one in self._running if one.attempt.file == attempt.file]
        self._running, self._looked, self.earlier = tuple(running), now, others

    def check_start(self, save_interval_seconds: float) -> str | None:
        """Why this attempt must not begin: less is left than the work between two checkpoints costs. None if it may."""
        room = self.room()
        if room.seconds >= save_interval_seconds:
            return None
        reserve = (
            f" and the {duration(room.reserve_seconds)} reserved for a restart after a preemption"
            if room.reserve_seconds is not None
            else ""
        )
        return (
            f"{self.usage().text}: less than the {duration(save_interval_seconds)} between two checkpoints{reserve}; raise "
            f"{room.key} to go on"
        )

    def least_usd(self, save_interval_seconds: float) -> float:
        """The ceiling in US dollars from which on `check_start` lets this attempt begin, if no other one runs."""
        here = self.price.usd_per_hour if self.price else 0.0
        seconds = save_interval_seconds + self._reserve.get(self._usd_key, 0.0)
        return (self._usd() or 0.0) + seconds / 3600 * here

    def usage(self) -> Usage:
        usd, left = self._usd(), self.seconds_left()
        return Usage(usd, self._hours(), self.ceilings, left if math.isfinite(left) else None, self._text(usd, left))

    def projected_usd(self, done_steps: int, left_steps: int, training_seconds: float) -> float | None:
        """Estimated US dollars of the whole run: the cost so far plus the remaining steps at the pace so far.

        training_seconds: that this attempt took for done_steps. None without a price, or before a step is done.
        """
        usd = self._usd()
        if usd is None or self.price is None or done_steps <= 0:
            return None
        return usd + max(0, left_steps) * training_seconds / done_steps / 3600 * self.price.usd_per_hour

    def seconds_left(self) -> float:
        """Seconds until the nearer ceiling, negative beyond it; inf without one."""
        return min(self._limits().values(), default=math.inf)

    def room(self) -> Room:
        rooms = [
            Room(key, left - self._reserve.get(key, 0.0), self._reserve.get(key))
            for key, left in self._limits().items()
        ]
        return min(rooms, key=lambda room: room.seconds, default=Room("the budget", math.inf))

    def _hours(self) -> float:
        return self.earlier.hours + self.time.seconds() / 3600

    def _usd(self) -> float | None:
        if self._in_force is None:
            return self.earlier.usd
        return (self.earlier.usd or 0.0) + self._in_force.usd(self.time.seconds())

    def _limits(self) -> dict[str, float]:
        """Seconds left until each ceiling, by its config key. Attempts that run at the same time spend their part of them."""
        left: dict[str, float] = {}
        usd, now = self._usd(), self.time.seconds()
        running = [one for one in self._running if now - one.seen <= SILENT_SECONDS]
        unseen = sum(now - one.since for one in running) / 3600
        if self.ceilings.run_usd is not None and usd is not None:
            here = self.price.usd_per_hour if self.price else 0.0
            others = [(one, one.attempt.usd_per_hour or 0.0) for one in running]
            more = self.ceilings.run_usd - usd - sum((now - one.since) / 3600 * price for one, price in others)
            rate = here + sum(price for _, price in others)
            left[self._usd_key] = more / rate * 3600 if rate else math.copysign(math.inf, more)
        if self.ceilings.hours is not None:
            left[MAX_HOURS] = (self.ceilings.hours - self._hours() - unseen) / (1 + len(running)) * 3600
        return left

    def _restart_reserve(self) -> dict[str, float]:
        """The reserve for a restart on another machine, in seconds of this one, by the ceiling's config key."""
        if self._restart_usd_per_hour is None:
            return {}
        starts = [self._own_start, *(attempt.seconds_before for attempt in self.earlier.attempts)]
        seconds = min(max(starts), MAX_RESTART_RESERVE_SECONDS)
        here = self.price.usd_per_hour if self.price else 0.0
        dearer = max(1.0, self._restart_usd_per_hour / here) if here else 1.0
        return {self._usd_key: seconds * dearer, MAX_HOURS: seconds}

    def _text(self, usd: float | None, left: float) -> str:
        parts = []
        if usd is not None:
            limit = "" if self.ceilings.run_usd is None else f" of {usd_text(self.ceilings.run_usd)}"
            now = self._in_force
            since = f" from {now.since / 3600:.2f} h on" if now and now.since else ""
            price = f" x ${now.price.usd_per_hour:g}/h{since}, {now.price.basis}" if now else ""
            parts.append(f"{usd_text(usd)}{limit} (measured hours{price})")
        if usd is None or self.ceilings.hours is not None:
            limit = "" if self.ceilings.hours is None else f" of {self.ceilings.hours:g} h"
            parts.append(f"{self._hours():.2f}{limit or ' h'} (measured)")
        parts.append(f"{duration(max(0.0, left))} left" if math.isfinite(left) else "no ceiling")
        return ", ".join(parts)
