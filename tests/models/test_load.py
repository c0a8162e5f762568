"""The loaded model has the dtype that suits the hardware, 4-bit weights, and adapters on the configured layers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.config.schema import LoraSection, QuantizationSection
from finetune.models.attention import attention_for
from finetune.models.device import Device, choose_device
from finetune.models.load import (
    adapters_to_float32,
    attach_lora,
    load_adapter,
    load_base,
    parameter_counts,
    require_adapter,
)
from tests.helpers.errors import raises
from tests.helpers.model_examples import CPU, NF4, WHOLE, change, named, refusal

UP_PROJ = (64, 128)  # features in and out of mlp.up_proj in the tiny model
LAYERS = 2


# dtype and attention


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def pretend(*capabilities: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capabilities[index])

    return pretend


@pytest.mark.parametrize(
    ("capability", "asked", "dtype"),
    [
        ((7, 0), "auto", torch.float16),
        ((7, 5), "auto", torch.float16),
        ((8, 0), "auto", torch.bfloat16),
        ((8, 9), "auto", torch.bfloat16),
        ((9, 0), "auto", torch.bfloat16),
        ((12, 0), "auto", torch.bfloat16),
        ((7, 5), "float16", torch.float16),
        ((9, 0), "float16", torch.float16),
        ((8, 0), "bfloat16", torch.bfloat16),
        ((7, 0), "float32", torch.float32),
    ],
)
def test_on_a_gpu_the_compute_capability_decides_the_dtype(
    gpu: Callable[..., None], capability: tuple[int, int], asked: str, dtype: torch.dtype
) -> None:
    gpu(capability)
    device = choose_device(asked)
    assert (device.place, device.dtype) == (torch.device("cuda", 0), dtype)
    assert device.dtype_name == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_bfloat16_is_refused_where_the_gpu_would_only_emulate_it(
    gpu: Callable[..., None], capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    said = refusal("model.bad_dtype", lambda: choose_device("bfloat16"))
    assert said.startswith("model.torch_dtype: bfloat16 needs compute capability 8.0")
    assert f"has {capability[0]}.{capability[1]}; use auto or float16" in said


def test_each_process_takes_its_own_gpu(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((7, 5), (8, 0))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == Device(torch.device("cuda", 1), torch.bfloat16)


def test_on_a_cpu_auto_is_float32_and_float16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    assert choose_device("bfloat16").dtype == torch.bfloat16
    assert refusal("model.bad_dtype", lambda: choose_device("float16")).startswith("model.torch_dtype: float16")


@pytest.mark.parametrize(
    ("configured", "place", "chosen"),
    [
        ("auto", "cpu", "eager"),
        ("auto", "cuda", "sdpa"),
        ("sdpa", "cpu", "sdpa"),
        ("eager", "cuda", "eager"),
        ("flash_attention_2", "cuda", "sdpa"),  # flash-attn computes in 16 bits only
    ],
)
def test_attention_is_as_configured_and_auto_depends_on_the_hardware(configured: str, place: str, chosen: str) -> None:
    assert attention_for(configured, Device(torch.device(place), torch.float32)) == chosen


def test_the_loaded_model_has_that_attention_and_dtype(tiny_model: Path) -> None:
    half = Device(torch.device("cpu"), torch.bfloat16)
    for device, configured, attention in ((CPU, "auto", "eager"), (half, "sdpa", "sdpa")):
        model = load_base(named(tiny_model, attn_implementation=configured), WHOLE, device)
        assert model.config._attn_implementation == attention
        assert {parameter.dtype for parameter in model.parameters()} == {device.dtype}


def test_rounded_matrix_products_are_set_for_each_model(tiny_model: Path) -> None:
    for asked, rounding in ((True, "bf16"), (False, "none")):
        load_base(named(tiny_model, cpu_bf16_matmul=asked), WHOLE, CPU)
        assert torch.backends.mkldnn.matmul.fp32_precision == rounding  # type: ignore[attr-defined]


def test_a_value_of_the_wrong_type_in_the_config_is_one_line(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    change(tmp_path / "model" / "config.json", hidden_size="64")
    assert "hidden_size" in refusal("model.load_failed", lambda: load_base(named(tmp_path / "model"), WHOLE, CPU))


def test_missing_flash_attention_is_reported_by_its_own_key(tiny_model: Path) -> None:
    section = named(tiny_model, attn_implementation="flash_attention_2")
    with raises(
        "model.attention", match=r"^model\.attn_implementation: flash_attention_2 cannot be used .*; use auto$"
    ):
        load_base(section, NF4, CPU)


# 4 bits


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 45).reshape(2, 20)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def test_nf4_weights_take_four_bits(tiny_model: Path) -> None:
    weight = load_base(named(tiny_model), NF4, CPU).model.layers[0].mlp.up_proj.weight
    size = UP_PROJ[0] * UP_PROJ[1]
    assert weight.numel() * weight.element_size() == size // 2
    assert (weight.quant_state.quant_type, weight.quant_state.blocksize) == ("nf4", 64)
    assert weight.quant_state.absmax.numel() == size // 64
    assert weight.quant_state.absmax.element_size() == 1, "double quantisation keeps scales in 8 bits"
    single = QuantizationSection(bnb_4bit_use_double_quant=False)
    weight = load_base(named(tiny_model), single, CPU).model.layers[0].mlp.up_proj.weight
    assert weight.quant_state.absmax.element_size() == 4


def test_the_quantised_model_is_close_to_the_unquantised_one_but_differs(tiny_model: Path) -> None:
    whole, nf4 = (logits(load_base(named(tiny_model), q, CPU)) for q in (WHOLE, NF4))
    fp4 = logits(load_base(named(tiny_model), QuantizationSection(bnb_4bit_quant_type="fp4"), CPU))
    assert 1e-3 < (whole - nf4).abs().max() < 0.5
    assert not torch.allclose(nf4, fp4, atol=1e-3)


@pytest.mark.parametrize("double", [True, False])
def test_dequantised_weights_give_the_logits_of_the_packed_ones(tiny_model: Path, double: bool) -> None:
    section = QuantizationSection(bnb_4bit_use_double_quant=double)
    packed = load_base(named(tiny_model), section, CPU)
    plain = load_base(named(tiny_model), section, CPU, dequantize=True)
    assert plain.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert plain.model.layers[0].mlp.up_proj.weight.shape == (UP_PROJ[1], UP_PROJ[0])
    torch.testing.assert_close(logits(plain.eval()), logits(packed.eval()), rtol=1e-5, atol=1e-5)


def gradients(model: Any) -> list[torch.Tensor]:
    model.train()
    model.zero_grad()
    ids = torch.arange(5, 25).reshape(1, 20)
    model(input_ids=ids, labels=ids).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_a_validation_between_two_steps_changes_no_gradient(tiny_model: Path) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes would repack the weights for a kernel without a backward."""
    torch.manual_seed(0)
    model = attach_lora(load_base(named(tiny_model), NF4, CPU), LoraSection(lora_dropout=0.0))
    before, packed = gradients(model), model.get_base_model().model.layers[0].mlp.up_proj.weight.data_ptr()
    assert len(before) == 7 * 2 * LAYERS
    logits(model.eval())
    assert model.get_base_model().model.layers[0].mlp.up_proj.weight.data_ptr() == packed
    for was, now in zip(before, gradients(model), strict=True):
        assert torch.equal(was, now)


def test_packed_weights_count_with_their_dequantized_size(tiny_model: Path) -> None:
    whole = load_base(named(tiny_model), WHOLE, CPU)
    size = sum(tensor.numel() for tensor in load_file(tiny_model / "model.safetensors").values())
    assert parameter_counts(whole) == (size, size)
    assert parameter_counts(load_base(named(tiny_model), NF4, CPU))[0] == size
    r = 4
    model = attach_lora(load_base(named(tiny_model), NF4, CPU), LoraSection(r=r, target_modules=["up_proj"]))
    added = LAYERS * r * sum(UP_PROJ)
    assert parameter_counts(model) == (size + added, added)
    logits(model.eval())
    assert parameter_counts(model) == (size + added, added)


# adapters


@pytest.mark.parametrize("quantization", [NF4, WHOLE])
def test_target_modules_that_match_nothing_are_refused_with_the_names_that_exist(
    tiny_model: Path, quantization: QuantizationSection
) -> None:
    model = load_base(named(tiny_model), quantization, CPU)
    section = LoraSection(target_modules=["q_proj", "query", "Wqkv"])
    assert refusal("lora.unknown_modules", lambda: attach_lora(model, section)) == (
        "lora.target_modules: query, Wqkv match nothing in this model; its linear layers are "
        "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )


@pytest.mark.parametrize("name", ["mlp", "input_layernorm", "proj", "layers", "model"])
def test_names_of_modules_that_cannot_have_an_adapter_are_refused(tiny_model: Path, name: str) -> None:
    model = load_base(named(tiny_model), NF4, CPU)
    assert name in refusal("lora.unknown_modules", lambda: attach_lora(model, LoraSection(target_modules=[name])))


@pytest.mark.parametrize(
    ("target", "layers"),
    [("up_proj", 2), ("mlp.up_proj", 2), ("layers.1.mlp.up_proj", 1), ("model.layers.0.mlp.up_proj", 1)],
)
def test_a_layer_is_matched_by_the_end_of_its_path(tiny_model: Path, target: str, layers: int) -> None:
    model = attach_lora(load_base(named(tiny_model), NF4, CPU), LoraSection(r=4, target_modules=[target]))
    assert parameter_counts(model)[1] == layers * 4 * sum(UP_PROJ)


def test_fresh_adapters_change_nothing_and_adapters_become_float32(tiny_model: Path) -> None:
    base = load_base(named(tiny_model), NF4, CPU)
    before = logits(base)
    model = attach_lora(base, LoraSection(lora_dropout=0.0))
    torch.testing.assert_close(logits(model), before)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    frozen = {parameter.data_ptr() for parameter in model.parameters() if not parameter.requires_grad}
    adapters_to_float32(model)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert {parameter.data_ptr() for parameter in model.parameters() if not parameter.requires_grad} == frozen


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    model = attach_lora(load_base(named(tiny_model), NF4, CPU), LoraSection(r=4, target_modules=["up_proj"]))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(str(tmp_path / "adapter"))
    torch.save(logits(model.eval()), tmp_path / "logits.pt")
    return tmp_path / "adapter"


def test_a_saved_adapter_gives_the_same_logits_again(tiny_model: Path, adapter: Path) -> None:
    base = load_base(named(tiny_model), NF4, CPU)
    before = logits(base)
    model = load_adapter(base, adapter)
    expected = torch.load(adapter.parent / "logits.pt")
    torch.testing.assert_close(logits(model.eval()), expected)
    assert (expected - before).abs().max() > 0.01
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before)


def test_a_folder_without_adapter_is_refused(tmp_path: Path) -> None:
    assert refusal("adapter.missing", lambda: require_adapter(tmp_path / "adapter")).startswith(
        f"{tmp_path / 'adapter'}: no adapter in it"
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda adapter: (adapter / "adapter_model.safetensors").unlink(),
        lambda adapter: os.truncate(adapter / "adapter_model.safetensors", 500),
        lambda adapter: (adapter / "adapter_config.json").write_text("{"),
        lambda adapter: change(adapter / "adapter_config.json", r=8),
        lambda adapter: change(adapter / "adapter_config.json", target_modules=["unheard_of"]),
    ],
)
def test_a_corrupt_adapter_is_refused(tiny_model: Path, adapter: Path, damage: Callable[[Path], None]) -> None:
    damage(adapter)
    base = load_base(named(tiny_model), NF4, CPU)
    said = refusal("adapter.mismatch", lambda: load_adapter(base, adapter))
    assert said.startswith(f"{adapter}: the adapter does not load")
