"""What the emulated machines would have cost: each billed period of a machine times a price that the test looks up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Stretch:
    """A period in which a machine has one price.

    running: False while it is stopped, when only its disk costs. began, ended: seconds since the epoch; ended None if it goes on.
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
"""US dollars per hour of a stretch: the whole machine while it runs, its disk while it is stopped."""


@dataclass
class Bill:
    """stretches: of all machines, in the order of their start."""

    stretches: list[Stretch] = field(default_factory=list)

    def usd(self, price: Price) -> float:
        """US dollars of all machines so far."""
        return sum(price(one) * one.seconds / 3600 for one in self.stretches)

    def running_seconds(self, machine: str | None = None) -> float:
        return sum(one.seconds for one in self.stretches if one.running and machine in (None, one.machine))

    def table(self, price: Price) -> str:
        """Text with one line per stretch."""
        lines = [
            f"{one.machine}  {one.zone}  {one.machine_type}  {one.gpu or '-'}:{one.gpus}  {'spot' if one.spot else 'on demand'}  "
            f"{'running' if one.running else 'stopped'} {one.seconds:.1f} s  ${price(one) * one.seconds / 3600:.6f}  {one.end}"
            for one in self.stretches
        ]
        return "\n".join(
            [*lines, f"total ${self.usd(price):.6f} (emulated: seconds measured, prices of the test's table)"]
        )
