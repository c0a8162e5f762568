"""A trainer that runs as many optimizer steps as it is told and then waits, with its activations given back.

The pause lies inside transformers' training loop (a callback that does not return), so model, optimizer, schedule and place in
the data stay what they are in one long run.
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
    """Times steps and answers orders.

    tokens_per_step: real tokens (prompt and answer) of each optimizer step, in order. tell: sends a reply; hear: waits for the
    next order and gives its number of steps, or None for the end; ready: what to tell once training begins. A step lasts from
    the end of the log of the step before it (or of the pause) to the GPU's end of work after the optimizer: collating counts,
    logging and pauses do not.
    """

    def __init__(
        self,
        tokens_per_step: list[int],
        tell: Callable[[Reply], None],
        hear: Callable[[], int | None],
        ready: Callable[[], Reply],
    ) -> None:
        self.tokens_per_step = tokens_per_step
        self.tell, self.hear, self.ready = tell, hear, ready
        self.done = 0
        self.wanted = 0
        self.steps: list[dict[str, float | None]] = []
        self.seen = [0]
        self.begun = 0.0
        self.reserved = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            self.reserved = torch.cuda.max_memory_reserved()  # by what a trainer tries before its first step
        give_back()
        self.tell({"ready": self.ready()})
        self._wait()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if len(self.steps) >= self.wanted:  # a trainer that logs nothing for a step must not run on
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
            if len(self.steps) >= self.wanted:
                self._pause()
            self.begun = time.perf_counter()

    def _pause(self) -> None:
        reply: Reply = {"steps": self.steps, "trainer_counted": self._counted()}
        if torch.cuda.is_available():
            self.reserved = torch.cuda.max_memory_reserved()
            reply |= {"peak_gib": torch.cuda.max_memory_allocated() / 2**30, "reserved_gib": self.reserved / 2**30}
        give_back()
        self.tell(reply)
        self._wait()

    def _counted(self) -> list[int] | None:
        """The trainer's own count of tokens in each of these steps, as a check of ours; None where it keeps none."""
        return [after - before for before, after in pairwise(self.seen)] if self.seen[-1] else None

    def _wait(self) -> None:
        wanted = self.hear()
        if wanted is None:
            raise SystemExit(0)  # the way out of a training loop that shall not end by saving anything
        self.wanted = wanted
        self.steps, self.seen = [], self.seen[-1:]
        take_back(self.reserved)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.begun = time.perf_counter()


def give_back() -> None:
    """Everything that only a running step needs goes back to the driver of the GPU, for the next variant."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def take_back(reserved: int) -> None:
    """The bytes given back, asked for in one piece and left in torch's cache: bit by bit this takes up to 0.7 s of some step."""
    if torch.cuda.is_available() and (missing := reserved - torch.cuda.memory_reserved()) > 0:
        torch.empty(missing, dtype=torch.uint8, device="cuda")
