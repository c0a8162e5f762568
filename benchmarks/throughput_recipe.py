"""What all peers of benchmarks.throughput share: the recipe of the guide and one fixed sequence of texts.

Imports nothing of this project, because Unsloth's worker runs in an environment of its own, and no torch, because Unsloth sets
up torch's memory before it is imported.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

BATCH = 16
"""Sequences per optimizer step, for every peer."""
ANSWER_TOKENS = 37
IGNORED = -100
MEDIAN, SPREAD_LOG = 223.0, 0.814
"""Median of a text's tokens and standard deviation of their natural logarithm, as in benchmarks.step_memory: text-to-SQL prompts
and answers, 95th percentile 853, mean about 300 after truncation at LONGEST."""
LONGEST = 2048
FIRST_WORD = 10
"""Smaller token ids are reserved for padding and the like."""


@dataclass(frozen=True)
class Recipe:
    """steps: optimizer steps of the whole session; rows: sequences of a micro-batch; checkpointing: bool or "unsloth"."""

    model: str
    device: str
    steps: int
    seed: int
    dtype: str
    load_in_4bit: bool
    optim: str
    learning_rate: float
    lr_scheduler_type: str
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    target_modules: tuple[str, ...]
    rows: int = 4
    checkpointing: bool | str = True
    longest: int = LONGEST  # tokens; texts drawn longer are cut to this
    median: float = MEDIAN  # tokens of the texts
    flash: bool = True  # Unsloth only: FlashAttention-2, from the package or from torch

    def with_settings(self, settings: dict[str, Any]) -> Recipe:
        """Raises TypeError for a name that is no field."""
        return replace(self, **settings)


@dataclass(frozen=True)
class Texts:
    """Parallel lists; labels are IGNORED except for the last ANSWER_TOKENS of each text."""

    ids: list[list[int]]
    labels: list[list[int]]

    @property
    def lengths(self) -> list[int]:
        return [len(text) for text in self.ids]

    def columns(self) -> dict[str, Any]:
        return {"input_ids": self.ids, "labels": self.labels}


def make_texts(count: int, vocabulary: int, longest: int, seed: int, median: float = MEDIAN) -> Texts:
    """Random token ids of log-normal lengths (tokens). More texts of the same seed begin with the same ones."""
    draw = random.Random(seed)
    lengths = [
        min(LONGEST, longest, max(ANSWER_TOKENS + 8, round(draw.lognormvariate(math.log(median), SPREAD_LOG))))
        for _ in range(count)
    ]
    words = random.Random(f"words of seed {seed}")
    ids = [words.choices(range(FIRST_WORD, vocabulary), k=length) for length in lengths]
    labels = [[IGNORED] * (len(text) - ANSWER_TOKENS) + text[-ANSWER_TOKENS:] for text in ids]
    return Texts(ids, labels)


def sft_options(recipe: Recipe, folder: str) -> dict[str, Any]:
    """Arguments of TRL's SFTConfig that TRL's and Unsloth's trainer share: the texts in their order, a log every step."""
    on_gpu = recipe.device == "cuda"
    return {
        "output_dir": folder,
        "seed": recipe.seed,
        "max_steps": recipe.steps,
        "per_device_train_batch_size": recipe.rows,
        "gradient_accumulation_steps": BATCH // recipe.rows,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.lr_scheduler_type,
        "warmup_steps": recipe.warmup_ratio,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "optim": recipe.optim,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "bf16": on_gpu and recipe.dtype == "bfloat16",
        "fp16": on_gpu and recipe.dtype == "float16",
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "include_num_input_tokens_seen": "non_padding",
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
