"""What the emulated machines would have cost: every stretch of a machine's life, times the prices of a test's own table."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Stretch:
    """A time in which a machine cost one thing.

    running: False while it is stopped and pays its disk alone. began, ended: seconds since the epoch, ended None until now.
    """

    machine: str
    zone: str
    machine_type: str
    gpu: str
    gpus: int
    spot: bool
    disk_gb: int
    running: bool
    began: float
    ended: float | None = None
    end: str = ""
    """Why it ended: deleted, stopped, preempted, crashed."""

    @property
    def seconds(self) -> float:
        return (self.ended if self.ended is not None else time.time()) - self.began


Price = Callable[[Stretch], float]
"""US dollars an hour for a stretch: the whole machine while it runs, its disk while it is stopped."""


@dataclass
class Bill:
    """stretches: of all machines, in the order of their beginning."""

    stretches: list[Stretch] = field(default_factory=list)

    def usd(self, price: Price) -> float:
        """US dollars of all machines so far."""
        return sum(price(one) * one.seconds / 3600 for one in self.stretches)

    def running_seconds(self, machine: str | None = None) -> float:
        return sum(one.seconds for one in self.stretches if one.running and machine in (None, one.machine))

    def table(self, price: Price) -> str:
        """For people: a line a stretch."""
        lines = [
            f"{one.machine}  {one.zone}  {one.machine_type}  {one.gpu or '-'}:{one.gpus}  {'spot' if one.spot else 'on demand'}  "
            f"{'running' if one.running else 'stopped'} {one.seconds:.1f} s  ${price(one) * one.seconds / 3600:.6f}  {one.end}"
            for one in self.stretches
        ]
        return "\n".join(
            [*lines, f"total ${self.usd(price):.6f} (emulated: seconds measured, prices of the test's table)"]
        )
