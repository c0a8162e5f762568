"""Range checks: values of the right type that no run can use."""

from __future__ import annotations

import math
import re
from dataclasses import fields, is_dataclass
from typing import Any

from finetune.config.schema import TRACKERS, RunConfig, TrackingSection
from finetune.errors import shown
from finetune.machine.gpus import MACHINES
from finetune.run_name import fault_of_name

LARGEST: dict[str, float] = {
    "model.max_seq_length": 1 << 20,
    "lora.r": 8192,
    "lora.lora_alpha": 10**6,
    "data.max_train_records": 10**9,
    "data.seed": 2**32 - 1,  # numpy takes no larger one
    "training.seed": 2**32 - 1,
    "training.num_train_epochs": 10_000,
    "training.effective_batch_size": 1 << 20,
    "training.per_device_train_batch_size": 1 << 16,
    "training.gradient_accumulation_steps": 1 << 16,
    "training.per_device_eval_batch_size": 1 << 16,
    "training.weight_decay": 100,
    "training.max_memory_gib": 10**6,
    "checkpoint.every_minutes": 10**6,
    "budget.usd_per_hour": 10**6,
    "budget.max_run_usd": 10**9,
    "budget.max_hours": 10**6,
    "evaluation.batch_size": 1 << 16,
    "evaluation.max_new_tokens": 1 << 20,
    "evaluation.samples": 1024,
    "evaluation.seed": 2**32 - 1,
    "evaluation.timeout_seconds": 86_400,
    "plan.disk_gib": 1 << 16,  # Google's largest persistent disk
    "plan.setup_minutes": 10**5,
    "plan.records": 10**10,
    "plan.mean_tokens": 1 << 20,
    "plan.questions": 10**9,
    "plan.answer_tokens": 1 << 20,
}
"""The largest value of a key: one beyond it is a typing mistake, or fails later in a library with a message of its own."""
LARGEST_OTHER = 10**9
"""That of every other number."""
NO_ADAPTER = ("lm_head", "embed_tokens", "embed_out", "wte", "wpe")
"""Output heads and token embeddings: the loss is computed from their weights directly, past an adapter."""


def impossible_values(config: RunConfig) -> list[str]:
    """One message for each value that has the right type but is out of range."""
    c, t, d = config, config.training, config.data
    rules = [
        (c.model.max_seq_length >= 16, "model.max_seq_length: expected at least 16 tokens"),
        (c.lora.r >= 1, "lora.r: expected at least 1"),
        (c.lora.lora_alpha >= 1, "lora.lora_alpha: expected at least 1"),
        (0 <= c.lora.lora_dropout < 1, "lora.lora_dropout: expected 0 <= dropout < 1"),
        (bool(c.lora.target_modules), "lora.target_modules: expected at least one module name"),
        (bool(d.sources), "data.sources: expected at least one source"),
        (0 <= d.val_fraction < 1, "data.val_fraction: expected 0 <= fraction < 1"),
        (0 <= d.test_fraction < 1, "data.test_fraction: expected 0 <= fraction < 1"),
        (
            d.val_fraction + d.test_fraction < 1,
            "data.val_fraction + data.test_fraction: expected a sum below 1; nothing is left to train on",
        ),
        (d.max_train_records is None or d.max_train_records >= 1, "data.max_train_records: expected at least 1"),
        (0 < t.num_train_epochs < math.inf, "training.num_train_epochs: expected more than 0"),
        (t.seed >= 0, "training.seed: expected at least 0"),
        (d.seed >= 0, "data.seed: expected at least 0"),
        (0 <= t.weight_decay < math.inf, "training.weight_decay: expected at least 0"),
        (0 <= t.max_grad_norm < math.inf, "training.max_grad_norm: expected at least 0"),
        (t.max_steps == -1 or t.max_steps >= 1, "training.max_steps: expected -1 or at least 1"),
        (
            t.per_device_train_batch_size == "auto" or t.per_device_train_batch_size >= 1,
            "training.per_device_train_batch_size: expected auto or at least 1",
        ),
        (t.per_device_eval_batch_size >= 1, "training.per_device_eval_batch_size: expected at least 1"),
        (
            t.gradient_accumulation_steps is None or t.gradient_accumulation_steps >= 1,
            "training.gradient_accumulation_steps: expected at least 1",
        ),
        (
            t.gradient_accumulation_steps is None or t.per_device_train_batch_size != "auto",
            "training.gradient_accumulation_steps: is determined by memory with per_device_train_batch_size: auto; "
            "set training.effective_batch_size instead",
        ),
        (t.max_memory_gib is None or 0 < t.max_memory_gib < math.inf, "training.max_memory_gib: expected more than 0"),
        (
            t.effective_batch_size is None or t.effective_batch_size >= 1,
            "training.effective_batch_size: expected at least 1",
        ),
        (0 < t.learning_rate < 1, "training.learning_rate: expected between 0 and 1"),
        (0 <= t.warmup_ratio < 1, "training.warmup_ratio: expected 0 <= ratio < 1"),
        (t.logging_steps >= 1, "training.logging_steps: expected at least 1"),
        (t.eval_steps >= 0, "training.eval_steps: expected 0 (never) or more"),
        (
            c.checkpoint.every_minutes is None or 0 < c.checkpoint.every_minutes < math.inf,
            "checkpoint.every_minutes: expected more than 0",
        ),
        (c.checkpoint.save_steps is None or c.checkpoint.save_steps >= 1, "checkpoint.save_steps: expected at least 1"),
        (c.checkpoint.keep_every is None or c.checkpoint.keep_every >= 1, "checkpoint.keep_every: expected at least 1"),
        (c.checkpoint.keep_last >= 1, "checkpoint.keep_last: expected at least 1"),
        (c.evaluation.batch_size >= 1, "evaluation.batch_size: expected at least 1"),
        (c.evaluation.max_new_tokens >= 1, "evaluation.max_new_tokens: expected at least 1"),
        (c.evaluation.samples >= 1, "evaluation.samples: expected 1 (no vote) or more"),
        (
            0.01 <= c.evaluation.temperature <= 10,
            "evaluation.temperature: expected 0.01 to 10; the score without chance is always there, beside the vote",
        ),
        (c.evaluation.seed >= 0, "evaluation.seed: expected at least 0"),
        (0 <= c.evaluation.retries <= 10, "evaluation.retries: expected 0 to 10"),
        (0 < c.evaluation.timeout_seconds < math.inf, "evaluation.timeout_seconds: expected more than 0"),
        (64 <= c.evaluation.max_memory_mib <= 2**24, "evaluation.max_memory_mib: expected 64 to 16,777,216"),
        (0 <= c.evaluation.max_temp_mib <= 2**24, "evaluation.max_temp_mib: expected 0 (no such files) to 16,777,216"),
        (1 <= c.evaluation.max_rows <= 10**9, "evaluation.max_rows: expected 1 to 1,000,000,000"),
        (1 <= c.evaluation.max_result_mib <= 2**14, "evaluation.max_result_mib: expected 1 to 16,384"),
        (
            c.evaluation.large_database_mib is None or 1 <= c.evaluation.large_database_mib <= 2**24,
            "evaluation.large_database_mib: expected 1 to 16,777,216",
        ),
        (
            c.evaluation.max_questions is None or c.evaluation.max_questions >= 1,
            "evaluation.max_questions: expected at least 1",
        ),
        (bool(c.plan.gpus), "plan.gpus: expected at least one GPU"),
        (len(set(c.plan.gpus)) == len(c.plan.gpus), "plan.gpus: a GPU is listed twice"),
        (c.plan.disk_gib >= 10, "plan.disk_gib: expected at least 10"),
        (
            c.plan.setup_minutes is None or 0 <= c.plan.setup_minutes < math.inf,
            "plan.setup_minutes: expected at least 0",
        ),
        (0 <= c.plan.spot_preemptions_per_hour <= 10, "plan.spot_preemptions_per_hour: expected 0 to 10"),
        (c.plan.records is None or c.plan.records >= 1, "plan.records: expected at least 1"),
        (1 <= c.plan.mean_tokens < math.inf, "plan.mean_tokens: expected at least 1"),
        (c.plan.questions is None or c.plan.questions >= 1, "plan.questions: expected at least 1"),
        (1 <= c.plan.answer_tokens < math.inf, "plan.answer_tokens: expected at least 1"),
    ]
    problems = [message for holds, message in rules if not holds] + _too_large(config)
    problems += _unusable_modules(c.lora.target_modules) + _trackers(c.tracking)
    for name in ("usd_per_hour", "max_run_usd", "max_hours"):
        value = getattr(c.budget, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            problems.append(f"budget.{name}: expected more than 0")
    if t.run_name is not None and (fault := fault_of_name(t.run_name)):
        problems.append(f"training.run_name: {fault}")
    for gpu in c.plan.gpus:
        if gpu not in MACHINES:
            problems.append(f"plan.gpus: unknown GPU {gpu!r}; known: {', '.join(MACHINES)}")
    for number, source in enumerate(d.sources):
        if source.kind == "huggingface" and not {"question", "sql"} <= set(source.columns):
            problems.append(f"data.sources[{number}].columns: expected at least question and sql")
    return problems


def _trackers(tracking: TrackingSection) -> list[str]:
    if tracking.to is None:
        return []
    unknown = [
        f"tracking.to: unknown tracker {shown(name)}; known: {', '.join(TRACKERS)}"
        for name in tracking.to
        if name not in TRACKERS
    ]
    if "wandb" in tracking.to and tracking.wandb == "disabled":
        return [*unknown, "tracking.to: lists wandb, which tracking.wandb=disabled turns off; leave one of them out"]
    if "wandb" not in tracking.to and tracking.wandb in ("online", "offline"):
        return [
            *unknown,
            f"tracking.wandb: {tracking.wandb}, but tracking.to does not list wandb; add it, or leave this out",
        ]
    return unknown


def _too_large(section: Any, where: str = "") -> list[str]:
    problems: list[str] = []
    for field in fields(section):
        value, key = getattr(section, field.name), f"{where}{field.name}"
        if is_dataclass(value):
            problems += _too_large(value, f"{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            largest = LARGEST.get(key, LARGEST_OTHER)
            if largest < abs(value) < math.inf:
                problems.append(f"{key}: expected at most {largest:,}, found {shown(value)}")
    return problems


def _unusable_modules(names: list[str]) -> list[str]:
    """What is wrong with target modules, as far as it does not depend on the model."""
    problems = []
    for name in names:
        if name.rpartition(".")[2] in NO_ADAPTER:
            problems.append(
                f"lora.target_modules: {name} gets no adapter, because the loss is computed from its weights; leave it out"
            )
        elif not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", name):
            problems.append(
                f"lora.target_modules: expected names of layers such as q_proj, without patterns, found {shown(name)}"
            )
    return problems
