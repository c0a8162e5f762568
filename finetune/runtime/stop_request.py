"""Requests to stop, from signal handlers, the preemption notice and the budget watchdog.

A request changes nothing by itself: the training loop checks for one at the end of every step (training/save_policy.py).
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

Reason = Literal["signal", "preemption", "budget", "price"]

NOTICE_SECONDS = 25.0
"""Time from a notice to a committed checkpoint, out of the 30 s that Google gives a spot machine."""
SAVE_SECONDS = 10.0
"""The part of it for saving and copying, until a save of this run has been timed."""
LEAST_SAVE_SECONDS = 3.0
ONE_SIGNAL_SECONDS = 1.5
"""SkyPilot and `timeout` both signal a job to end: two signals of one kind within this time count as one."""


@dataclass(frozen=True)
class Request:
    """at: monotonic seconds. within: seconds from then until the checkpoint has to be committed; None: no deadline."""

    reason: Reason
    detail: str
    at: float
    within: float | None


class Stop:
    """Requests to stop, in the order in which they came. Any thread and any signal handler may add one."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.requests: list[
            Request
        ] = []  # only ever appended to, which needs no lock (a handler could not wait for one)
        self.save_seconds = SAVE_SECONDS
        self.step_seconds = 0.0
        """The longest of the last steps."""
        self._say, self._clock = say, clock

    def ask(self, reason: Reason, detail: str, within: float | None = None) -> None:
        self.requests.append(Request(reason, detail, self._clock(), within))
        self._say(f"{detail}: finishing this step, then saving a checkpoint")

    @property
    def first(self) -> Request | None:
        return self.requests[0] if self.requests else None

    def because_of(self, reason: Reason) -> bool:
        return any(request.reason == reason for request in self.requests)

    def seconds_left(self) -> float | None:
        """Seconds left for the current step so that a save still fits before the deadline; None without a deadline."""
        ends = [request.at + request.within for request in self.requests if request.within is not None]
        return min(ends) - self.save_seconds - self._clock() if ends else None

    def save_took(self, seconds: float) -> None:
        """seconds: from the end of a step to its committed checkpoint, including the rest of an earlier copy."""
        self.save_seconds = min(max(2 * seconds, LEAST_SAVE_SECONDS), NOTICE_SECONDS)

    def time_to_save(self) -> float:
        """Seconds that a stop after the next step may take: the step and the save."""
        return self.step_seconds + self.save_seconds

    def waited(self) -> float | None:
        """Seconds since the first request."""
        return self._clock() - self.requests[0].at if self.requests else None


class StopSignals:
    """SIGINT and SIGTERM request a stop; a second one exits at once and leaves the last committed checkpoint as it is.

    Use as a context manager around training: it restores the earlier handlers.
    """

    def __init__(self, stop: Stop, clock: Callable[[], float] = time.monotonic) -> None:
        self._stop, self._clock = stop, clock
        self._earlier: dict[int, Any] = {}
        self._received: tuple[int, float] | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._earlier[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = self._clock()
        if self._received is None:
            self._received = number, now
            within = NOTICE_SECONDS if number == signal.SIGTERM else None
            self._stop.ask("signal", f"{signal.Signals(number).name} (once more: exit at once)", within)
            return
        if number == signal.SIGTERM and self._received[0] == number and now - self._received[1] < ONE_SIGNAL_SECONDS:
            return
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.raise_signal(number)
