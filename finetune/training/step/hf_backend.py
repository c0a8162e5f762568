"""The Hugging Face backend, the reference: padded rows, TRL's collator and loss, PEFT's layers; loss on labelled tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from finetune.estimate.fit import MicroBatchConfig
from finetune.example import IGNORED, Example, batch_targets
from finetune.models.head import has_plain_head, logits_at
from finetune.training.objectives.objective import TokenLoss
from finetune.training.objectives.sft import negative_log_likelihood

Batch = dict[str, torch.Tensor]
Collate = Callable[[list[dict[str, list[int]]]], Batch]


class HfBackend:
    """A runner.Backend that pads rows to the longest.

    model: a PeftModel. collate: makes a batch from rows with input_ids and labels. autocast: the context that sets the dtype of
    the forward pass. token_loss: as in Objective. fused_loss: replaces `answer_loss` in training steps of models
    whose head is plain (models/head.py); it brings its own autocast.
    """

    padded = True

    def __init__(
        self,
        model: Any,
        collate: Collate,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        token_loss: TokenLoss,
        fused_loss: Callable[..., torch.Tensor] | None = None,
    ) -> None:
        self.model, self.device = model, device
        self._collate, self._autocast = collate, autocast
        self._token_loss, self._fused_loss = token_loss, fused_loss

    def begin(self) -> None:
        pass

    def free_memory(self) -> bool:
        if self.model.is_gradient_checkpointing:
            return False
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.enable_input_require_grads()
        return True

    def loss(self, examples: Sequence[Example], labelled: int, limits: MicroBatchConfig) -> torch.Tensor:
        batch = self.batch(examples)
        if self._fused_loss is not None and self._plain_head():
            return self._fused_loss(batch, num_items_in_batch=labelled)
        with self._autocast():
            return answer_loss(self.model, batch, labelled, self._token_loss)

    def _plain_head(self) -> bool:
        with self._autocast():
            return has_plain_head(_causal(self.model))

    def validation_loss(self, examples: Sequence[Example], labelled: int) -> torch.Tensor:
        batch = self.batch(examples)
        self.model.eval()
        with torch.no_grad(), self._autocast():
            return answer_loss(self.model, batch, labelled, self._token_loss)

    def batch(self, examples: Sequence[Example]) -> Batch:
        """input_ids, attention_mask and labels, each (batch, tokens), on the model's device."""
        return {name: tensor.to(self.device) for name, tensor in padded(examples, self._collate).items()}


def padded(examples: Sequence[Example], collate: Collate) -> Batch:
    """input_ids, attention_mask and labels, each (batch, tokens), as TRL's collator pads them."""
    return collate([{"input_ids": example.ids, "labels": example.labels} for example in examples])


def _causal(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def answer_loss(
    model: Any, inputs: Batch, num_items_in_batch: Any = None, token_loss: TokenLoss = negative_log_likelihood
) -> torch.Tensor:
    """Mean loss of the labelled tokens; the logits of other tokens are left out where the model allows it.

    inputs: input_ids, attention_mask, labels, each (batch, tokens). num_items_in_batch: labelled tokens of the whole
    optimizer step, over which accumulated micro-batches are normalised; None normalises over this batch.
    """
    causal = _causal(model)
    targets = batch_targets(inputs["labels"])
    labelled = targets != IGNORED
    logits = logits_at(causal, labelled, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    total = token_loss(logits, targets[labelled])
    count = labelled.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
    return total / count.clamp(min=1)
