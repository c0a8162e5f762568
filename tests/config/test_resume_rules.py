"""What may change in a run's config between two attempts, key by key: the table is complete, and each decision says why."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from finetune.config.load import from_dict, to_dict
from finetune.config.resume_rules import BATCH_KEYS, ORDER_KEYS, RULES, decide, refusal
from finetune.config.schema import RunConfig
from tests.helpers.errors import raises

SOURCES: list[dict[str, Any]] = [
    {"kind": "jsonl", "path": "a.jsonl"},
    {"kind": "spider", "path": "spider", "files": ["train.json"]},
]


def resolved(**changes: Any) -> dict[str, Any]:
    """A resolved config with changed keys, written with __ for the dot: lora__r=8."""
    values: dict[str, Any] = {
        "model": {"name": "some/model"},
        "data": {"output_dir": "prepared", "sources": copy.deepcopy(SOURCES)},
    }
    for place, value in changes.items():
        section, key = place.split("__")
        values.setdefault(section, {})[key] = value
    return to_dict(from_dict(values, "a test"))


def lines(before: dict[str, Any], now: dict[str, Any], **known: Any) -> tuple[list[str], list[str]]:
    decisions = decide(before, now, **known)
    return [str(change) for change in decisions.applies], [str(change) for change in decisions.refused]


def test_every_key_of_the_schema_has_a_rule_and_every_rule_a_key() -> None:
    keys = [f"{section}.{field.name}" for section, kind in get_type_hints(RunConfig).items() for field in fields(kind)]
    ruled = [*RULES, *BATCH_KEYS, *ORDER_KEYS]
    assert len(keys) > 60
    assert sorted(ruled) == sorted(keys)


@pytest.mark.parametrize("key", sorted(RULES))
def test_a_changed_key_is_decided_as_its_rule_says(key: str) -> None:
    before = resolved()
    section, name = key.split(".")
    now = copy.deepcopy(before)
    now[section][name] = "another"
    decisions = decide(before, now)
    [change] = [*decisions.applies, *decisions.refused][:1]
    assert change.key.startswith(key)
    assert all(change.rule == RULES[key] for change in [*decisions.applies, *decisions.refused])
    assert bool(decisions.applies) == RULES[key].applies and bool(decisions.refused) != RULES[key].applies


FIXED = (
    *("model.name", "model.revision", "model.max_seq_length", "model.torch_dtype", "lora.r", "lora.target_modules"),
    *("lora.lora_alpha", "lora.lora_dropout", "quantization.load_in_4bit", "training.seed", "training.learning_rate"),
    *("training.lr_scheduler_type", "training.warmup_ratio", "training.num_train_epochs", "training.max_steps"),
    *(
        "training.objective",
        "training.optim",
        "training.weight_decay",
        "training.max_grad_norm",
        "data.sources",
        "data.seed",
    ),
    *("data.split_by", "data.val_fraction", "data.test_fraction", "data.schema_format", "data.max_train_records"),
    "data.statements",
)
CHANGEABLE = (
    *("budget.max_run_usd", "budget.max_hours", "budget.usd_per_hour", "tracking.wandb", "evaluation.split"),
    *("tracking.to", "tracking.project"),
    *("plan.gpus", "checkpoint.every_minutes", "checkpoint.save_steps", "checkpoint.keep_last", "data.output_dir"),
    *("training.logging_steps", "training.eval_steps", "training.per_device_eval_batch_size", "training.run_name"),
    *("training.output_dir", "training.gradient_checkpointing", "training.max_memory_gib"),
    "model.attn_implementation",
)


@pytest.mark.parametrize(("keys", "applies"), [(FIXED, False), (CHANGEABLE, True)])
def test_what_affects_learning_is_fixed_and_what_affects_cost_is_not(keys: tuple[str, ...], applies: bool) -> None:
    assert {key for key in keys if RULES[key].applies != applies} == set()


def test_a_change_is_one_line_with_both_values_and_the_reason() -> None:
    applies, refused = lines(resolved(), resolved(lora__r=8, budget__max_hours=9.5, training__optim="adamw_torch"))
    assert refused == [
        "lora.r: 16 -> 8: refused, the adapter has this shape",
        "training.optim: paged_adamw_8bit -> adamw_torch: refused, the optimizer's saved state is of this kind",
    ]
    assert applies == ["budget.max_hours: null -> 9.5: applies, from this attempt on"]


def test_an_unchanged_config_has_no_decisions() -> None:
    decisions = decide(resolved(), resolved())
    assert (decisions.applies, decisions.refused) == ([], []) and refusal(decisions, Path("run/config.yaml")) is None


def test_other_rounding_is_reported() -> None:
    [line] = lines(resolved(), resolved(model__attn_implementation="eager"))[0]
    assert line == "model.attn_implementation: auto -> eager: applies, the same mathematics with other rounding"


@pytest.mark.parametrize(
    ("before", "now", "gpus", "examples"),
    [
        ({}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}, 1, None),
        ({"effective_batch_size": 32}, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}, 2, None),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}, {"effective_batch_size": 16}, 1, None),
        ({}, {"effective_batch_size": 32}, 1, (16, 32)),
        ({}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}, 2, (16, 32)),
        ({"effective_batch_size": 8}, {"per_device_train_batch_size": 4}, 1, (8, 4)),
    ],
)
def test_micro_batches_may_change_as_long_as_the_step_keeps_its_examples(
    before: dict[str, Any], now: dict[str, Any], gpus: int, examples: tuple[int, int] | None
) -> None:
    def config(training: dict[str, Any]) -> dict[str, Any]:
        return resolved(**{f"training__{key}": value for key, value in training.items()})

    applies, refused = lines(config(before), config(now), gpus=gpus)
    if examples is None:
        assert applies and not refused
        assert all("a step keeps its" in line and "rounding and dropout" in line for line in applies)
    else:
        assert refused and not applies
        said = "refused, a step of this run has {} examples and would have {}".format(*examples)
        assert all(line.endswith(said) for line in refused)


def test_contradicting_batch_keys_are_a_user_error() -> None:
    contradiction = resolved(
        training__effective_batch_size=9,
        training__per_device_train_batch_size=4,
        training__gradient_accumulation_steps=4,
    )
    with raises("config.conflicting_values"):
        decide(resolved(), contradiction)


def test_a_run_started_on_other_gpus_is_compared_by_its_effective_batch_size() -> None:
    began_on_two = resolved(
        training__effective_batch_size=32,
        training__per_device_train_batch_size=4,
        training__gradient_accumulation_steps=4,
    )
    now = resolved(training__effective_batch_size=32, training__per_device_train_batch_size="auto")
    assert lines(began_on_two, now, gpus=1)[1] == []
    other = resolved(training__effective_batch_size=16, training__per_device_train_batch_size="auto")
    assert all("has 32 examples and would have 16" in line for line in lines(began_on_two, other, gpus=1)[1])


@pytest.mark.parametrize(
    ("before", "now", "backend", "applies"),
    [
        (("hf", False), ("fused", False), None, True),
        (("auto", False), ("hf", False), None, True),
        (("fused", True), ("hf", False), None, True),  # the fused backend draws them at random anyway
        (("fused", True), ("hf", True), None, False),
        (("hf", True), ("fused", True), None, False),
        (("hf", True), ("hf", False), None, False),
        (("auto", True), ("fused", True), None, False),
        (("auto", True), ("fused", True), "fused", True),
        (("auto", True), ("hf", True), "hf", True),
        (("auto", True), ("hf", True), "fused", False),
        (("auto", True), ("hf", False), "fused", True),
        (("hf", True), ("auto", True), "hf", False),
    ],
)
def test_kernels_may_change_unless_the_order_of_the_examples_changes(
    before: tuple[str, bool], now: tuple[str, bool], backend: str | None, applies: bool
) -> None:
    configs = [resolved(training__kernels=kernels, training__group_by_length=by) for kernels, by in (before, now)]
    applied, refused = lines(*configs, backend=backend)
    changed = sum(old != new for old, new in zip(before, now, strict=True))
    assert (len(applied), len(refused)) == ((changed, 0) if applies else (0, changed))
    assert all("rounding" in line for line in applied) and all("order of the examples" in line for line in refused)


def test_sources_are_compared_item_by_item_and_long_values_are_truncated() -> None:
    moved, shorter = copy.deepcopy(SOURCES), copy.deepcopy(SOURCES[:1])
    moved[1]["path"] = "elsewhere/" + "x" * 100
    [line] = lines(resolved(), resolved(data__sources=moved))[1]
    assert (
        line.startswith("data.sources[1].path: spider -> elsewhere/xxx") and " …: refused" in line and len(line) < 170
    )
    refused = lines(resolved(), resolved(data__sources=shorter))[1]
    assert (
        "data.sources[1].kind: spider -> (absent): refused, the run trains on data prepared with this value" in refused
    )


def test_keys_missing_in_an_older_checkpoint_have_their_defaults() -> None:
    before = resolved()
    del before["checkpoint"]["every_minutes"], before["budget"]
    assert lines(before, resolved()) == ([], [])
    assert lines(before, resolved(checkpoint__every_minutes=3.0))[0] == [
        "checkpoint.every_minutes: 10.0 -> 3.0: applies, from this attempt on"
    ]


@pytest.mark.parametrize(("section", "key"), [("lora", "use_dora"), ("distillation", "teacher")])
def test_an_unknown_key_is_refused(section: str, key: str) -> None:
    before = resolved()
    before.setdefault(section, {})[key] = True
    said = f"{section}.{key}: true -> (absent): refused, this version of finetune does not know the key"
    assert lines(before, resolved())[1] == [said]


def test_configs_that_went_through_json_are_the_same() -> None:
    assert lines(json.loads(json.dumps(resolved())), resolved()) == ([], [])


def test_the_refusal_names_the_file_the_changes_and_the_remedy() -> None:
    decisions = decide(resolved(), resolved(lora__r=8, training__seed=1, budget__max_hours=1.0))
    error = str(refusal(decisions, Path("runs/a/config.yaml")))
    assert error == (
        "runs/a/config.yaml: lora.r: 16 -> 8: refused, the adapter has this shape; training.seed: 42 -> 1: refused, it "
        "determines the order of the examples and the dropout masks; restore the earlier values, or start a new run"
    )


def test_it_needs_no_torch() -> None:
    code = "import sys, finetune.config.resume_rules; print('torch' in sys.modules or 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
