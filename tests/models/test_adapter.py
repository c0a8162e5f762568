"""What is scored as tuned is the adapter that training wrote, whole and unchanged."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.config.schema import LoraSection, ModelSection
from finetune.models.adapter import is_sealed, seal_adapter
from finetune.models.load import attach_lora, load_adapter, load_base, require_adapter
from finetune.models.source import identity_of_base
from finetune.runtime.files import write_json
from tests.helpers.model_examples import CPU, WHOLE, change, named, refusal

LORA = LoraSection(r=4, lora_alpha=8, target_modules=["up_proj", "q_proj"])
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter without a manifest, as earlier versions wrote it, whose every value is drawn."""
    model = attach_lora(load_base(named(tiny_model), WHOLE, CPU), LORA)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "adapter"))


def load(tiny_model: Path, adapter: Path, lora: LoraSection = LORA, section: ModelSection | None = None) -> Any:
    return load_adapter(load_base(named(tiny_model), WHOLE, CPU), adapter, lora, section or named(tiny_model))


def weights(change: Callable[[dict[str, Any]], object]) -> Damage:
    def write(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})

    return write


def first_becomes(value: Callable[[Any], Any]) -> Damage:
    def write(tensors: dict[str, Any]) -> None:
        name = sorted(tensors)[0]
        tensors[name] = value(tensors[name].clone()).contiguous()

    return weights(write)


def drop(tensors: dict[str, Any], count: int) -> None:
    for name in sorted(tensors)[:count]:
        del tensors[name]


def rename(tensors: dict[str, Any]) -> None:
    name = sorted(tensors)[0]
    tensors[name.replace("lora_A", "lora_a")] = tensors.pop(name)


def setting(**values: Any) -> Damage:
    return lambda folder: change(folder / "adapter_config.json", **values)


TENSORS: dict[str, tuple[Damage, str]] = {
    "half of the tensors": (weights(lambda t: drop(t, len(t) // 2)), "lacks tensors: .* and 3 more; of 8"),
    "one tensor less": (weights(lambda t: drop(t, 1)), "lacks tensors: base_model"),
    "no tensors": (weights(dict.clear), "lacks tensors"),
    "a foreign tensor": (weights(lambda t: t.update(foreign=torch.zeros(3))), "has foreign tensors: foreign; of 8"),
    "a tensor of another layer": (
        weights(lambda t: t.update({sorted(t)[0].replace("layers.0", "layers.7"): torch.zeros(4, 64)})), "has foreign tensors"
    ),
    "a tensor of DoRA": (
        weights(lambda t: t.update({sorted(t)[0].replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(64)})),
        "has foreign tensors",
    ),
    "a tensor of another name": (weights(rename), "lacks tensors"),
    "another shape": (first_becomes(lambda t: t[:, :-1]), "size mismatch"),
    "another rank": (first_becomes(lambda t: t[:-1]), "size mismatch"),
    "a NaN": (first_becomes(lambda t: t.fill_(torch.nan)), "not finite"),
    "an infinity": (first_becomes(lambda t: t.fill_(-torch.inf)), "not finite"),
    "whole numbers": (first_becomes(lambda t: torch.ones_like(t, dtype=torch.int64)), "not numbers with a fraction"),
    "no file": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "an empty file": (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), "does not load"),
    "only pickled weights": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "adapter_model.safetensors is missing"
    ),
}  # fmt: skip
INITS = ("pissa", "pissa_niter_4", "olora", "loftq", "eva", "corda", "gaussian")
SETTINGS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    **{f"init {kind}": {"init_lora_weights": kind} for kind in INITS},
    "replicated layers": {"layer_replication": [[0, 2], [1, 2]]},
    "ranks by layer": {"rank_pattern": {"q_proj": 8}},
    "factors by layer": {"alpha_pattern": {"q_proj": 64}},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "biases": {"bias": "all"},
    "biases of LoRA": {"lora_bias": True},
    "transposed": {"fan_in_fan_out": True},
    "some layers": {"layers_to_transform": [0]},
    "layers left out": {"exclude_modules": ["q_proj"]},
    "tokens": {"trainable_token_indices": [1]},
    "parameters": {"target_parameters": ["q_proj.weight"]},
    "another method": {"peft_type": "IA3"},
    "no method": {"peft_type": None},
    "another task": {"task_type": "SEQ_CLS"},
    "what PEFT does not know": {"use_magic": True},
    "all layers": {"target_modules": "all-linear"},
    "a list of numbers": {"target_modules": [1]},
    "rank 0": {"r": 0},
    "rank as text": {"r": "4"},
    "a factor as text": {"lora_alpha": "8"},
    "a factor beyond numbers": {"lora_alpha": float("inf")},
    "a base model that is a number": {"base_model_name_or_path": 7},
    "a revision that is a list": {"revision": ["main"]},
    "a dropout of text": {"lora_dropout": "0.1"},
    "a dropout of everything": {"lora_dropout": 1},
    "a dropout that is not a number": {"lora_dropout": float("nan")},
    "a class to import": {"auto_mapping": {"base_model_class": "X", "parent_library": "os"}},
}  # fmt: skip


def test_an_adapter_without_a_manifest_loads_with_a_note(
    tiny_model: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load(tiny_model, adapter)
    assert f"{adapter}: no manifest in it (from an earlier version)" in capsys.readouterr().err
    seal_adapter(adapter)
    load(tiny_model, adapter)
    assert "manifest" not in capsys.readouterr().err


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_are_exactly_those_that_the_model_needs(tiny_model: Path, adapter: Path, name: str) -> None:
    damage, why = TENSORS[name]
    damage(adapter)
    for sealed in (False, True):  # also one whose manifest was made anew
        if sealed and (adapter / "adapter_model.safetensors").is_file():
            seal_adapter(adapter)
        said = refusal("adapter.mismatch", lambda: load(tiny_model, adapter))
        assert said.startswith(f"{adapter}: the adapter does not load on this base model: ")
        assert re.search(why, said), said


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_training_never_writes_are_refused_by_name(adapter: Path, name: str) -> None:
    change(adapter / "adapter_config.json", **SETTINGS[name])
    said = refusal("adapter.unsupported", lambda: require_adapter(adapter))
    assert said.startswith(f"{adapter / 'adapter_config.json'}: {next(iter(SETTINGS[name]))}: ")


@pytest.mark.parametrize("content", ["", "[]", "null", "[" * 100_000, "\xff", '{"lora_alpha": ' + "1" * 401 + "}"])
def test_settings_that_are_no_settings_are_refused(adapter: Path, content: str) -> None:
    (adapter / "adapter_config.json").write_text(content, encoding="latin-1")
    refusal("adapter.mismatch", lambda: require_adapter(adapter))


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_settings_that_are_null_are_no_traceback(tiny_model: Path, adapter: Path, name: str) -> None:
    """An older PEFT may have written null where this one has an empty section."""
    change(adapter / "adapter_config.json", **{name: None})
    refusal("adapter.mismatch", lambda: load(tiny_model, adapter))


def test_a_manifest_of_odd_sizes_or_a_pipe_is_a_changed_manifest(adapter: Path) -> None:
    seal_adapter(adapter)
    for size in ("1e999", "Infinity", "1" * 400):
        entry = f'{{"bytes": {size}, "sha256": "0"}}'
        (adapter / "manifest.json").write_text(f'{{"files": {{"adapter_config.json": {entry}}}}}')
        refusal("adapter.changed", lambda: require_adapter(adapter))
    (adapter / "manifest.json").unlink()
    os.mkfifo(adapter / "manifest.json")
    refusal("adapter.changed", lambda: require_adapter(adapter))  # and does not wait for a writer


@pytest.mark.parametrize(
    ("changed", "lora"),
    [
        ({"lora_alpha": 800}, LORA),
        ({}, LoraSection(r=4, lora_alpha=16, target_modules=LORA.target_modules)),
        ({"r": 8}, LORA),
        ({}, LoraSection(r=4, lora_alpha=8, target_modules=["up_proj"])),
        ({}, LoraSection(r=4, lora_alpha=8, target_modules=["up_proj", "q_proj", "k_proj"])),
    ],
)
def test_an_adapter_of_other_settings_than_the_runs_is_refused(
    tiny_model: Path, adapter: Path, changed: dict[str, Any], lora: LoraSection
) -> None:
    change(adapter / "adapter_config.json", **changed)
    refusal("adapter.other_run", lambda: load(tiny_model, adapter, lora))


@pytest.mark.parametrize(
    "damage",
    [
        setting(lora_alpha=16),
        setting(use_dora=True),
        first_becomes(lambda t: t * 2),
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{}"),
        lambda folder: (folder / "manifest.json").write_text('{"files": {}}'),
        lambda folder: (folder / "manifest.json").write_text(
            '{"files": {"../config.json": {"bytes": 1, "sha256": ""}}}'
        ),
        lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
        lambda folder: (folder / "prompt.json").write_text('{"schema_format": "compact"}'),
        lambda folder: (folder / "prompt.json").unlink(),
    ],
)
def test_an_adapter_that_was_edited_after_training_is_refused(adapter: Path, damage: Damage) -> None:
    (adapter / "prompt.json").write_text("{}")
    seal_adapter(adapter)
    require_adapter(adapter)
    (adapter / "README.md").write_text("A model card may change.")
    require_adapter(adapter)
    damage(adapter)
    said = refusal("adapter.changed", lambda: require_adapter(adapter))
    assert said.startswith(f"{adapter}: ") and "since training wrote it" in said


def test_another_base_model_is_refused(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    write_json(adapter / "base.json", identity_of_base(named(tiny_model)))
    elsewhere = Path(shutil.copytree(tiny_model, tmp_path / "another name"))
    load(tiny_model, adapter, section=named(elsewhere))
    tensors = load_file(elsewhere / "model.safetensors")
    save_file({name: value * 1.5 for name, value in tensors.items()}, elsewhere / "model.safetensors", {"format": "pt"})
    said = refusal("adapter.other_base", lambda: load(tiny_model, adapter, section=named(elsewhere)))
    assert said.startswith(f"{adapter}: was trained on other weights than those of model.name {elsewhere}")
    for broken in ("[]", "{"):
        (adapter / "base.json").write_text(broken)
        refusal("adapter.mismatch", lambda: load(tiny_model, adapter))


@pytest.mark.parametrize(
    ("now", "same"),
    [(("org/model", "a" * 40), True), (("org/model", "b" * 40), False), (("org/other", "a" * 40), False)],
)
def test_a_hub_model_is_known_by_its_name_and_commit(
    tiny_model: Path, adapter: Path, now: tuple[str, str], same: bool
) -> None:
    write_json(adapter / "base.json", identity_of_base(ModelSection(name="org/model", revision="a" * 40)))
    section = ModelSection(name=now[0], revision=now[1])
    if same:
        load(tiny_model, adapter, section=section)
    else:
        refusal("adapter.other_base", lambda: load(tiny_model, adapter, section=section))
    load(tiny_model, adapter, section=named(tiny_model))  # a copy in a folder cannot be compared


def test_a_run_writes_a_sealed_adapter_and_evaluate_and_generate_refuse_an_edited_one(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune.cli.main import main
    from finetune.training.adapter import adapter_from
    from tests.helpers.errors import reported
    from tests.helpers.run_examples import copy_run

    run = copy_run(tiny_run, tmp_path / "runs")
    assert is_sealed(run.adapter)
    files = json.loads((run.adapter / "manifest.json").read_text())["files"]
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "prompt.json",
        "base.json",
        "tokenizer.json",
    } <= files.keys()
    first_becomes(lambda t: t * 2)(run.adapter)
    (tmp_path / "schema.sql").write_text("CREATE TABLE item (id INTEGER);")
    for command in (["evaluate"], ["generate", "--db", str(tmp_path / "schema.sql"), "How many items?"]):
        with reported("adapter.changed"):
            assert main([command[0], str(run.path), *command[1:]]) == 2
    newest = Path(shutil.copytree(tiny_run / "checkpoints" / "step-6", tmp_path / "step-6"))
    adapter_from(run, newest)
    require_adapter(run.adapter)
    assert json.loads((run.adapter / "manifest.json").read_text())["files"].keys() == files.keys()
    first_becomes(lambda t: t * 2)(newest)
    refusal("checkpoint.corrupt", lambda: adapter_from(run, newest))
    require_adapter(run.adapter)
