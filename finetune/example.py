"""One training example, from tokenisation to the loss, and the only place that shifts labels by one.

A label belongs to its own token; a target belongs to the token that has to predict it, the one before. Batches and losses
work with targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""The label or target of a token without loss, as in torch.nn.functional.cross_entropy."""


@dataclass(frozen=True)
class Example:
    """ids: tokens of prompt, answer and end of text. answer_start: index of the first token that is learned."""

    ids: list[int]
    answer_start: int

    def __len__(self) -> int:
        """Tokens."""
        return len(self.ids)

    @property
    def answer_tokens(self) -> int:
        return len(self.ids) - self.answer_start

    @property
    def labels(self) -> list[int]:
        """Of every token the token itself where it is learned, else IGNORED: what transformers and TRL call labels."""
        return [IGNORED] * self.answer_start + self.ids[self.answer_start :]

    @property
    def targets(self) -> list[int]:
        """What every token has to predict: the next token where that is learned, else IGNORED."""
        return targets_of(self.labels)

    @property
    def predicted(self) -> int:
        """Number of tokens with loss. Nothing predicts a text's first token."""
        return sum(target != IGNORED for target in self.targets)


def targets_of(labels: Sequence[int]) -> list[int]:
    """Targets from one text's labels."""
    return [*labels[1:], IGNORED]


def batch_targets(labels: Tensor) -> Tensor:
    """Targets from padded labels; both (rows, tokens)."""
    targets = labels.roll(-1, dims=1)
    targets[:, -1] = IGNORED
    return targets
