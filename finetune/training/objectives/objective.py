"""The interface of a training objective."""

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
    """How a record is tokenised, and how the logits become a loss.

    encode: maps tokenizer, prompts and answers to one example each, whose tokens from answer_start on have a loss.
    token_loss: maps logits (tokens, vocabulary) in float32 and targets (tokens,), both of tokens with loss only, to the sum of
    their losses, a scalar; it is called on parts of a step, whose sums are added and divided by the number of tokens with loss
    in the whole step. fused: token_loss is the negative log-likelihood, so that heads which compute it without materialising
    all logits may replace it.
    """

    encode: Encode
    token_loss: TokenLoss
    fused: bool = False
