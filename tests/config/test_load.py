"""The config is strict, reports all mistakes at once, and is unchanged when it is written and read again."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from finetune.config.load import config_hash, examples_per_step, from_dict, load_config, to_dict, to_yaml
from finetune.config.schema import RunConfig
from finetune.machine.gpus import MACHINES
from tests.helpers.errors import raises

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALLEST: dict[str, Any] = {
    "model": {"name": "some/model"},
    "data": {"output_dir": "out", "sources": [{"kind": "jsonl", "path": "data.jsonl"}]},
}
HUGGINGFACE = {"kind": "huggingface", "path": "x", "columns": {"question": "q", "sql": "s"}}


def write(folder: Path, tree: str | dict[str, Any], name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(tree if isinstance(tree, str) else OmegaConf.to_yaml(OmegaConf.create(tree)))
    return path


def merged(**sections: dict[str, Any]) -> dict[str, Any]:
    """The smallest config with some values set on top."""
    return {
        name: {**SMALLEST.get(name, {}), **sections.get(name, {})} for name in dict.fromkeys([*SMALLEST, *sections])
    }


def problems(code: str, path: Path, *overrides: str) -> str:
    with raises(code) as caught:
        load_config(path, list(overrides))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message


# renamed values


@pytest.mark.parametrize(("old", "new"), [("lean", "fused"), ("stock", "hf")])
def test_an_old_name_of_a_value_is_accepted_and_the_new_one_reported_once(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("finetune.config.load._warned", set())
    path = write(tmp_path, merged(training={"kernels": old}))
    config = load_config(path)
    assert config.training.kernels == new
    assert capsys.readouterr().err == f"{path}: training.kernels: {old} is now called {new}; both names are accepted\n"
    assert load_config(write(tmp_path, SMALLEST, "other.yaml"), [f"training.kernels={old}"]).training.kernels == new
    assert from_dict(merged(training={"kernels": old}), "run.json").training.kernels == new
    assert config_hash(config) == config_hash(
        load_config(write(tmp_path, merged(training={"kernels": new}), "new.yaml"))
    )
    assert capsys.readouterr().err == ""


def test_a_value_that_never_existed_is_still_refused(tmp_path: Path) -> None:
    path = write(tmp_path, merged(training={"kernels": "lean_"}))
    assert "training.kernels: expected one of auto, fused, hf, found 'lean_'" in problems("config.bad_type", path)


# what is accepted


def test_a_missing_key_has_its_default(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, SMALLEST))
    assert config.model.name == "some/model"
    assert config.data.sources[0].path == "data.jsonl"
    assert (config.lora.r, config.training.learning_rate, config.model.torch_dtype) == (16, 2e-4, "auto")


def test_overrides_win_over_the_file_and_are_typed(tmp_path: Path) -> None:
    path = write(tmp_path, merged(training={"num_train_epochs": 3}))
    config = load_config(
        path,
        [
            "training.num_train_epochs=1",
            "training.learning_rate=1e-5",
            "lora.target_modules=[q_proj,v_proj]",
            "quantization.load_in_4bit=false",
            "training.run_name=null",
            "model.name=a=b",
            "budget.max_hours=2",
            "budget.max_hours=3",
        ],
    )
    assert config.training.num_train_epochs == 1.0
    assert config.training.learning_rate == 1e-5
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    assert config.quantization.load_in_4bit is False
    assert config.training.run_name is None
    assert config.model.name == "a=b"
    assert config.budget.max_hours == 3.0


def test_an_override_can_replace_the_list_of_sources(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, SMALLEST), ["data.sources=[{kind: spider, path: there}]"])
    assert [(source.kind, source.path) for source in config.data.sources] == [("spider", "there")]


@pytest.mark.parametrize("file", [{"lora": {"lora_alpha": 8, "lora_dropout": 0.0}}, {}])
def test_a_section_as_an_override_sets_the_keys_that_it_names(tmp_path: Path, file: dict[str, Any]) -> None:
    """As OmegaConf merges; a list in it replaces the list."""
    path = write(tmp_path, SMALLEST | file)
    before, after = load_config(path), load_config(path, ["lora={r: 8, target_modules: [q_proj]}"])
    assert (after.lora.r, after.lora.target_modules) == (8, ["q_proj"])
    assert (after.lora.lora_alpha, after.lora.lora_dropout) == (before.lora.lora_alpha, before.lora.lora_dropout)
    assert load_config(path, ["data={seed: 3}"]).data.sources == before.data.sources
    assert load_config(path, ["lora.r=4", "lora={r: 8}", "lora={}"]).lora.r == 8


def test_a_section_as_an_override_leaves_one_that_it_is_an_alias_of(tmp_path: Path) -> None:
    text = "training: &one {seed: 1}\nevaluation: *one\nmodel: {name: m}\n"
    (tmp_path / "c.yaml").write_text(text + "data: {output_dir: out, sources: [{kind: jsonl, path: data.jsonl}]}\n")
    config = load_config(tmp_path / "c.yaml", ["training={seed: 2}"])
    assert (config.training.seed, config.evaluation.seed) == (2, 1)


def test_an_override_sets_a_key_of_an_empty_or_missing_section(tmp_path: Path) -> None:
    for head in ("training:\n", ""):
        path = write(tmp_path, head + OmegaConf.to_yaml(OmegaConf.create(SMALLEST)))
        assert load_config(path, ["training.seed=7"]).training.seed == 7


# what is refused


def test_every_mistake_is_reported_at_once_with_its_place_and_the_nearest_name(tmp_path: Path) -> None:
    tree = {
        "modle": {"name": "x"},
        "training": {"learnin_rate": 1, "seed": "abc", "optim": "adam", "r": 8},
        "data": {"sources": [{"kind": "xml", "pth": "p"}]},
        "max_seq_length": 5,
    }
    message = problems("config.several", write(tmp_path, tree), "lora.rr=1", "nonsense")
    for part in (
        "unknown key modle (did you mean model?)",
        "unknown key training.learnin_rate (did you mean training.learning_rate?)",
        "training.seed: expected int, found 'abc'",
        "training.optim: expected one of adamw_torch, ",
        "data.sources[0].kind: expected one of jsonl, spider, huggingface, found 'xml'",
        "unknown key data.sources[0].pth (did you mean data.sources[0].path?)",
        "missing key data.sources[0].path",
        "missing key data.output_dir",
        "missing key model.name",
        "unknown key max_seq_length (did you mean model.max_seq_length?)",
        "unknown key lora.rr",
        "override 'nonsense': expected key=value",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("training", "seed", 1.5, "int"),
        ("training", "seed", True, "int"),
        ("training", "seed", None, "int"),
        ("training", "seed", [1], "int"),
        ("training", "learning_rate", "fast", "float"),
        ("training", "learning_rate", False, "float"),
        ("training", "output_dir", None, "str"),
        ("training", "gradient_checkpointing", "sometimes", "bool | Literal['auto']"),
        ("training", "per_device_train_batch_size", "many", "int | Literal['auto']"),
        ("training", "kernels", "fast", "one of auto, fused, hf"),
        ("training", "max_memory_gib", "all", "float | None"),
        ("lora", "target_modules", "q_proj", "list[str]"),
        ("lora", "target_modules", {"q_proj": 1}, "list[str]"),
        ("lora", "target_modules", None, "list[str]"),
        ("model", "torch_dtype", "bf16", "one of auto, bfloat16, float16, float32"),
        ("tracking", "wandb", False, "one of auto, online, offline, disabled"),
        ("budget", "max_hours", "two", "float | None"),
        ("plan", "gpus", "A100", "list[str]"),
        ("plan", "records", 1.5, "int | None"),
    ],
)
def test_an_ill_typed_value_is_refused_with_what_was_expected(
    tmp_path: Path, section: str, key: str, value: object, expected: str
) -> None:
    message = problems("config.bad_type", write(tmp_path, merged(**{section: {key: value}})))
    found = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
    assert f"{section}.{key}: expected {expected}, found {found}" in message


@pytest.mark.parametrize("columns", [["question"], "question", {"question": [1]}, {"question": None}])
def test_ill_typed_columns_of_a_source_are_refused(tmp_path: Path, columns: object) -> None:
    source = {**HUGGINGFACE, "columns": columns}
    assert "data.sources[0].columns: expected dict[str, str]" in problems(
        "config.bad_type", write(tmp_path, merged(data={"sources": [source]}))
    )


@pytest.mark.parametrize("sources", [{}, "data.jsonl", ["data.jsonl"], None])
def test_sources_that_are_not_a_list_of_sections_are_refused(tmp_path: Path, sources: object) -> None:
    message = problems("config.bad_type", write(tmp_path, merged(data={"sources": sources})))
    assert "data.sources: expected a list of sources" in message


@pytest.mark.parametrize("value", [5, [1], "text"])
def test_a_section_that_is_not_a_mapping_is_refused(tmp_path: Path, value: object) -> None:
    message = problems("config.bad_type", write(tmp_path, {**SMALLEST, "training": value}))
    assert f"training: expected a section of keys, found {value!r}" in message


REFERENCE = "config.bad_reference"


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("${oc.env:NO_SUCH_VARIABLE}", REFERENCE),
        ("${lora.no_such_key}", REFERENCE),
        ("${oc.env:HOME}", REFERENCE),
        ("???", "config.bad_type"),
    ],
)
def test_a_reference_that_cannot_be_resolved_is_refused_with_its_key(tmp_path: Path, value: str, code: str) -> None:
    assert "training.seed" in problems(code, write(tmp_path, merged(training={"seed": value})))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "max_seq_length", 8),
        ("lora", "r", 0),
        ("lora", "lora_alpha", 0),
        ("lora", "lora_dropout", 1.0),
        ("lora", "lora_dropout", float("nan")),
        ("lora", "target_modules", []),
        ("data", "sources", []),
        ("data", "sources", [{"kind": "huggingface", "path": "x", "columns": {"question": "q"}}]),
        ("data", "val_fraction", -0.1),
        ("data", "test_fraction", 1.0),
        ("data", "max_train_records", 0),
        ("training", "num_train_epochs", 0),
        ("training", "num_train_epochs", float("inf")),
        ("training", "max_steps", 0),
        ("training", "per_device_train_batch_size", 0),
        ("training", "per_device_eval_batch_size", 0),
        ("training", "gradient_accumulation_steps", 0),
        ("training", "effective_batch_size", 0),
        ("training", "max_memory_gib", 0.0),
        ("training", "learning_rate", 0.0),
        ("training", "learning_rate", float("nan")),
        ("training", "warmup_ratio", 1.0),
        ("training", "weight_decay", -0.1),
        ("training", "weight_decay", float("nan")),
        ("training", "max_grad_norm", -1.0),
        ("training", "seed", -1),
        ("data", "seed", -1),
        ("training", "logging_steps", 0),
        ("training", "eval_steps", -1),
        ("checkpoint", "save_steps", 0),
        ("checkpoint", "keep_last", 0),
        ("budget", "usd_per_hour", 0.0),
        ("budget", "max_hours", float("inf")),
        ("budget", "max_run_usd", -5.0),
        ("budget", "max_run_usd", float("nan")),
        ("plan", "gpus", []),
        ("plan", "gpus", ["A100", "a100"]),
        ("plan", "gpus", ["T4", "T4"]),
        ("plan", "disk_gib", 9),
        ("plan", "setup_minutes", -1.0),
        ("plan", "setup_minutes", float("inf")),
        ("plan", "spot_preemptions_per_hour", -0.1),
        ("plan", "spot_preemptions_per_hour", 10.1),
        ("plan", "spot_preemptions_per_hour", float("nan")),
        ("plan", "records", 0),
        ("plan", "mean_tokens", 0.0),
        ("plan", "questions", 0),
        ("plan", "answer_tokens", 0.0),
        ("plan", "mean_tokens", float("nan")),
        ("evaluation", "batch_size", 0),
        ("evaluation", "max_new_tokens", 0),
        ("evaluation", "timeout_seconds", 0.0),
        ("evaluation", "timeout_seconds", float("inf")),
        ("evaluation", "max_questions", 0),
        ("evaluation", "max_memory_mib", 63),
        ("evaluation", "max_memory_mib", 2**24 + 1),
        ("evaluation", "max_temp_mib", -1),
        ("evaluation", "max_temp_mib", 2**24 + 1),
        ("evaluation", "max_rows", 0),
        ("evaluation", "max_rows", 10**9 + 1),
        ("evaluation", "max_result_mib", 0),
        ("evaluation", "max_result_mib", 2**14 + 1),
        ("evaluation", "large_database_mib", 0.5),
        ("evaluation", "large_database_mib", float("nan")),
    ],
)
def test_an_out_of_range_value_is_refused_with_its_key(tmp_path: Path, section: str, key: str, value: object) -> None:
    assert f"{section}.{key}" in problems("config.bad_value", write(tmp_path, merged(**{section: {key: value}})))


def test_boundary_values_are_accepted(tmp_path: Path) -> None:
    plan = {"gpus": list(MACHINES), "disk_gib": 10, "setup_minutes": 0, "spot_preemptions_per_hour": 10, "records": 1}
    limits = {"max_run_usd": 5.0}  # whether the machine has a price is known only on that machine
    config = load_config(write(tmp_path, merged(plan=plan | {"mean_tokens": 1}, budget=limits)))
    assert (config.plan.gpus, config.plan.mean_tokens, config.budget.max_run_usd) == (list(MACHINES), 1.0, 5.0)


def test_an_unknown_gpu_is_refused_with_the_known_names(tmp_path: Path) -> None:
    message = problems("config.bad_value", write(tmp_path, merged(plan={"gpus": ["A100", "K80"]})))
    assert "plan.gpus: unknown GPU 'K80'; known: A100, L4, T4, V100, H100" in message


def test_fractions_that_leave_nothing_to_train_on_are_refused(tmp_path: Path) -> None:
    message = problems("config.bad_value", write(tmp_path, merged(data={"val_fraction": 0.5, "test_fraction": 0.5})))
    assert "nothing is left to train on" in message


def test_out_of_range_values_are_reported_all_at_once(tmp_path: Path) -> None:
    message = problems("config.bad_value", write(tmp_path, merged(lora={"r": 0}, checkpoint={"keep_last": 0})))
    assert "lora.r" in message and "checkpoint.keep_last" in message


@pytest.mark.parametrize(
    ("text", "code", "part"),
    [
        ("model: [\n", "config.bad_yaml", "not valid YAML"),
        ("model: {name: a}\nmodel: {name: b}\n", "config.bad_yaml", "duplicate key model"),
        ("- a list\n", "config.bad_yaml", "expected sections"),
        ("", "config.missing_key", "missing key model.name"),
    ],
)
def test_a_file_that_is_not_a_config_is_refused(tmp_path: Path, text: str, code: str, part: str) -> None:
    assert part in problems(code, write(tmp_path, text))


def test_a_missing_file_a_folder_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    assert "no such config file" in problems("config.not_found", tmp_path / "absent.yaml")
    problems("config.not_found", tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    problems("config.bad_yaml", tmp_path / "binary.yaml")


@pytest.mark.parametrize("override", ["training.seed", "=3", "training.seed=[1", "data.sources[0].path=x"])
def test_an_override_that_cannot_be_read_is_quoted(tmp_path: Path, override: str) -> None:
    assert f"override {override!r}: " in problems("config.bad_override", write(tmp_path, SMALLEST), override)


@pytest.mark.parametrize(
    ("override", "code", "key"),
    [
        ("seed=1", "config.unknown_key", "seed"),
        ("training.sed=1", "config.unknown_key", "training.sed"),
        ("training.seed.x=1", "config.bad_type", "training.seed"),
        ("a.b.c=1", "config.unknown_key", "a"),
    ],
)
def test_an_override_of_an_unknown_key_names_it(tmp_path: Path, override: str, code: str, key: str) -> None:
    assert re.search(rf"(unknown key )?{key}[: ]", problems(code, write(tmp_path, SMALLEST), override))


# round trips


def test_a_config_survives_yaml_json_and_dict(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, merged(data={"sources": [HUGGINGFACE], "max_train_records": 7})))
    assert load_config(write(tmp_path, to_yaml(config), "again.yaml")) == config
    assert from_dict(json.loads(json.dumps(to_dict(config))), "run.json") == config
    assert dataclasses.asdict(config) == to_dict(config)


def test_from_dict_is_as_strict_as_load_config(tmp_path: Path) -> None:
    values = to_dict(load_config(write(tmp_path, SMALLEST)))
    for key, value, code in (("rr", 8, "unknown_key"), ("r", "many", "bad_type"), ("r", 0, "bad_value")):
        with raises(f"config.{code}", match=rf"^run\.json: .*lora\.{key}"):
            from_dict({**values, "lora": {**values["lora"], key: value}}, "run.json")


def test_the_hash_depends_on_the_values_not_on_the_file(tmp_path: Path) -> None:
    tree = merged(training={"seed": 1, "num_train_epochs": 1})
    turned = {name: dict(reversed(list(section.items()))) for name, section in reversed(list(tree.items()))}
    written = [
        write(tmp_path, tree, "a.yaml"),
        write(tmp_path, "# a comment\n" + OmegaConf.to_yaml(OmegaConf.create(turned)), "b.yaml"),
        write(tmp_path, merged(training={"seed": 1, "num_train_epochs": 1.0}, lora={"r": 16}), "c.yaml"),
    ]
    hashes = {config_hash(load_config(path)) for path in written}
    assert len(hashes) == 1
    assert re.fullmatch("[0-9a-f]{64}", hashes.pop())


def test_the_hash_changes_with_any_value(tmp_path: Path) -> None:
    path = write(tmp_path, SMALLEST)
    changes = [
        "lora.r=8",
        "training.seed=1",
        "model.revision=abc",
        "data.sources=[{kind: jsonl, path: other}]",
    ]
    hashes = {config_hash(load_config(path, overrides)) for overrides in ([], *([change] for change in changes))}
    assert len(hashes) == len(changes) + 1


def test_defaults_are_not_shared_between_configs(tmp_path: Path) -> None:
    one, other = (load_config(write(tmp_path, SMALLEST)) for _ in range(2))
    one.lora.target_modules.append("lm_head")
    assert "lm_head" not in other.lora.target_modules + RunConfig().lora.target_modules


# shipped configs


def shipped() -> list[Path]:
    return sorted(path for pattern in ("*.yaml", "*.yml") for path in CONFIGS.rglob(pattern))


def test_configs_ship() -> None:
    assert {"mistral_7b_qlora.yaml", "mistral_7b_quick.yaml", "demo_cpu.yaml"} <= {path.name for path in shipped()}


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.name)
def test_a_shipped_config_loads_and_opens_with_the_command_that_runs_it(path: Path) -> None:
    load_config(path)
    head = re.match(r"(#.*\n)+", path.read_text())
    assert head, "expected comment lines first"
    name = path.relative_to(CONFIGS.parent).as_posix()
    assert f"finetune train {name}" in head[0] or "make demo" in head[0]


def test_the_qlora_config_keeps_the_values_of_the_training_guide() -> None:
    config = load_config(CONFIGS / "mistral_7b_qlora.yaml")
    model, lora, training, quantization = config.model, config.lora, config.training, config.quantization
    assert (model.name, model.max_seq_length) == ("mistralai/Mistral-7B-v0.1", 2048)
    assert model.revision and re.fullmatch("[0-9a-f]{40}", model.revision)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (16, 32, 0.05)
    assert sorted(lora.target_modules) == sorted(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
    assert (quantization.load_in_4bit, quantization.bnb_4bit_quant_type) == (True, "nf4")
    assert quantization.bnb_4bit_use_double_quant
    assert (training.num_train_epochs, training.learning_rate, training.warmup_ratio) == (3, 2e-4, 0.03)
    assert examples_per_step(training) == training.effective_batch_size == 16  # the guide's 4 x 4
    assert (training.per_device_train_batch_size, training.gradient_checkpointing) == ("auto", "auto")
    assert training.lr_scheduler_type == "cosine"


@pytest.mark.parametrize(
    ("keys", "examples"),
    [
        ({}, 16),
        ({"effective_batch_size": 24}, 24),
        ({"per_device_train_batch_size": 4}, 4),
        ({"per_device_train_batch_size": 4, "effective_batch_size": 16}, 16),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}, 12),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "effective_batch_size": 16}, 16),
    ],
)
def test_examples_of_an_optimizer_step(keys: dict[str, Any], examples: int) -> None:
    config = from_dict(merged(training=keys), "test")
    assert examples_per_step(config.training) == examples


def test_sizes_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    keys = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "effective_batch_size": 32}
    with raises("config.conflicting_values", match=r"effective_batch_size: 32 is not 16, the product of"):
        examples_per_step(from_dict(merged(training=keys), "test").training)
    steps = {"gradient_accumulation_steps": 4}
    assert "set training.effective_batch_size instead" in problems(
        "config.bad_value", write(tmp_path, merged(training=steps))
    )
