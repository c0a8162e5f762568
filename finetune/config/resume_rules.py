"""Resuming with a changed config: for every key, whether a new value applies to the rest of the run or is refused, and why.

Keys that affect what is learned, or how saved state is read, are fixed when a run starts. Where it runs, how fast, at what cost
and how it is tracked may change from one attempt to the next.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from finetune.config.load import examples_per_step
from finetune.config.schema import RunConfig, TrainingSection
from finetune.errors import UserError, printable

Values = dict[str, Any]

ABSENT = "(absent)"
LONGEST = 60  # characters of a value that are printed


@dataclass(frozen=True)
class Rule:
    """Whether a new value applies to the rest of the run, and why or why not."""

    applies: bool
    why: str


@dataclass(frozen=True)
class Change:
    """A config key whose value differs from the checkpoint's, and the decision; str() gives one line."""

    key: str
    before: Any
    now: Any
    rule: Rule

    def __str__(self) -> str:
        verdict = "applies" if self.rule.applies else "refused"
        return f"{self.key}: {_shown(self.before)} -> {_shown(self.now)}: {verdict}, {self.rule.why}"


@dataclass(frozen=True)
class Decisions:
    applies: list[Change]
    refused: list[Change]


_APPLIES: dict[str, tuple[str, ...]] = {
    "from this attempt on": (
        *("budget.usd_per_hour", "budget.max_run_usd", "budget.max_hours"),
        *("checkpoint.every_minutes", "checkpoint.save_steps", "checkpoint.keep_last", "checkpoint.keep_every"),
        *("tracking.to", "tracking.wandb", "tracking.wandb_project", "tracking.project"),
        *("training.logging_steps", "training.eval_steps"),
    ),
    "it only changes the batches of validation": ("training.per_device_eval_batch_size",),
    "training does not read it": (
        *("evaluation.split", "evaluation.max_questions", "evaluation.batch_size", "evaluation.max_new_tokens"),
        *("evaluation.timeout_seconds", "evaluation.rule", "evaluation.dequantize"),
        *("evaluation.max_memory_mib", "evaluation.max_temp_mib", "evaluation.max_rows", "evaluation.max_result_mib"),
        *("evaluation.large_database_mib", "evaluation.generator", "evaluation.adapter", "evaluation.dtype"),
        *("evaluation.samples", "evaluation.temperature", "evaluation.seed", "evaluation.retries"),
        *("plan.gpus", "plan.disk_gib", "plan.setup_minutes", "plan.spot_preemptions_per_hour"),
        *("plan.records", "plan.mean_tokens", "plan.questions", "plan.answer_tokens"),
    ),
    "but a run that has started stays in its folder": ("training.output_dir", "training.run_name"),
    "the data are identified by their hash, not by their folder": ("data.output_dir",),
    "the same mathematics with other rounding": (
        *("model.attn_implementation", "training.gradient_checkpointing", "training.max_memory_gib"),
    ),
}

_REFUSED: dict[str, tuple[str, ...]] = {
    "the adapter was trained on these weights": (
        *("model.name", "model.revision", "model.trust_remote_code"),
        *("quantization.load_in_4bit", "quantization.bnb_4bit_quant_type", "quantization.bnb_4bit_use_double_quant"),
    ),
    "the run computes in this precision": ("model.torch_dtype", "model.cpu_bf16_matmul"),
    "the run trains with this loss": ("training.objective",),
    "it decides which examples are trained on": ("model.max_seq_length",),
    "the adapter has this shape": ("lora.r", "lora.target_modules"),
    "the adapter was trained with this factor": ("lora.lora_alpha",),
    "the run regularises with this rate": ("lora.lora_dropout", "training.weight_decay"),
    "the run trains on data prepared with this value": (
        *("data.sources", "data.val_fraction", "data.test_fraction", "data.split_by", "data.schema_format"),
        *("data.max_train_records", "data.statements", "data.seed"),
    ),
    "it determines the order of the examples and the dropout masks": ("training.seed",),
    "the learning rate would jump": (
        *("training.learning_rate", "training.lr_scheduler_type", "training.warmup_ratio"),
        *("training.num_train_epochs", "training.max_steps"),
    ),
    "it clips the gradients of every step of this run": ("training.max_grad_norm",),
    "the optimizer's saved state is of this kind": ("training.optim",),
}

BATCH_KEYS = (
    *("training.effective_batch_size", "training.per_device_train_batch_size"),
    "training.gradient_accumulation_steps",
)
ORDER_KEYS = ("training.kernels", "training.group_by_length")

RULES: dict[str, Rule] = {
    key: Rule(applies, why)
    for applies, table in ((True, _APPLIES), (False, _REFUSED))
    for why, keys in table.items()
    for key in keys
}
"""The rule of every key, as `section.key`, except BATCH_KEYS and ORDER_KEYS: `decide` looks at their combined effect."""

UNKNOWN = Rule(False, "this version of finetune does not know the key")


def decide(before: Values, now: Values, *, gpus: int = 1, backend: str | None = None) -> Decisions:
    """The decision for each key in which two resolved configs (`config.load.to_dict`) differ: the checkpoint's and the edited
    one.

    A missing key has its default value, so that checkpoints of earlier versions can be resumed. gpus: number of GPUs of this
    attempt. backend: that of the earlier attempts (`step.backend` of run.json: fused or hf), None if unknown; then a change
    of training.kernels is refused whenever it might change the order of the examples. Raises UserError if the edited keys
    contradict each other.
    """
    before, now = _complete(before), _complete(now)
    batch_size, order = (
        cache(lambda: _same_batch_size(before, now, gpus)),
        cache(lambda: _same_order(before, now, backend)),
    )
    changes = []
    for key, old, new in _differences(before, now):
        table_key = ".".join(re.sub(r"\[\d+\]", "", key).split(".")[:2])
        joint = batch_size if table_key in BATCH_KEYS else order if table_key in ORDER_KEYS else None
        changes.append(Change(key, old, new, joint() if joint else RULES.get(table_key, UNKNOWN)))
    return Decisions(
        applies=[change for change in changes if change.rule.applies],
        refused=[change for change in changes if not change.rule.applies],
    )


def refusal(decisions: Decisions, config_yaml: Path) -> UserError | None:
    """One error that names every refused change; None if nothing is refused."""
    if not decisions.refused:
        return None
    lines = "; ".join(map(str, decisions.refused))
    return UserError(
        f"{config_yaml}: {lines}; restore the earlier values, or start a new run", code="resume.config_changed"
    )


def _same_batch_size(before: Values, now: Values, gpus: int) -> Rule:
    """Whether an optimizer step keeps its number of examples, however it is split into micro-batches."""
    new = examples_per_step(TrainingSection(**now["training"]), gpus)
    try:
        old = examples_per_step(TrainingSection(**before["training"]), gpus)
    except UserError:  # it started on another number of GPUs, for which the three numbers agreed
        old = before["training"]["effective_batch_size"]
    if old == new:
        return Rule(True, f"a step keeps its {new} examples; only rounding and dropout masks differ")
    return Rule(False, f"a step of this run has {old} examples and would have {new}")


def _same_order(before: Values, now: Values, backend: str | None) -> Rule:
    """Whether the examples keep their order, in which the saved position in the data is counted. The Hugging Face backend groups
    them by length (group_by_length), the fused backend does not."""
    old, new = (_sorted(values["training"], backend) for values, backend in ((before, backend), (now, None)))
    if old is not None and old == new:
        return Rule(True, "the same mathematics with other rounding")
    return Rule(
        False,
        "the order of the examples would change; training.group_by_length: false keeps it if the run started with "
        "training.kernels: fused or group_by_length: false",
    )


def _sorted(training: Values, backend: str | None) -> bool | None:
    """Whether the examples are grouped by length; None if that depends on what `auto` chooses."""
    backend = training["kernels"] if training["kernels"] != "auto" else backend
    if not training["group_by_length"] or backend == "fused":
        return False
    return True if backend == "hf" else None


def _complete(values: Values) -> Values:
    """The values, with the default for every missing key of the schema."""
    complete = dict(values)
    for section, kind in get_type_hints(RunConfig).items():
        defaults = {field.name: _default(field) for field in fields(kind)}
        complete[section] = defaults | (values.get(section) or {})
    return complete


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _differences(before: Values, now: Values) -> Iterator[tuple[str, Any, Any]]:
    """(key, before, now) in the order of the new config; lists of sections are compared item by item."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    for key in {**new, **old}:
        if old.get(key, ABSENT) != new.get(key, ABSENT):
            yield key, old.get(key, ABSENT), new.get(key, ABSENT)


def _leaves(values: Values, place: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{place}{key}.")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for number, item in enumerate(value):
                yield from _leaves(item, f"{place}{key}[{number}].")
        else:
            yield f"{place}{key}", value


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value)
    text = printable(text)
    return text if len(text) <= LONGEST else text[: LONGEST - 2] + " …"
