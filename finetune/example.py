"""One training example, from tokenisation to the loss, and the only place that shifts labels by one.

A label is stored at its own token; a target at the token that predicts it, one position earlier. Batches and losses use
targets.
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
    """ids: tokens of prompt, answer and end of text. answer_start: index of the first token with loss."""

    ids: list[int]
    answer_start: int

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.ids)

    @property
    def answer_tokens(self) -> int:
        return len(self.ids) - self.answer_start

    @property
    def labels(self) -> list[int]:
        """One per token: its own id where it has a loss, else IGNORED; what transformers and TRL call labels."""
        return [IGNORED] * self.answer_start + self.ids[self.answer_start :]

    @property
    def targets(self) -> list[int]:
        """One per token: the id of the next token where that has a loss, else IGNORED."""
        return targets_of(self.labels)

    @property
    def predicted(self) -> int:
        """Number of tokens with loss. The first token of a text is never predicted."""
        return sum(target != IGNORED for target in self.targets)


def targets_of(labels: Sequence[int]) -> list[int]:
    """The targets for the labels of one text."""
    return [*labels[1:], IGNORED]


def batch_targets(labels: Tensor) -> Tensor:
    """The targets for padded labels; both (batch, tokens)."""
    targets = labels.roll(-1, dims=1)
    targets[:, -1] = IGNORED
    return targets
