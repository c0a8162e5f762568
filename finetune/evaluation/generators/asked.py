"""A prompt on its way to an answer, and what both ways of decoding (decoding.py, static.py) have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from finetune.evaluation.generators.base import Problem


@dataclass(frozen=True)
class Asked:
    """number: of the prompt. ids: its tokens. room: the most tokens of its answer. seed: of a random answer."""

    number: int
    ids: list[int]
    room: int
    dialect: str
    seed: int = 0

    @property
    def total(self) -> int:
        return len(self.ids) + self.room


Finished = Callable[[Asked, list[int], Problem | None], None]
"""Called once for each prompt with the tokens of its answer, without the one that ended it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the GPU, or on a CPU that of the machine, did not suffice."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(w in str(error).lower() for w in words)
