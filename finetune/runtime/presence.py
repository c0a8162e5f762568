"""Whether the other machines of a run are still there.

A process that fails says so (process_group.py). A machine that is taken away, or loses its network, says nothing: the others wait
in a collective operation, for the hour that a slow bucket may take. So every rank counts up in torchrun's key-value store, and
rank 0 looks whether the others still do. The store itself is on the machine of rank 0: if it does not answer, that one is gone.
Only durations on an own clock are compared.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from finetune.errors import UserError, shown

VARIABLE = "FINETUNE_LOST_SECONDS"
LOST_SECONDS = 60.0
"""Without a sign of life for so long, a machine is gone. Longer than Google stops one to move it to another host."""
SURE_SECONDS = 10.0
"""The same once a connection to another rank has broken."""
BEAT_SECONDS = 2.0
PRESENT = "finetune/present/{}"


class Store(Protocol):
    """torch.distributed.Store, as far as it is used here. Its methods raise RuntimeError where the connection has ended."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


class Presence:
    """The signs of life of one rank, and on rank 0 those of the others. Not for several threads at once."""

    def __init__(self, store: Store, rank: int, others: list[int], clock: Callable[[], float]) -> None:
        """others: the ranks to look for. clock: seconds."""
        self._store, self._rank, self._clock = store, rank, clock
        self._count, self._beaten = 0, -BEAT_SECONDS
        self._seen: dict[int, tuple[bytes, float]] = dict.fromkeys(others, (b"", clock()))

    def beat(self) -> None:
        """Give a sign of life and look for those of the others, if it is time."""
        now = self._clock()
        if now - self._beaten < BEAT_SECONDS:
            return
        self._beaten, self._count = now, self._count + 1
        self._store.set(PRESENT.format(self._rank), str(self._count))
        for rank, (before, _) in self._seen.items():
            key = PRESENT.format(rank)
            count = self._store.get(key) if self._store.check([key]) else b""  # `get` would wait for it
            if count != before:
                self._seen[rank] = count, now

    def silent(self, seconds: float) -> int | None:
        """The lowest rank that has given no sign of life for so long; None if all have."""
        now = self._clock()
        return min((rank for rank, (_, at) in self._seen.items() if now - at >= seconds), default=None)


def lost_seconds() -> float:
    """FINETUNE_LOST_SECONDS, for tests; else 60. Raises UserError if it is not a number from 5 to 600."""
    text = os.environ.get(VARIABLE)
    with suppress(ValueError):
        seconds = float(text) if text else LOST_SECONDS
        if 5 <= seconds <= 10 * LOST_SECONDS:
            return seconds
    raise UserError(
        f"{VARIABLE}: expected seconds from 5 to {10 * LOST_SECONDS:g}, found {shown(text)}",
        code="distributed.bad_lost_seconds",
    )
