"""4-bit weights are dequantized where there is room, and an adapter is merged exactly, once, and never into the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.schema import RunConfig
from finetune.evaluation.generators import weights
from finetune.evaluation.generators.hf import HfGenerator, HfModel
from finetune.evaluation.generators.weights import Weights, weights_for
from finetune.models.device import Device
from finetune.models.load import load_adapter, load_base, merge_adapter
from finetune.run_folder import RunFolder
from tests.helpers.errors import raises
from tests.helpers.run_examples import copy_run

CPU = Device(torch.device("cpu"), torch.float32)
GPU = Device(torch.device("cuda"), torch.bfloat16)
PROMPTS = [
    "### sqlite schema\nCREATE TABLE item (id, name, price)\n### Question\nHow many items?\n### SQL\n",
    "item name",
]


def configured(tiny_model: Path, adapter: str, dequantize: Any, four_bits: bool = True) -> RunConfig:
    config = RunConfig()
    config.model.name = str(tiny_model)
    config.evaluation.adapter, config.evaluation.dequantize = adapter, dequantize  # type: ignore[assignment]
    config.quantization.load_in_4bit = four_bits
    return config


@pytest.mark.parametrize(
    ("adapter", "dequantize", "four_bits", "on_cpu", "on_gpu"),
    [
        ("auto", "auto", True, (False, False), (True, True)),
        ("auto", True, True, (True, True), (True, True)),
        ("auto", False, True, (False, False), (False, False)),
        ("auto", "auto", False, (False, True), (False, True)),
        ("auto", True, False, (False, True), (False, True)),
        ("apart", "auto", True, (False, False), (True, False)),
        ("apart", True, True, (True, False), (True, False)),
        ("apart", "auto", False, (False, False), (False, False)),
        ("merged", "auto", True, (True, True), (True, True)),
        ("merged", True, True, (True, True), (True, True)),
        ("merged", False, False, (False, True), (False, True)),
    ],
)
def test_what_auto_means(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    adapter: str,
    dequantize: Any,
    four_bits: bool,
    on_cpu: tuple[bool, bool],
    on_gpu: tuple[bool, bool],
) -> None:
    gpu_with(monkeypatch, 80)
    config = configured(tiny_model, adapter, dequantize, four_bits)
    assert weights_for(config, CPU) == Weights(*on_cpu)
    assert weights_for(config, GPU) == Weights(*on_gpu)


def gpu_with(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    class Properties:
        total_memory = int(gib * 2**30)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)


def test_an_adapter_is_not_merged_into_weights_that_stay_in_4_bits(tiny_model: Path) -> None:
    with raises("evaluation.four_bit_merge"):
        weights_for(configured(tiny_model, "merged", False), CPU)


@pytest.mark.parametrize(("gib", "fits"), [(14.7, False), (16, False), (20, False), (22, True), (40, True)])
def test_weights_are_dequantized_where_they_and_the_cache_fit(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, gib: float, fits: bool
) -> None:
    """Mistral-7B: 13.5 GiB in 16 bits, and 16 texts of 1,280 tokens at 128 KiB each."""
    monkeypatch.setattr(weights, "_sizes", lambda *_: (7_241_732_096, 2 * 32 * 8 * 128))
    gpu_with(monkeypatch, gib)
    config = configured(tiny_model, "auto", "auto")
    config.model.max_seq_length = 1024
    assert weights_for(config, GPU).dequantize is fits


def test_the_sizes_of_a_model_come_from_its_config(tiny_model: Path) -> None:
    model = load_base(
        configured(tiny_model, "auto", False, False).model, RunConfig().quantization, CPU, dequantize=True
    )
    parameters, numbers = weights._sizes(str(tiny_model), None, False)
    assert parameters == sum(parameter.numel() for parameter in model.parameters())
    assert numbers == 2 * 2 * 2 * 16, "keys and values, layers, heads, head dimension"


# merging


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> RunFolder:
    return copy_run(tiny_run, tmp_path / "runs", evaluation={"dequantize": True})


def test_merged_weights_are_the_sum_rounded_once(run: RunFolder) -> None:
    config = run.config()
    half = Device(torch.device("cpu"), torch.bfloat16)
    base = load_base(config.model, config.quantization, half, dequantize=True)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted = load_adapter(base, run.adapter, config.lora, config.model)
    sums = {}
    for name, module in adapted.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()  # type: ignore[index,union-attr]
            sums[f"{name}.weight"] = before[f"{name}.weight"].double() + module.scaling["default"] * (b @ a)  # type: ignore[index,union-attr]
    assert len(sums) > 4
    merged = merge_adapter(adapted)
    assert not hasattr(merged, "disable_adapter")
    changed = 0
    for name, tensor in merged.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        if name in sums:
            step = (
                sums[name].abs().clamp(min=1e-30) * 2.0**-8
            )  # half a unit in the last place at most, and float32's rounding
            assert ((tensor.double() - sums[name]).abs() <= step * 1.001).all(), name
            changed += not torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, before[name]), name
    assert changed == len(sums)


def test_the_base_model_answers_as_before_after_the_adapter_was_merged(run: RunFolder) -> None:
    """In bfloat16, where taking the adapter out again would round."""
    config = run.config()
    half = Device(torch.device("cpu"), torch.bfloat16)

    def load() -> Any:
        base = load_base(config.model, config.quantization, half, dequantize=True)
        return load_adapter(base, run.adapter, config.lora, config.model)

    from finetune.models.load import load_tokenizer

    model = HfModel(load(), load_tokenizer(config.model), half, Weights(True, True), load)

    def ask(tuned: bool) -> list[str]:
        answers = model.answers(PROMPTS, tuned=tuned, batch_size=2, max_new_tokens=12, progress=False)
        return [answer.text for answer in answers]

    def weight() -> torch.Tensor:
        parts = [
            part for name, part in sorted(model._model.named_parameters()) if "q_proj" in name and "lora" not in name
        ]
        found: torch.Tensor = parts[0].clone()
        return found

    base, before = ask(False), weight()
    seconds = model.load_seconds
    tuned, merged = ask(True), weight()
    assert model.load_seconds > seconds, "merging is no part of an answer's time"
    assert tuned != base and not torch.equal(before, merged)
    assert ask(True) == tuned and torch.equal(weight(), merged), "merged once"
    assert ask(False) == base and torch.equal(weight(), before)
    assert ask(True) == tuned


@pytest.mark.parametrize("adapter", ["apart", "merged"])
def test_the_generator_holds_the_adapter_as_configured(run: RunFolder, adapter: str) -> None:
    config = run.config()
    config.evaluation.adapter = adapter  # type: ignore[assignment]
    generator = HfGenerator()
    settings = generator.settings(config)
    assert settings == {
        "device": "cpu", "dtype": "float32", "dequantize": True, "adapter": adapter, "batches": "refilled",
    }  # fmt: skip
    model = generator.load(config, run.adapter)
    assert model.load_seconds > 0
    found = model.answers(PROMPTS, tuned=True, batch_size=2, max_new_tokens=12, progress=False)
    assert hasattr(model._model, "peft_config") is (adapter == "apart")
    config.evaluation.adapter = "apart"
    plain = generator.load(config, run.adapter).answers(
        PROMPTS, tuned=True, batch_size=2, max_new_tokens=12, progress=False
    )
    assert found == plain
