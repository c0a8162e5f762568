"""A toy objective for tests: label smoothing on prompt and answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from finetune.data.prompts import encode_examples
from finetune.example import Example
from finetune.training.objectives.objective import Objective

SMOOTHING = 0.2


def whole_text(tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]) -> list[Example]:
    return [replace(example, answer_start=1) for example in encode_examples(tokenizer, prompts, answers)]


def smoothed(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, targets, label_smoothing=SMOOTHING, reduction="sum")


TOY = Objective(whole_text, smoothed)
