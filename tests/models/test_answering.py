"""The dtype of answers: decided in one place, exact for small models, and with the 4-bit weights of training in every dtype."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig

from finetune.config.load import load_config
from finetune.config.schema import ModelSection, RunConfig
from finetune.evaluation.generators.base import Answer
from finetune.evaluation.generators.hf import HfGenerator
from finetune.evaluation.generators.vllm import VllmGenerator
from finetune.evaluation.generators.vllm_weights import Weights
from finetune.models import answering
from finetune.models.answer_dtype import FLOAT32_BELOW, answer_dtype
from finetune.models.answering import answering_device, dtype_of_answers
from finetune.models.device import Device
from finetune.models.load import load_base
from finetune.models.merging import MergedWeights
from tests.helpers.adapted_models import adapter_folder, base_folder, config_of
from tests.helpers.data_examples import read_jsonl
from tests.helpers.errors import raises
from tests.helpers.fake_vllm.install import fake_vllm
from tests.helpers.run_examples import copy_run

ConfigWriter = Callable[..., Path]
AMPERE, TURING = (8, 0), (7, 5)
MISTRAL, SMOLLM = "mistralai/Mistral-7B-v0.1", "HuggingFaceTB/SmolLM2-135M"
CPU = torch.device("cpu")


def asked(name: str, dtype: str = "auto", torch_dtype: str = "auto") -> RunConfig:
    config = RunConfig(model=ModelSection(name=name, torch_dtype=torch_dtype))  # type: ignore[arg-type]
    config.evaluation.dtype = dtype  # type: ignore[assignment]
    return config


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    def pretend(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capability)

    return pretend


# auto


@pytest.mark.parametrize(
    ("name", "capability", "torch_dtype", "expected"),
    [
        (SMOLLM, AMPERE, "auto", "float32"),
        (SMOLLM, TURING, "auto", "float32"),
        (SMOLLM, AMPERE, "bfloat16", "float32"),
        (SMOLLM, None, "bfloat16", "float32"),
        (SMOLLM, None, "float16", "float32"),
        (MISTRAL, AMPERE, "auto", "bfloat16"),
        (MISTRAL, TURING, "auto", "float16"),
        (MISTRAL, AMPERE, "float32", "float32"),
        (MISTRAL, None, "auto", "float32"),
        (MISTRAL, None, "bfloat16", "bfloat16"),
    ],
)
def test_auto_is_float32_for_a_small_model_and_else_the_dtype_of_training(
    name: str, capability: tuple[int, int] | None, torch_dtype: str, expected: str
) -> None:
    assert dtype_of_answers(asked(name, torch_dtype=torch_dtype), capability) == expected


def test_the_threshold_is_a_billion_parameters() -> None:
    assert FLOAT32_BELOW == 1_000_000_000
    config = asked(MISTRAL)
    assert answer_dtype(config, AMPERE, FLOAT32_BELOW - 1) == "float32"
    assert answer_dtype(config, AMPERE, FLOAT32_BELOW) == answer_dtype(config, AMPERE, None) == "bfloat16"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_dtype_that_is_asked_for_is_taken_whatever_the_model(dtype: str) -> None:
    for name in (SMOLLM, MISTRAL):
        assert dtype_of_answers(asked(name, dtype), AMPERE) == dtype


def test_parameters_of_an_unknown_family_are_counted_without_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder has no weights but what makes it one."""
    small = BloomConfig(vocab_size=1000, hidden_size=64, n_layer=2, n_head=4)
    for name, config in ("small", small), ("large", BloomConfig(vocab_size=250_000, hidden_size=4096, n_layer=2)):
        config.save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").touch()
    assert dtype_of_answers(asked(str(tmp_path / "small")), AMPERE) == "float32"
    assert dtype_of_answers(asked(str(tmp_path / "large")), AMPERE) == "bfloat16", "its embeddings alone are a billion"
    monkeypatch.setattr(answering, "load_model_config", lambda section: 1 / 0)
    assert dtype_of_answers(asked(str(tmp_path / "small")), None) == "float32", (
        "nothing is read where it decides nothing"
    )


def test_a_model_that_cannot_be_built_counts_as_large(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    (tmp_path / "model.safetensors").touch()
    assert dtype_of_answers(asked(str(tmp_path)), AMPERE) == "bfloat16"


def test_another_word_is_refused(tiny_config: ConfigWriter) -> None:
    with raises("config.bad_type", match=r"evaluation\.dtype: .*one of auto, bfloat16, float16, float32"):
        load_config(tiny_config(evaluation={"dtype": "fp32"}))


# devices


def test_float16_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with raises("evaluation.bad_dtype", match=r"^evaluation\.dtype: float16 needs a GPU.*use auto or float32"):
        answering_device(asked(SMOLLM, "float16"))
    with raises("model.bad_dtype"):  # as training says it: no dtype of answers was asked for
        answering_device(asked(MISTRAL, torch_dtype="float16"))
    assert answering_device(asked(SMOLLM, "bfloat16")).dtype == torch.bfloat16


def test_bfloat16_needs_ampere(gpu: Callable[[tuple[int, int]], None]) -> None:
    gpu(TURING)
    with raises("evaluation.bad_dtype", match=r"^evaluation\.dtype: bfloat16 needs .* 8\.0, this GPU has 7\.5"):
        answering_device(asked(MISTRAL, "bfloat16"))
    assert answering_device(asked(MISTRAL, "float16")).dtype == torch.float16


@pytest.mark.parametrize(("dtype", "quantized_in"), [("float32", torch.bfloat16), ("bfloat16", None)])
def test_4_bit_weights_are_made_in_the_dtype_of_training(
    gpu: Callable[[tuple[int, int]], None], dtype: str, quantized_in: torch.dtype | None
) -> None:
    gpu(AMPERE)
    config = asked(MISTRAL, dtype)
    found = answering_device(config)
    assert found == Device(torch.device("cuda", 0), getattr(torch, dtype), quantized_in)
    config.quantization.load_in_4bit = False
    assert answering_device(config).quantized_in is None, "without 4 bits the weights are those of the file"


# what is computed


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


@pytest.mark.parametrize("dequantize", [True, False])
def test_a_model_answers_in_float32_with_the_4_bit_values_of_training(tmp_path: Path, dequantize: bool) -> None:
    config = config_of(base_folder(tmp_path / "base", "biases"), load_in_4bit=True)
    device = Device(CPU, torch.float32, torch.bfloat16)
    found = load_base(config.model, config.quantization, device, dequantize=dequantize)
    trained = load_base(config.model, config.quantization, Device(CPU, torch.bfloat16), dequantize=dequantize)
    assert {tensor.dtype for tensor in found.parameters() if tensor.is_floating_point()} == {torch.float32}
    assert found.dtype == found.config.dtype == torch.float32
    expected = values(trained)
    for name, tensor in values(found).items():
        same = expected[name].float() if expected[name].is_floating_point() else expected[name]
        assert torch.equal(tensor.float() if tensor.is_floating_point() else tensor, same), name
    ids = torch.arange(5, 25).reshape(1, 20)
    logits = found.eval()(input_ids=ids).logits
    assert logits.dtype == torch.float32
    if dequantize:  # in 4 bits, bitsandbytes' kernels unpack without rounding to the dtype of training
        exact = load_base(config.model, config.quantization, Device(CPU, torch.float32), dequantize=True)
        assert not torch.equal(logits, exact.eval()(input_ids=ids).logits), "weights quantised from float32 are others"


def test_vllm_gets_the_values_that_hf_computes_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    config = config_of(base_folder(tmp_path / "base", "apart"), load_in_4bit=True)
    adapter = adapter_folder(tmp_path / "adapter", config)
    config.model.torch_dtype = "bfloat16"
    config.evaluation.dequantize = True
    device = answering_device(config)
    assert device == Device(CPU, torch.float32, torch.bfloat16)
    weights = Weights(config, adapter, device)
    plain = RunConfig(model=ModelSection(name="", torch_dtype="float32"))
    plain.quantization.load_in_4bit = False
    model = HfGenerator().load(config, adapter)
    for tuned in (False, True):
        plain.model.name = str(weights.folder(tuned=tuned))
        written = values(load_base(plain.model, plain.quantization, Device(CPU, torch.float32)))
        mine = values(
            model._tuned() if tuned else load_base(config.model, config.quantization, device, dequantize=True)
        )
        assert written.keys() == mine.keys()
        assert all(torch.equal(tensor, mine[name]) for name, tensor in written.items()), tuned
    unrounded = MergedWeights.of(config, adapter=None, dtype=torch.float32)
    assert not torch.equal(
        unrounded.tensor("model.layers.0.mlp.up_proj.weight"), mine["model.layers.0.mlp.up_proj.weight"]
    )
    weights.remove(log=True)


def test_vllm_answers_in_it_as_hf_does(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained in bfloat16, which rounds the 4-bit values, and answered in float32. vLLM is a stand-in that computes."""
    fake_vllm(tmp_path / "site", monkeypatch)
    monkeypatch.setenv("FAKE_VLLM", json.dumps({"seen": str(tmp_path / "seen.jsonl")}))
    run = copy_run(tiny_run, tmp_path / "runs", model={"torch_dtype": "bfloat16"}, evaluation={"dequantize": True})
    config = run.config()
    theirs, ours = HfGenerator().load(config, run.adapter), VllmGenerator().load(config, run.adapter)
    for tuned in (False, True):
        assert ask(ours, tuned) == ask(theirs, tuned)
    settings = VllmGenerator().settings(config)
    assert (settings["dtype"], settings["quantized_in"]) == ("float32", "bfloat16")
    config.evaluation.dtype = "bfloat16"
    ask(VllmGenerator().load(config, run.adapter), False)
    loaded = [line["loaded"]["dtype"] for line in read_jsonl(tmp_path / "seen.jsonl") if "loaded" in line]
    assert loaded == ["float32", "bfloat16"]


def ask(model: Any, tuned: bool) -> list[Answer]:
    prompts = ["How many items?", "Which item has number 3?", "a"]
    found: list[Answer] = model.answers(prompts, tuned=tuned, batch_size=4, max_new_tokens=8, progress=False)
    return found


@pytest.mark.parametrize(("dtype", "expected"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_the_generator_computes_in_it_and_its_settings_say_so(
    tiny_config: ConfigWriter, dtype: str, expected: str
) -> None:
    config = load_config(
        tiny_config(model={"torch_dtype": "bfloat16"}, evaluation={"dtype": dtype, "dequantize": True})
    )
    generator = HfGenerator()
    settings = generator.settings(config)
    assert settings["dtype"] == expected
    assert settings.get("quantized_in") == ("bfloat16" if dtype == "auto" else None)
    model = generator.load(config, None)
    assert model.dtype_name == expected
    assert {parameter.dtype for parameter in model._model.parameters()} == {getattr(torch, expected)}
    [answer] = model.answers(["How many items?"], tuned=False, batch_size=1, max_new_tokens=4, progress=False)
    assert answer.problem is None and answer.new_tokens
