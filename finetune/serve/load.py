"""How much the server has to do, and when it had something to do last."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.runtime.files import write_json
from finetune.serve.api_errors import ApiError

HEARTBEAT_SECONDS = 10.0
LONGEST_RETRY_SECONDS = 60


class Queue:
    """Requests that are answered, and those that wait for it: `parallel` and `waiting` at most. A further one is refused, so that
    memory stays bounded."""

    def __init__(self, parallel: int, waiting: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = parallel + waiting
        self.inside = 0
        self.answered = 0
        self.last_active = clock()
        self._parallel = parallel
        self._turn = asyncio.Semaphore(parallel)
        self._clock = clock
        self._seconds: deque[float] = deque(maxlen=50)

    def enter(self) -> None:
        """To be followed by `leave`. Raises ApiError if there is no place."""
        if self.inside >= self.most:
            raise ApiError(
                429, f"{self.inside} requests are being answered or wait, which is the limit; try again later",
                code="queue_full", retry_after=self._retry_after(),
            )  # fmt: skip
        self.inside += 1
        self.last_active = self._clock()

    def leave(self) -> None:
        self.inside -= 1
        self.last_active = self._clock()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits until fewer than `parallel` requests are with the backend."""
        async with self._turn:
            began = self._clock()
            yield
            self._seconds.append(self._clock() - began)
            self.answered += 1

    def idle_seconds(self) -> float:
        return 0.0 if self.inside else self._clock() - self.last_active

    def _retry_after(self) -> int:
        mean = sum(self._seconds) / len(self._seconds) if self._seconds else 1.0
        return min(LONGEST_RETRY_SECONDS, max(1, math.ceil(mean * self.inside / self._parallel)))


class Heartbeat:
    """A small JSON file for whoever stops idle machines: state, wall time of the last request, and how many were answered. It is
    rewritten when something has changed, every HEARTBEAT_SECONDS at most."""

    def __init__(self, file: Path, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._url, self._clock = file, url, clock
        self._started = _utc(0.0)
        self._written: dict[str, Any] = {}
        self._at = -math.inf

    def beat(self, state: str, queue: Queue | None, *, now: bool = False) -> None:
        """Raises UserError if the file cannot be written."""
        if not now and self._clock() - self._at < HEARTBEAT_SECONDS:
            return
        idle = queue.idle_seconds() if queue else None
        values = {
            "pid": os.getpid(),
            "url": self._url,
            "state": state,
            "started_at": self._started,
            "last_request_at": _utc(idle) if idle is not None and queue is not None and queue.answered else None,
            "answered": queue.answered if queue else 0,
            "in_flight": queue.inside if queue else 0,
        }
        if values == self._written:
            return
        write_json(self._file, values)
        self._written, self._at = values, self._clock()


def _utc(seconds_ago: float) -> str:
    return datetime.fromtimestamp(time.time() - seconds_ago, UTC).isoformat(timespec="seconds")
