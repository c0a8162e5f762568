"""TRL's SFTTrainer for text-to-SQL: our keys mapped to the libraries', tokenised examples, loss on the answer only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from finetune.callbacks import Throughput
from finetune.config import TrainingSection
from finetune.model import Device, adapters_to_float32
from finetune.prompts import Encoded, PromptTemplate, completion, encode_examples
from finetune.records import Record

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that carries no loss, as in torch.nn.functional.cross_entropy."""


CPU_PADDING = 16
"""Batches on a CPU are padded to multiples of this many tokens. With every length a shape of its own, oneDNN's kernels were
compiled anew and the heap fell apart: 412 tokens/s at the start of a run were 252 at its end (docs/log.md)."""


@dataclass(frozen=True)
class Examples:
    """Tokenised examples that fit, and how many were too long. Columns: input_ids, labels (IGNORED on the prompt), length."""

    dataset: Dataset
    too_long: int


def tokenise(
    records: Sequence[Record], template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> Examples:
    """Every record whose prompt, answer and end-of-text token fit into max_tokens; nothing is ever cut."""
    prompts = [template.render_record(record) for record in records]
    encoded = encode_examples(tokenizer, prompts, [completion(record.sql) for record in records])
    kept = [example for example in encoded if len(example.input_ids) <= max_tokens]
    columns = {
        "input_ids": [example.input_ids for example in kept],
        "labels": [_labels(example) for example in kept],
        "length": [len(example.input_ids) for example in kept],
    }
    return Examples(Dataset.from_dict(columns), len(encoded) - len(kept))


def _labels(example: Encoded) -> list[int]:
    return [IGNORED] * example.prompt_tokens + example.input_ids[example.prompt_tokens :]


class AnswerTrainer(SFTTrainer):
    """SFTTrainer with tokens per second among its logs, and a loss that on a CPU looks at the answers alone.

    TRL's fused head scores only labelled tokens where Triton runs. Elsewhere it scores every prompt token too, which on
    two cores took more than half of each step (171 tokens/s with it, see docs/log.md).
    """

    throughput: Throughput

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        speed = self.throughput.take_window() if "loss" in logs else None
        if speed is not None:
            logs["tokens_per_second"] = speed  # here, so that TensorBoard and W&B get it too
        super().log(logs, start_time)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: TRL would put one among the checkpoints at every save, and have an offline W&B run warn each time."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if return_outputs or inputs["input_ids"].device.type != "cpu":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return answer_loss(model, inputs, num_items_in_batch)


def answer_loss(model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: Any = None) -> torch.Tensor:
    """Mean negative log-likelihood (nats) of the labelled tokens; the logits of other tokens are never made.

    inputs: input_ids, attention_mask, labels, each (rows, tokens). num_items_in_batch: labelled tokens of the whole
    optimizer step, over which accumulated micro-batches are normalised; None normalises over this batch.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = causal.get_decoder()(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
    ).last_hidden_state
    targets = inputs["labels"][:, 1:]
    labelled = targets != IGNORED
    logits = causal.get_output_embeddings()(hidden[:, :-1][labelled]).float()
    total = torch.nn.functional.cross_entropy(logits, targets[labelled], reduction="sum")
    count = labelled.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
    return total / count.clamp(min=1)


def build_trainer(
    arguments: SFTConfig,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    validation: Dataset | None,
    throughput: Throughput,
) -> AnswerTrainer:
    """The trainer with adapters in float32 and without the libraries' own printing and bars."""
    trainer = AnswerTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=[throughput],
    )
    trainer.throughput = throughput
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    adapters_to_float32(trainer.model)
    return trainer


def trainer_arguments(
    training: TrainingSection,
    device: Device,
    *,
    checkpoints: Path,
    run_name: str,
    save_steps: int,
    report_to: list[str],
    validates: bool,
) -> SFTConfig:
    """The one place where our keys, which keep the guide's names, become the libraries' own."""
    on_gpu = device.place.type == "cuda"
    return SFTConfig(
        output_dir=str(checkpoints),
        run_name=run_name,
        seed=training.seed,
        num_train_epochs=training.num_train_epochs,
        max_steps=training.max_steps,
        per_device_train_batch_size=training.per_device_train_batch_size,
        per_device_eval_batch_size=training.per_device_eval_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=training.warmup_ratio,  # a number below 1 is a share of all steps
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optim,
        gradient_checkpointing=training.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if training.gradient_checkpointing else None,
        train_sampling_strategy="group_by_length" if training.group_by_length else "random",
        logging_steps=training.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not finite must be seen
        eval_strategy="steps" if validates else "no",
        eval_steps=training.eval_steps or None,
        save_strategy="steps",
        save_steps=save_steps,
        bf16=on_gpu and device.dtype == torch.bfloat16,
        fp16=on_gpu and device.dtype == torch.float16,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        report_to=report_to,
        max_length=None,  # `tokenise` has left out what is too long
        pad_to_multiple_of=8 if on_gpu else CPU_PADDING,
        include_num_input_tokens_seen="non_padding",
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
    )
