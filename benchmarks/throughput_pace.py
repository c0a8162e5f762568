"""Runs a trainer for a requested number of optimizer steps, then makes it wait with its activation memory released.

The pause happens inside transformers' training loop (a callback that does not return), so model, optimizer, schedule and position
in the data are those of one long run.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from transformers import TrainerCallback

Reply = dict[str, Any]


class Pace(TrainerCallback):
    """Measures steps and answers requests.

    tokens_per_step: real tokens (prompt and answer) of each optimizer step, in order. send: sends a reply. receive: waits for the
    next request and returns its number of steps, or None for the end. ready: the reply once training begins. A step is timed from
    the end of the previous step's logging (or of the pause) until the GPU has finished after the optimizer: collation counts,
    logging and pauses do not.
    """

    def __init__(
        self,
        tokens_per_step: list[int],
        send: Callable[[Reply], None],
        receive: Callable[[], int | None],
        ready: Callable[[], Reply],
    ) -> None:
        self.tokens_per_step = tokens_per_step
        self.send, self.receive, self.ready = send, receive, ready
        self.done = 0
        self.target = 0
        self.steps: list[dict[str, float | None]] = []
        self.seen = [0]
        self.begun = 0.0
        self.reserved = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            self.reserved = torch.cuda.max_memory_reserved()  # includes what a trainer runs before its first step
        release_memory()
        self.send({"ready": self.ready()})
        self._wait()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if len(self.steps) >= self.target:  # a trainer that logs nothing for a step must not run on
            self._pause()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.steps.append({"seconds": now - self.begun, "tokens": self.tokens_per_step[self.done], "loss": None})
        self.seen.append(int(state.num_input_tokens_seen))
        self.done += 1
        self.begun = now

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self.steps and logs and "loss" in logs:
            loss = float(logs["loss"])
            self.steps[-1]["loss"] = loss if math.isfinite(loss) else None  # JSON has no NaN
            if len(self.steps) >= self.target:
                self._pause()
            self.begun = time.perf_counter()

    def _pause(self) -> None:
        reply: Reply = {"steps": self.steps, "trainer_counted": self._counted()}
        if torch.cuda.is_available():
            self.reserved = torch.cuda.max_memory_reserved()
            reply |= {"peak_gib": torch.cuda.max_memory_allocated() / 2**30, "reserved_gib": self.reserved / 2**30}
        release_memory()
        self.send(reply)
        self._wait()

    def _counted(self) -> list[int] | None:
        """The trainer's own count of tokens in each of these steps, as a check of ours; None where it keeps none."""
        return [after - before for before, after in pairwise(self.seen)] if self.seen[-1] else None

    def _wait(self) -> None:
        target = self.receive()
        if target is None:
            raise SystemExit(0)  # leaves the training loop without saving anything
        self.target = target
        self.steps, self.seen = [], self.seen[-1:]
        reserve_memory(self.reserved)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.begun = time.perf_counter()


def release_memory() -> None:
    """Release all GPU memory that only a running step needs to the driver, for the next variant."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def reserve_memory(reserved: int) -> None:
    """Allocate the released bytes again at once into torch's cache; piece by piece this takes up to 0.7 s of a step."""
    if torch.cuda.is_available() and (missing := reserved - torch.cuda.memory_reserved()) > 0:
        torch.empty(missing, dtype=torch.uint8, device="cuda")
