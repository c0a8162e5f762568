"""A clock that moves only when a test advances it, for the threads of a watchdog and the meter that they read."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass

from finetune.budget.watchdog import THREADS

TIMEOUT_SECONDS = 30.0
"""Real time for threads to finish what they are doing."""


class FakeClock:
    """Give `event` to a Watchdog in place of threading.Event, and the clock itself to MachineTime as the age.

    `advance` jumps from one wake-up time to the next, and at each waits until every thread waits again: hours pass in
    milliseconds, in the same order, and with the same result on a busy machine.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self._changed = threading.Condition()
        self._waiting: dict[threading.Thread, Wait] = {}
        self._others = set(threading.enumerate())

    def __call__(self) -> float:
        return self.seconds

    def event(self) -> FakeEvent:
        return FakeEvent(self)

    def advance(self, seconds: float) -> None:
        self.settle()
        end = self.seconds + seconds
        while (due := self._next()) <= end:
            self._go_to(due)
        self._go_to(end)

    def settle(self) -> None:
        """Returns once every thread waits for time to pass."""
        until = time.monotonic() + TIMEOUT_SECONDS
        with self._changed:
            while self._busy():
                assert time.monotonic() < until, f"still busy after {TIMEOUT_SECONDS:g} s: {self._busy()}"
                self._changed.wait(0.01)  # a thread that ends does not notify

    def _go_to(self, moment: float) -> None:
        with self._changed:
            self.seconds = max(self.seconds, moment)
            self._changed.notify_all()
        self.settle()

    def _next(self) -> float:
        with self._changed:
            return min((wait.until for wait in self._waiting.values()), default=math.inf)

    def _busy(self) -> list[str]:
        threads = [thread for thread in set(threading.enumerate()) - self._others if thread.name.startswith(THREADS)]
        return [thread.name for thread in threads if thread not in self._waiting or self._due(self._waiting[thread])]

    def _due(self, wait: Wait) -> bool:
        return wait.event.is_set() or wait.until <= self.seconds


@dataclass(frozen=True)
class Wait:
    event: FakeEvent
    until: float


class FakeEvent:
    """A threading.Event on a FakeClock."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock, self._set = clock, False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        with self._clock._changed:
            self._set = True
            self._clock._changed.notify_all()

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        clock, me = self._clock, threading.current_thread()
        with clock._changed:
            wait = Wait(self, math.inf if timeout is None else clock.seconds + timeout)
            clock._waiting[me] = wait
            clock._changed.notify_all()
            while not clock._due(wait):
                clock._changed.wait()
            del clock._waiting[me]
            return self._set
