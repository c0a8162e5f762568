"""A prompt on its way to an answer: how much room it leaves, and what its answer is worth; the same for every generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune.data.prompts import answer_is_complete, prompt_dialect
from finetune.evaluation.generators.base import Answer, Problem, Sampling


@dataclass(frozen=True)
class Asked:
    """number: of the prompt. ids: its tokens. room: the most tokens of its answer. seed: of a random answer. cramped: whether the
    model's positions leave less room than was asked for."""

    number: int
    ids: list[int]
    room: int
    dialect: str
    seed: int = 0
    cramped: bool = False

    @property
    def total(self) -> int:
        return len(self.ids) + self.room

    def answer(self, text: str, new_tokens: int, problem: Problem | None = None) -> Answer:
        """`too_long` where the model's positions ended it before its SQL was complete."""
        cut = self.cramped and new_tokens == self.room
        if cut and not problem and not answer_is_complete(text, self.dialect):
            problem = "too_long"
        return Answer(text, new_tokens, problem, len(self.ids))


def asked_of(
    prompts: Sequence[str],
    encoded: Sequence[list[int]],
    *,
    positions: int | None,
    max_new_tokens: int,
    sampling: Sampling | None,
) -> tuple[list[Asked], list[Answer]]:
    """The prompts that leave room for an answer; and for all of them, in order, the answer `too_long`, for the caller to replace.

    encoded: the prompts' token ids. positions: of the model, None without a limit.
    """
    asked = []
    for number, ids in enumerate(encoded):
        room = max_new_tokens if positions is None else min(max_new_tokens, positions - len(ids))
        if room > 0:
            seed = sampling.seeds[number] if sampling else number
            asked.append(Asked(number, ids, room, prompt_dialect(prompts[number]), seed, room < max_new_tokens))
    return asked, [Answer("", 0, "too_long", len(ids)) for ids in encoded]


Finished = Callable[[Asked, list[int], Problem | None], None]
"""Called once for each prompt with the tokens of its answer, without the one that ended it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the GPU, or on a CPU that of the machine, did not suffice."""
    import torch

    words = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(w in str(error).lower() for w in words)
