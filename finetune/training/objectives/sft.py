"""Supervised fine-tuning: the negative log-likelihood of the answer's tokens, given the prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.tokens import encode_examples
from finetune.training.objectives.objective import Objective


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed over tokens, in nats."""
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


SFT = Objective(encode_examples, negative_log_likelihood, fused=True)
