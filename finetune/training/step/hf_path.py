"""The libraries' own way through a step: padded rows, TRL's collator and loss, PEFT's layers; and the loss on answers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from finetune.estimate.fit import Limits
from finetune.example import IGNORED, Example, batch_targets


class PaddedPath:
    """A stepper.Path: rows padded to the longest. trainer: a trainer.AnswerTrainer, whose model it trains."""

    padded = True

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def begin(self) -> None:
        pass

    def spare(self) -> bool:
        model = self.trainer.model
        if model.is_gradient_checkpointing:
            return False
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        return True

    def loss(self, examples: Sequence[Example], labelled: int, limits: Limits) -> torch.Tensor:
        trainer, batch = self.trainer, self._batch(examples)
        with trainer.compute_loss_context_manager():
            result: torch.Tensor = trainer.compute_loss(trainer.model, batch, num_items_in_batch=labelled)
        return result

    def validation_loss(self, examples: Sequence[Example], labelled: int) -> torch.Tensor:
        trainer, batch = self.trainer, self._batch(examples)
        trainer.model.eval()
        with torch.no_grad(), trainer.accelerator.autocast():
            return answer_loss(trainer.model, batch, labelled)

    def _batch(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        rows = [{"input_ids": example.ids, "labels": example.labels} for example in examples]
        batch: dict[str, torch.Tensor] = self.trainer._prepare_inputs(self.trainer.data_collator(rows))
        return batch


def answer_loss(model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: Any = None) -> torch.Tensor:
    """Mean negative log-likelihood (nats) of the labelled tokens; the logits of other tokens are never made.

    inputs: input_ids, attention_mask, labels, each (rows, tokens). num_items_in_batch: labelled tokens of the whole
    optimizer step, over which accumulated micro-batches are normalised; None normalises over this batch.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = causal.get_decoder()(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
    ).last_hidden_state
    targets = batch_targets(inputs["labels"])
    labelled = targets != IGNORED
    logits = causal.get_output_embeddings()(hidden[labelled]).float()
    total = torch.nn.functional.cross_entropy(logits, targets[labelled], reduction="sum")
    count = labelled.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
    return total / count.clamp(min=1)
