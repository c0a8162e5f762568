"""The plan of a step: backend, micro-batch size and checkpointing, chosen for the machine within the config's limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from finetune.config.schema import LoraSection, ModelSection, QuantizationSection, RunConfig, TrainingSection  # noqa: E402
from finetune.estimate.fit import MicroBatchConfig  # noqa: E402
from finetune.machine.hardware import GIB  # noqa: E402
from finetune.models.device import Device  # noqa: E402
from finetune.training.step.plan import StepPlan, plan_step, worst_micro_batch  # noqa: E402
from tests.helpers.errors import raises  # noqa: E402
from tests.helpers.fused_examples import LAYERS, lora_model  # noqa: E402

ON_CPU = Device(torch.device("cpu"), torch.float32)
ON_GPU = Device(torch.device("cuda"), torch.bfloat16)
LENGTHS = [40, 200, 90, 120] * 30


@pytest.fixture(scope="module")
def model() -> Any:
    return lora_model()


@pytest.fixture(scope="module")
def large_model() -> Any:
    """A model with the shape of Mistral-7B and no weights: only its config is read."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, MistralConfig

    with torch.device("meta"):
        config = MistralConfig(num_hidden_layers=32, sliding_window=None)
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return get_peft_model(
            base, LoraConfig(r=16, target_modules=LoraSection().target_modules, task_type="CAUSAL_LM")
        )


def plan(
    model: Any, device: Device = ON_CPU, lengths: Sequence[int] = LENGTHS, gpus: int = 1, **training: Any
) -> StepPlan:
    config = RunConfig(
        model=ModelSection(name="m", max_seq_length=1024),
        quantization=QuantizationSection(load_in_4bit=True),
        training=TrainingSection(**training),
    )
    return plan_step(config, model, device, lengths, gpus=gpus)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """gpu(total, reserved) makes torch report a GPU with that much memory in GiB; the machine has no such device."""

    def of(total: float, reserved: float = 4.0) -> Device:
        free = total - 0.5 - reserved  # 0.5 GiB for the CUDA context
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (int(free * GIB), int(total * GIB)))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: int(reserved * GIB))
        named = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=int(total * GIB))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: named)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        of_gpu = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=total * GIB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: of_gpu)
        return ON_GPU

    return of


# --- which layers


def test_on_a_cpu_auto_is_hf_and_fused_must_be_requested(model: Any) -> None:
    found = plan(model)
    assert (found.backend, found.why, found.checkpointing, found.needed) == ("hf", "on a CPU", False, None)
    requested = plan(model, kernels="fused")
    assert (requested.backend, requested.why) == ("fused", "training.kernels")
    assert requested.limits == MicroBatchConfig(2048, LAYERS, LAYERS)
    assert plan(model, kernels="fused", lengths=[3000, 5]).limits.tokens == 3000


def test_on_a_gpu_auto_is_fused_if_the_model_is_supported(model: Any, gpu: Any) -> None:
    found = plan(model, gpu(80))
    assert found.backend == "fused"
    assert found.why == "one of Llama, Mistral, Qwen2 on a GPU"
    assert plan(model, gpu(80), kernels="hf").backend == "hf"
    assert plan(model, gpu(80), kernels="hf").why == "training.kernels"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sliding_window": 64}, "texts of 200 tokens are longer than the model's attention window of 64"),
        ({"hidden_act": "gelu"}, "its activation is gelu"),
        ({"head_dim": 12}, "its head dimension, 12, is not a multiple of 8"),
        ({"targets": ("q_proj", "lm_head")}, "it has adapters outside the decoder layers"),
    ],
)
def test_an_unsupported_model_uses_hf_with_a_reason_unless_fused_is_requested(
    changes: dict[str, Any], reason: str, gpu: Any
) -> None:
    other = lora_model(**changes)
    for device in (gpu(80), ON_CPU):
        assert (plan(other, device).backend, plan(other, device).why) == ("hf", reason)
    with raises("model.unsupported_kernels", match=r"training\.kernels: fused does not support this model") as caught:
        plan(other, kernels="fused")
    assert reason in str(caught.value)
    assert str(caught.value).endswith("use auto")
    assert "\n" not in str(caught.value)


# --- how much


def test_a_large_gpu_recomputes_nothing_and_uses_one_micro_batch(large_model: Any, gpu: Any) -> None:
    found = plan(large_model, gpu(80))
    assert found.limits.uncheckpointed_layers == found.limits.dequantized_layers == 32
    assert 16 * 112 < found.limits.tokens <= 16 * 200, (
        "nearly every step of 16 fits, and little more memory is reserved"
    )
    assert found.needed is not None
    assert found.needed.reserved < 80 * GIB


def test_less_memory_never_changes_the_batch_size_and_the_plan_fits(large_model: Any, gpu: Any) -> None:
    sizes, lengths = (80, 40, 24, 16, 14, 12, 10, 8, 7), [4 * length for length in LENGTHS]
    plans = [plan(large_model, gpu(gib), lengths) for gib in sizes]
    for found, gib in zip(plans, sizes, strict=True):
        assert found.backend == "fused"
        assert found.limits.tokens >= max(lengths)
        assert found.batch_size == 16, "memory decides the number of micro-batches, never the batch size"
        assert found.needed is not None
        assert found.needed.reserved / GIB < gib
    assert (plans[0].limits.uncheckpointed_layers, plans[0].limits.dequantized_layers) == (32, 32)
    assert plans[-1].limits.uncheckpointed_layers < 32 and plans[-1].limits.dequantized_layers == 0


def test_max_memory_gib_acts_like_a_smaller_gpu(large_model: Any, gpu: Any) -> None:
    capped, small = plan(large_model, gpu(80), max_memory_gib=10.0), plan(large_model, gpu(10))
    assert capped == small
    assert plan(large_model, gpu(10), max_memory_gib=64.0) == small
    assert capped.needed is not None
    assert capped.needed.reserved < 10 * GIB


def test_memory_used_by_other_programs_is_not_planned_with(
    large_model: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = plan(large_model, gpu(24))
    device = gpu(80)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (int(19.5 * GIB), int(80 * GIB)))
    assert plan(large_model, device) == alone


def test_a_gpu_too_small_for_the_longest_text_is_refused(large_model: Any, gpu: Any) -> None:
    with raises("gpu.too_small", match=r"900 tokens.*\(estimated\).*5\.0; lower model\.max_seq_length"):
        plan(large_model, gpu(5, reserved=3), lengths=[900, 40])


def test_checkpointing_is_obeyed(large_model: Any, gpu: Any) -> None:
    assert plan(large_model, gpu(80), gradient_checkpointing=True).limits.uncheckpointed_layers == 0
    assert plan(large_model, gpu(80), gradient_checkpointing=False).limits.uncheckpointed_layers == 32
    with raises("gpu.too_small"):
        plan(large_model, gpu(6.5), gradient_checkpointing=False, lengths=[1000] * 20)
    for requested in (True, False, "auto"):
        hf = plan(large_model, gpu(80), kernels="hf", gradient_checkpointing=requested)
        assert hf.checkpointing == (requested is not False)
        assert hf.limits.uncheckpointed_layers == hf.limits.dequantized_layers == 0
    assert plan(lora_model(), kernels="fused", gradient_checkpointing=True).limits.uncheckpointed_layers == 0
    assert plan(lora_model(), gradient_checkpointing=True).checkpointing


# --- batch sizes


@pytest.mark.parametrize(
    ("training", "gpus", "batch_size", "rows"),
    [
        ({}, 1, 16, None),
        ({}, 2, 16, None),
        ({"effective_batch_size": 24}, 1, 24, None),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}, 1, 16, 4),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 2, 16, 4),
        ({"per_device_train_batch_size": 3}, 1, 3, 3),
        ({"per_device_train_batch_size": 3, "effective_batch_size": 16}, 1, 16, 3),
    ],
)
@pytest.mark.parametrize("kernels", ["fused", "hf"])
def test_numbers_in_the_config_are_obeyed(
    training: dict[str, Any], gpus: int, batch_size: int, rows: int | None, kernels: str, model: Any, gpu: Any
) -> None:
    for device in (ON_CPU, gpu(80)):
        found = plan(model, device, gpus=gpus, kernels=kernels, **training)
        assert (found.batch_size, found.micro_batch_size) == (batch_size, rows)


def test_a_batch_size_in_the_config_sets_the_micro_batch(large_model: Any, gpu: Any) -> None:
    assert plan(large_model, gpu(80), per_device_train_batch_size=4).limits.tokens == 4 * max(LENGTHS)
    hf = plan(large_model, gpu(80), per_device_train_batch_size=4, kernels="hf")
    assert hf.limits.tokens == 4 * max(LENGTHS)
    with raises("gpu.too_small", match="per_device_train_batch_size"):
        plan(large_model, gpu(8), per_device_train_batch_size=64, lengths=[1000] * 64)


def test_the_worst_micro_batch_is_an_upper_bound_for_every_step() -> None:
    lengths = [50, 10, 40, 30, 50, 20]
    by_tokens = worst_micro_batch(lengths, MicroBatchConfig(125, 0), None, batch_size=4, padded=False)
    assert by_tokens[0] == 0
    assert sum(lengths[i] for i in by_tokens) == 120
    assert worst_micro_batch(lengths, MicroBatchConfig(10_000, 0), None, batch_size=3, padded=False) == [0, 4, 2]
    assert worst_micro_batch(lengths, MicroBatchConfig(125, 0), None, batch_size=4, padded=True) == [0, 4]
    assert worst_micro_batch(lengths, MicroBatchConfig(10, 0), 3, batch_size=4, padded=False) == [0, 4, 2]
    assert worst_micro_batch(lengths, MicroBatchConfig(10, 0), 9, batch_size=2, padded=True) == [0, 4]


# --- its text


def test_the_text_of_a_plan(large_model: Any, gpu: Any) -> None:
    text = str(plan(large_model, gpu(10)))
    assert text.startswith(
        "fused layers (one of Llama, Mistral, Qwen2 on a GPU); 16 examples a step, micro-batches of up to "
    )
    assert " layers not recomputed, 0 dequantized; " in text
    assert text.endswith("GiB (estimated)")
    assert "\n" not in text
    found = plan(large_model, gpu(80), kernels="hf", per_device_train_batch_size=4, gradient_accumulation_steps=4)
    assert str(replace(found, needed=None)) == (
        "Hugging Face layers (training.kernels); 16 examples a step, micro-batches of 4 examples; gradient checkpointing on"
    )
