"""Measures the speed of this machine with the demo's own work: a training step and a few generated tokens, for some seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from finetune.config.load import examples_per_step
from finetune.config.schema import RunConfig
from finetune.data.prepared import Prepared
from finetune.data.prompts import PromptTemplate, completion
from finetune.demo.schedule import Pace
from finetune.evaluation.generators.hf import generate_answers
from finetune.tokens import encode_examples
from finetune.training.step.hf_backend import answer_loss, padded
from finetune.training.tracking.trl_without_wandb import DataCollatorForLanguageModeling

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

PROMPTS, TOKENS = 32, 4
"""Prompts and new tokens of the timed answers. A question takes no less time than in the evaluation, where more questions share a
schema and more are answered at once."""
STEP_SHARE = 1.25
"""Time of a trainer step relative to forward and backward pass alone: adds optimizer, padding, changing shapes. Measured on two
cores: 2.22 s for a step of 512 tokens, 1.78 s for the passes alone."""
SAMPLE = 64
"""Number of training records from which the timed step is taken."""


def measure(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    data: Prepared,
    load_seconds: float,
) -> Pace:
    """Sets torch's number of threads to the fastest: all cores, or one less if another program keeps a core busy, for which every
    thread of a step would have to wait."""
    template = PromptTemplate(config.data.schema_format)
    batch, mean_tokens = _usual_batch(tokenizer, config, data, template)
    seconds, threads = _fastest(lambda: _train(model, batch))
    torch.set_num_threads(threads)
    step_seconds = STEP_SHARE * seconds * mean_tokens * len(batch["labels"]) / batch["labels"].numel()
    prompts = [template.render_record(record) for record in data.records(config.evaluation.split)[:PROMPTS]]
    return Pace(step_seconds, _question_seconds(model, tokenizer, prompts, config), load_seconds, threads)


def _fastest(step: Callable[[], None]) -> tuple[float, int]:
    """(seconds, threads) of the faster setting; the first pass, which allocates memory, is not timed."""
    step()
    cores = torch.get_num_threads()
    timed = []
    for threads in sorted({cores, max(1, cores - 1)}, reverse=True):
        torch.set_num_threads(threads)
        timed.append((_seconds(step), threads))
    return min(timed)


def _usual_batch(
    tokenizer: PreTrainedTokenizerBase, config: RunConfig, data: Prepared, template: PromptTemplate
) -> tuple[dict[str, torch.Tensor], float]:
    """The examples of one optimizer step, of medium length in a sample: (examples, tokens), padded on the right; and the sample's
    mean length in tokens."""
    records = data.records("train")[:SAMPLE]
    encoded = encode_examples(
        tokenizer,
        [template.render_record(record) for record in records],
        [completion(record.sql, dialect=record.dialect) for record in records],
    )
    encoded.sort(key=len)
    size = examples_per_step(config.training)
    start = max(0, (len(encoded) - size) // 2)
    mean = sum(len(example) for example in encoded) / len(encoded)
    collate = DataCollatorForLanguageModeling(tokenizer.pad_token_id)
    return padded(encoded[start : start + size], collate), mean


def _train(model: Any, batch: dict[str, torch.Tensor]) -> None:
    """The forward and backward pass of a step; its gradients are discarded."""
    model.train()
    torch.autograd.backward(answer_loss(model, batch))
    model.zero_grad(set_to_none=True)


def _question_seconds(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], config: RunConfig
) -> float:
    """Seconds of the base model's answer to one question, extrapolated to the maximum number of tokens."""

    def answer(asked: Sequence[str], tokens: int) -> None:
        generate_answers(model, tokenizer, asked, batch_size=len(asked), max_new_tokens=tokens, progress=False)

    with model.disable_adapter():
        answer(prompts[:2], 2)  # allocations
        first = _seconds(lambda: answer(prompts, 1))
        more = max(0.0, _seconds(lambda: answer(prompts, 1 + TOKENS)) - first)
    return (first + more / TOKENS * (config.evaluation.max_new_tokens - 1)) / len(prompts)


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
