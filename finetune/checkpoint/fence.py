"""What keeps an attempt that has lost its run from changing the checkpoints, and its late commits from counting."""

from __future__ import annotations

from typing import Protocol


class Fence(Protocol):
    """The attempt on whose behalf a store writes."""

    @property
    def number(self) -> int:
        """Of the attempt, in the order in which they took over; 0 for a store that needs none."""

    def check(self, max_age: float = 0.0) -> None:
        """Called right before every change. Raises TakenOver if another attempt has taken over the run. max_age: a look that is
        at most so many seconds old is enough."""

    def too_late(self, name: str, number: int, seal: str) -> bool:
        """Whether a checkpoint was committed by an attempt that had already lost the run. name: of its folder. number: of that
        attempt. seal: the hash of its manifest."""


class NoFence:
    """For a store that one process alone writes, or that is only read."""

    number = 0

    def check(self, max_age: float = 0.0) -> None:
        pass

    def too_late(self, name: str, number: int, seal: str) -> bool:
        return False
