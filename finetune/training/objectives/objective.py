"""What a training objective is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from finetune.example import Example

Encode = Callable[[Any, Sequence[str], Sequence[str]], list[Example]]
TokenLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """How a record becomes tokens, and how the model's scores of them become a loss.

    encode: tokenizer, prompts and answers to one example each; its tokens from answer_start on are learned. token_loss: logits
    (tokens, vocabulary) in float32 and targets (tokens,) of learned tokens to the sum of their losses, a scalar; it is called on
    parts of a step, whose sums are added and divided by the learned tokens of the whole step. fused: token_loss is the
    negative log-likelihood, so that the heads which compute that without holding all logits may stand in for it.
    """

    encode: Encode
    token_loss: TokenLoss
    fused: bool = False
