"""Every number of a config has a largest value, so that a typing mistake is one line and not an error of a library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from finetune.config.load import load_config
from finetune.config.schema import RunConfig
from finetune.config.validate import LARGEST, LARGEST_OTHER
from finetune.errors import UserError
from finetune.models.architectures import PROJECTIONS
from tests.helpers.errors import raises

HEAD = "model: {name: some/model}\ndata: {output_dir: out, sources: [{kind: jsonl, path: data.jsonl}]}\n"


def numbers(schema: Any = RunConfig, where: str = "") -> Iterator[tuple[str, type]]:
    hints = get_type_hints(schema)
    for field in fields(schema):
        hint = hints[field.name]
        kinds = {int, float} & {hint, *get_args(hint)}
        if is_dataclass(hint):
            yield from numbers(hint, f"{where}{field.name}.")
        elif kinds and bool not in get_args(hint):
            yield f"{where}{field.name}", kinds.pop()


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(HEAD)
    return path


def test_there_are_numbers() -> None:
    assert len(list(numbers())) > 30 and LARGEST.keys() <= dict(numbers()).keys()


@pytest.mark.parametrize("key", [key for key, _ in numbers()])
def test_a_number_that_no_run_has_is_one_line(key: str, run_yaml: Path) -> None:
    for text in ("1e308", "1e999", "9" * 30, "9" * 400, "9" * 5000, "-9e300", "-inf", ".nan", "99999999999"):
        with pytest.raises(UserError, match=f"{key}: expected") as caught:
            load_config(run_yaml, [f"{key}={text}"])
        assert caught.value.code in ("config.bad_type", "config.bad_value") and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "override",
    [
        *(
            "evaluation.timeout_seconds=3000000",
            "training.seed=4294967296",
            "data.seed=4294967296",
            "lora.r=2000000000",
        ),
        *("training.num_train_epochs=1e308", "training.weight_decay=101", "evaluation.max_new_tokens=1048577"),
    ],
)
def test_what_failed_in_a_library_is_refused(override: str, run_yaml: Path) -> None:
    key = override.partition("=")[0]
    with raises("config.bad_value", match=f"{key}: expected at most "):
        load_config(run_yaml, [override])
    for key, largest in LARGEST.items():
        assert largest <= 10 * LARGEST_OTHER, key


def test_the_largest_values_are_accepted(run_yaml: Path) -> None:
    config = load_config(run_yaml, ["training.seed=4294967295", "evaluation.timeout_seconds=86400", "lora.r=8192"])
    assert (config.training.seed, config.evaluation.timeout_seconds, config.lora.r) == (2**32 - 1, 86400.0, 8192)


def test_minus_zero_is_zero(run_yaml: Path) -> None:
    assert str(load_config(run_yaml, ["training.weight_decay=-0.0"]).training.weight_decay) == "0.0"


# target modules


@pytest.mark.parametrize("name", ["lm_head", "model.lm_head", "embed_tokens", "model.embed_tokens", "wte", "embed_out"])
def test_the_ends_of_a_model_get_no_adapter(name: str, run_yaml: Path) -> None:
    with raises("config.bad_value", match=rf"lora\.target_modules: {name} gets no adapter"):
        load_config(run_yaml, [f"lora.target_modules=[q_proj,{name}]"])


@pytest.mark.parametrize(
    "name",
    [
        "all-linear",
        ".*_proj",
        "q_proj|k_proj",
        "",
        " q_proj",
        "q_proj ",
        ".q_proj",
        "q_proj.",
        "a..b",
        "q/proj",
        "x" * 5000 + "!",
    ],
)
def test_patterns_are_no_names(name: str, run_yaml: Path) -> None:
    with raises("config.bad_value", match=r"lora\.target_modules: expected names of layers such as q_proj") as caught:
        load_config(run_yaml, [f"lora.target_modules=['{name}']"])
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["all-linear", "q_proj", ".*", "null", "{q_proj: 1}"])
def test_a_text_is_no_list_of_names(text: str, run_yaml: Path) -> None:
    with raises("config.bad_type", match=r"lora\.target_modules: expected list\[str\], found "):
        load_config(run_yaml, [f"lora.target_modules={text}"])


@pytest.mark.parametrize("names", [list(PROJECTIONS), ["self_attn.q_proj", "layers.1.mlp.up_proj"], ["c_attn", "Wqkv"]])
def test_names_of_layers_are_accepted(names: list[str], run_yaml: Path) -> None:
    assert load_config(run_yaml, [f"lora.target_modules=[{','.join(names)}]"]).lora.target_modules == names
