"""The typed schema of a run's YAML, and how it is read.

One YAML is one run. `load_config` merges file and dotlist overrides into `RunConfig`, and reports every mistake at once:
where it stands, what was expected, and the nearest valid name. Values keep the names of the original training guide;
the one place that maps them to the libraries' own names is `trainer.trainer_arguments`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finetune.errors import UserError

Dtype = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass
class ModelSection:
    name: str = MISSING  # a hub id, a local folder, or package://<module>/<file>.gguf
    revision: str | None = None  # commit of the hub id; without it a hub may serve other weights tomorrow
    max_seq_length: int = 2048  # tokens of prompt + answer; longer examples are left out and counted, never cut
    torch_dtype: Dtype = "auto"  # auto: bfloat16 from compute capability 8.0, float16 below, float32 on CPU
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    trust_remote_code: bool = False
    cpu_bf16_matmul: bool = False  # on a CPU with bfloat16 instructions: round the inputs of float32 matrix products


@dataclass
class QuantizationSection:
    load_in_4bit: bool = True
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True


@dataclass
class LoraSection:
    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


@dataclass
class SourceSection:
    kind: Literal["jsonl", "spider", "huggingface"] = MISSING
    path: str = MISSING  # a file (jsonl), a folder (spider), or a hub id or folder (spider, huggingface)
    revision: str | None = None  # required where path is a hub id
    files: list[str] = field(default_factory=list)  # spider: question files inside path, e.g. train_spider.json
    subset: str | None = None  # huggingface: which split of the dataset to read, e.g. train
    columns: dict[str, str] = field(default_factory=dict)  # huggingface: our field -> their column
    databases: str | None = None  # folder that holds <db_id>/<db_id>.sqlite; spider: <path>/database
    dialect: str = "sqlite"
    split: Literal["auto", "train", "val", "test"] = "auto"  # auto: the record's own split, else by fraction


@dataclass
class DataSection:
    sources: list[SourceSection] = field(default_factory=list)
    output_dir: str = MISSING  # where `data prepare` writes and every later stage reads
    val_fraction: float = 0.05  # of the records whose split is auto
    test_fraction: float = 0.1
    split_by: Literal["question", "database"] = "question"
    schema_format: Literal["ddl", "compact"] = "ddl"  # how the prompt shows the schema; compact costs fewer tokens
    max_train_records: int | None = None
    seed: int = 13


@dataclass
class TrainingSection:
    output_dir: str = "runs"
    run_name: str | None = None  # null: a new numbered folder named after the config file
    seed: int = 42
    num_train_epochs: float = 3.0
    max_steps: int = -1  # -1: as many as the epochs take
    per_device_train_batch_size: int = 4
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 4
    learning_rate: float = 2e-4
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = 0.03  # of all optimizer steps
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = (
        "paged_adamw_8bit"
    )
    gradient_checkpointing: bool = True
    group_by_length: bool = True  # batches of similar length: less padding
    logging_steps: int = 10
    eval_steps: int = 200  # optimizer steps between two validation losses; 0: none


@dataclass
class CheckpointSection:
    save_steps: int = 100  # optimizer steps between two checkpoints; one more is saved at the end
    keep_last: int = 2


@dataclass
class BudgetSection:
    usd_per_hour: float | None = None  # price of the whole machine; null: unknown, no dollars are reported
    max_run_usd: float | None = None  # needs usd_per_hour
    max_hours: float | None = None  # wall-clock hours of training


@dataclass
class TrackingSection:
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online when a key is there
    wandb_project: str = "text2sql"


@dataclass
class EvaluationSection:
    split: Literal["test", "val"] = "test"
    max_questions: int | None = None  # null: all; else a seeded sample of the split
    batch_size: int = 16
    max_new_tokens: int = 256
    timeout_seconds: float = 10.0  # for one SQL query
    rule: Literal["test_suite", "bird_set", "strict"] = "test_suite"  # when two results count as equal
    dequantize: bool = False  # unpack the same 4-bit weights once: same numbers, faster, more memory


@dataclass
class RunConfig:
    model: ModelSection = field(default_factory=ModelSection)
    quantization: QuantizationSection = field(default_factory=QuantizationSection)
    lora: LoraSection = field(default_factory=LoraSection)
    data: DataSection = field(default_factory=DataSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    budget: BudgetSection = field(default_factory=BudgetSection)
    tracking: TrackingSection = field(default_factory=TrackingSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML and dotlist overrides (`training.num_train_epochs=1`) into a checked `RunConfig`.

    Raises UserError that lists every unknown key, ill-typed value, missing key and impossible value, each with its place.
    """
    tree = _read_yaml(path)
    problems: list[str] = []
    for override in overrides or []:
        _merge_override(tree, override, problems)
    return _checked(tree, str(path), problems)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The resolved config as plain dicts and lists, ready for YAML or JSON."""
    container = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def from_dict(values: dict[str, Any], origin: str) -> RunConfig:
    """The inverse of `to_dict`, as strict as `load_config`; `origin` names the file in errors."""
    return _checked(values, origin, [])


def _checked(tree: dict[str, Any], origin: str, problems: list[str]) -> RunConfig:
    values = _check_section(tree, RunConfig, "", problems)
    if not problems:
        try:
            config: RunConfig = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), values))  # type: ignore[assignment]
        except OmegaConfBaseException as error:  # a ${reference} that leads nowhere or to another type
            problems = [f"{error.full_key}: {_first_line(error)}"]
        else:
            problems = impossible_values(config)
    if problems:
        raise UserError(f"{origin}: " + "; ".join(problems))
    return config


def to_yaml(config: RunConfig) -> str:
    return str(OmegaConf.to_yaml(OmegaConf.structured(config)))


def config_hash(config: RunConfig) -> str:
    """SHA-256 (hex) of the resolved config, independent of key order and comments."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such config file; see configs/ for examples")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_first_line(error)}") from error
    except Exception as error:  # PyYAML raises several kinds, each with its line and column
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as model: and training:, found {type(tree).__name__}")
    return {str(key): value for key, value in tree.items()}


def _merge_override(tree: dict[str, Any], override: str, problems: list[str]) -> None:
    key, sign, text = override.partition("=")
    *sections, name = key.split(".")
    if not sign or not all([*sections, name]) or "[" in key:
        problems.append(f"override {override!r}: expected key=value, such as training.num_train_epochs=1")
        return
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except Exception as error:
        problems.append(f"override {override!r}: {_first_line(error)}")
        return
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        if not isinstance(tree[section], dict):
            problems.append(f"override {override!r}: {section} is not a section of keys")
            return
        tree = tree[section]
    assert isinstance(value, dict)
    tree[name] = value["value"]


def _check_section(values: dict[Any, Any], schema: type, where: str, problems: list[str]) -> dict[str, Any]:
    """Walk one section against its dataclass; append problems, return what passed."""
    known = {f.name: f for f in fields(schema)}
    hints = get_type_hints(schema)
    passed: dict[str, Any] = {}
    for key, value in values.items():
        place = f"{where}{key}"
        if key not in known:
            problems.append(f"unknown key {place}{_nearest(str(key), where, list(known))}")
        elif is_dataclass(hints[key]):
            if isinstance(value, dict) or value is None:  # None: all keys of the section are commented out
                passed[key] = _check_section(value or {}, hints[key], f"{place}.", problems)
            else:
                problems.append(f"{place}: expected a section of keys, found {value!r}")
        elif hints[key] == list[SourceSection]:
            passed[key] = _check_sources(value, place, problems)
        else:
            _check_leaf(schema, key, value, place, problems, passed)
    for name in known:
        if name not in values and known[name].default == MISSING:
            problems.append(f"missing key {where}{name}")
    for name, hint in hints.items():
        if is_dataclass(hint) and name not in values:
            _check_section({}, hint, f"{where}{name}.", problems)  # type: ignore[arg-type]
    return passed


def _check_sources(value: Any, place: str, problems: list[str]) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        problems.append(f"{place}: expected a list of sources, each with kind and path")
        return []
    return [_check_section(item, SourceSection, f"{place}[{i}].", problems) for i, item in enumerate(value)]


def _check_leaf(schema: type, key: str, value: Any, place: str, problems: list[str], passed: dict[str, Any]) -> None:
    hint = str(schema.__annotations__[key])
    fits = "bool" in hint or not isinstance(value, bool)  # OmegaConf would read true as 1
    fits = fits and (isinstance(value, list), isinstance(value, dict)) == ("list[" in hint, "dict[" in hint)
    try:
        if fits:
            OmegaConf.merge(OmegaConf.structured(schema), {key: value})
    except OmegaConfBaseException:
        fits = False
    if fits and value != MISSING:
        passed[key] = value
    else:
        problems.append(f"{place}: expected {_describe(schema, key)}, found {value!r}")


def _describe(schema: type, key: str) -> str:
    hint = str(schema.__annotations__[key])
    if hint == "Dtype":
        return "one of auto, bfloat16, float16, float32"
    if hint.startswith("Literal["):
        return "one of " + hint.removeprefix("Literal[").rstrip("]").replace('"', "").replace("'", "")
    return hint


def _nearest(key: str, where: str, names: list[str]) -> str:
    """A hint with the nearest valid name: in this section first, then anywhere in the schema."""
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if close:
        return f" (did you mean {where}{close[0]}?)"
    everywhere = {
        name: f"{section.name}.{name}"
        for section in fields(RunConfig)
        for name in (f.name for f in fields(get_type_hints(RunConfig)[section.name]))
    }
    close = difflib.get_close_matches(key, list(everywhere), n=1, cutoff=0.75)
    return f" (did you mean {everywhere[close[0]]}?)" if close else f" (valid here: {', '.join(names)})"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def impossible_values(config: RunConfig) -> list[str]:
    """Values of the right type that no run can have, each as one sentence."""
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
        (d.val_fraction + d.test_fraction < 1, "data.val_fraction + data.test_fraction: nothing left to train on"),
        (d.max_train_records is None or d.max_train_records >= 1, "data.max_train_records: expected at least 1"),
        (0 < t.num_train_epochs < math.inf, "training.num_train_epochs: expected more than 0"),
        (t.seed >= 0, "training.seed: expected at least 0"),
        (d.seed >= 0, "data.seed: expected at least 0"),
        (0 <= t.weight_decay < math.inf, "training.weight_decay: expected at least 0"),
        (0 <= t.max_grad_norm < math.inf, "training.max_grad_norm: expected at least 0"),
        (t.max_steps == -1 or t.max_steps >= 1, "training.max_steps: expected -1 or at least 1"),
        (t.per_device_train_batch_size >= 1, "training.per_device_train_batch_size: expected at least 1"),
        (t.per_device_eval_batch_size >= 1, "training.per_device_eval_batch_size: expected at least 1"),
        (t.gradient_accumulation_steps >= 1, "training.gradient_accumulation_steps: expected at least 1"),
        (0 < t.learning_rate < 1, "training.learning_rate: expected between 0 and 1"),
        (0 <= t.warmup_ratio < 1, "training.warmup_ratio: expected 0 <= ratio < 1"),
        (t.logging_steps >= 1, "training.logging_steps: expected at least 1"),
        (t.eval_steps >= 0, "training.eval_steps: expected 0 (never) or more"),
        (c.checkpoint.save_steps >= 1, "checkpoint.save_steps: expected at least 1"),
        (c.checkpoint.keep_last >= 1, "checkpoint.keep_last: expected at least 1"),
        (c.evaluation.batch_size >= 1, "evaluation.batch_size: expected at least 1"),
        (c.evaluation.max_new_tokens >= 1, "evaluation.max_new_tokens: expected at least 1"),
        (0 < c.evaluation.timeout_seconds < math.inf, "evaluation.timeout_seconds: expected more than 0"),
        (c.evaluation.max_questions is None or c.evaluation.max_questions >= 1, "evaluation.max_questions: at least 1"),
        (
            c.budget.max_run_usd is None or c.budget.usd_per_hour is not None,
            "budget.max_run_usd: needs budget.usd_per_hour, the price of the machine",
        ),
    ]
    problems = [message for holds, message in rules if not holds]
    for name in ("usd_per_hour", "max_run_usd", "max_hours"):
        value = getattr(c.budget, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            problems.append(f"budget.{name}: expected more than 0")
    for number, source in enumerate(d.sources):
        if source.kind == "huggingface" and not {"question", "sql"} <= set(source.columns):
            problems.append(f"data.sources[{number}].columns: expected at least question and sql")
    return problems
