"""How fast this computer is, and for how long the scenarios therefore wait: the one place that knows both.

Bounds of waits, and budgets of machine time, are written in seconds of the computer that the scenarios were first measured on.
At the beginning of a session `measure` times `sky status`, which is what most of a scenario consists of: SkyPilot's processes
starting and asking each other. A computer on which that takes longer waits longer, by the same factor; none waits less.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

STATUS_SECONDS = 5.0
"""Of `sky status` on that computer, while the other world begins as well."""
MOST = 5.0
"""No factor is above it: a budget that pays for more lasts too long, and a scenario that fails is to end."""


class Answer(Protocol):
    @property
    def seconds(self) -> float: ...

    def ok(self) -> Answer: ...


class Pace:
    """factor: how many times as long as there things take here, from 1 to MOST; 1 until it was measured."""

    factor = 1.0

    def measure(self, status: Callable[[], Answer]) -> None:
        """status: runs `sky status`. Of two the shorter counts: what another program takes for a moment is not the pace."""
        seconds = min(status().ok().seconds for _ in range(2))
        self.factor = min(max(1.0, seconds / STATUS_SECONDS), MOST)


PACE = Pace()
"""Of this process."""


def patience(seconds: float) -> float:
    """What so many seconds of that computer are on this one."""
    return seconds * PACE.factor


def wait_until(
    come: Callable[[], bool], seconds: float, failure: Callable[[float], str], *, every: float = 0.5
) -> None:
    """Asks `come` until it says so. Raises AssertionError with what `failure` says, told how many seconds were waited, when
    `seconds` of that computer are over."""
    allowed = patience(seconds)
    deadline = time.monotonic() + allowed
    while not come():
        assert time.monotonic() < deadline, failure(allowed)
        time.sleep(every)
