"""New tokens per second of the generators: the measurement itself where it was made, scaled by what bounds them elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest

from finetune.config.schema import FEW_QUESTIONS, ModelSection, RunConfig
from finetune.estimate.generation import (
    H200,
    HF_STEP_SECONDS,
    PARAMETERS,
    VLLM_TOKENS_PER_SECOND,
    GenerationSpeed,
    answering_speed,
    generation_speed,
    generator_on,
)
from finetune.machine.gpus import GPUS
from finetune.models.architectures import SHAPES

MISTRAL_NAME, SMOLLM_NAME = "mistralai/Mistral-7B-v0.1", "HuggingFaceTB/SmolLM2-135M"
MISTRAL = SHAPES[MISTRAL_NAME]
SMALL = replace(MISTRAL, layers=8)
LARGE = replace(MISTRAL, layers=64)


def vllm(gpu: str) -> GenerationSpeed:
    return generation_speed(GPUS[gpu], MISTRAL, generator="vllm", batch_size=16)


def test_the_measured_model_is_the_known_one() -> None:
    assert MISTRAL.parameters == PARAMETERS


def test_on_the_gpu_of_the_measurement_it_is_the_measurement() -> None:
    """798 tokens/s at 16 rows and 2,231 at 64: 20 and 29 ms a step."""
    found = generation_speed(H200, MISTRAL, generator="vllm", batch_size=16)
    assert (found.tokens_per_second, found.loading_seconds, found.basis) == (12_599.0, 180.0, "measured")
    hf = generation_speed(H200, MISTRAL, generator="hf", batch_size=16)
    assert hf.tokens_per_second == pytest.approx(798) and hf.basis == "measured"
    more = generation_speed(H200, MISTRAL, generator="hf", batch_size=64)
    assert more.basis == "estimated" and 2_231 / 2 < more.tokens_per_second < 2_231 * 2


@pytest.mark.parametrize("gpu", sorted(set(GPUS) - {"H200"}))
def test_elsewhere_it_is_estimated_and_no_faster(gpu: str) -> None:
    found = vllm(gpu)
    assert found.basis == "estimated" and "factor of 2" in found.source and "2026-11-29" in found.source
    assert 0 < found.tokens_per_second <= VLLM_TOKENS_PER_SECOND
    assert (found.tokens_per_second == VLLM_TOKENS_PER_SECOND) == (gpu == "B200"), (
        "a faster GPU is taken to be no faster"
    )


def test_vllm_is_as_slow_as_the_scarcer_of_arithmetic_and_bandwidth() -> None:
    assert vllm("L4").tokens_per_second == pytest.approx(12_599 * 300 / 4800), "bandwidth"
    assert vllm("A100").tokens_per_second == pytest.approx(12_599 * 312 / 989), "arithmetic"
    assert vllm("A100-80GB").tokens_per_second == vllm("A100").tokens_per_second


def test_a_larger_model_is_slower_and_a_smaller_one_no_faster() -> None:
    def speed(shape: object) -> float:
        return generation_speed(H200, shape, generator="vllm", batch_size=16).tokens_per_second  # type: ignore[arg-type]

    assert speed(SMALL) == speed(MISTRAL)
    assert speed(LARGE) == pytest.approx(speed(MISTRAL) * PARAMETERS / LARGE.parameters)
    assert generation_speed(H200, LARGE, generator="vllm", batch_size=16).basis == "estimated"


def test_hf_is_bound_by_the_host_until_the_gpu_is_slower() -> None:
    t4 = GPUS["T4"]
    one = generation_speed(H200, MISTRAL, generator="hf", batch_size=1)
    assert one.tokens_per_second == pytest.approx(1 / HF_STEP_SECONDS)
    slow = generation_speed(t4, MISTRAL, generator="hf", batch_size=1).tokens_per_second
    assert slow < one.tokens_per_second, "reading the weights takes longer than the host"
    many = generation_speed(t4, MISTRAL, generator="hf", batch_size=512).tokens_per_second
    assert many < 512 / HF_STEP_SECONDS, "the arithmetic of so many rows takes longer than the host"
    assert many < generation_speed(H200, MISTRAL, generator="hf", batch_size=512).tokens_per_second
    quarter = generation_speed(H200, SMALL, generator="hf", batch_size=16)
    assert quarter.tokens_per_second == pytest.approx(4 * 798)


@pytest.mark.parametrize(
    ("gpu", "wanted", "expected"),
    [
        ("L4", "auto", "vllm"),
        ("A100", "auto", "vllm"),
        ("T4", "auto", "hf"),  # compute capability 7.5
        ("V100", "auto", "hf"),
        ("L4", "hf", "hf"),
        ("T4", "vllm", "vllm"),
    ],
)
def test_auto_is_vllm_where_set_up_builds_it(gpu: str, wanted: str, expected: str) -> None:
    assert generator_on(GPUS[gpu], MISTRAL, wanted) == expected


@pytest.mark.parametrize(("wanted", "expected"), [("auto", "hf"), ("vllm", "vllm")])
def test_few_questions_are_answered_without_loading_vllm(wanted: str, expected: str) -> None:
    """As the registry chooses it for the evaluation."""
    assert generator_on(GPUS["L4"], MISTRAL, wanted, questions=FEW_QUESTIONS - 1) == expected
    assert generator_on(GPUS["L4"], MISTRAL, wanted, questions=FEW_QUESTIONS) == "vllm"


def test_auto_is_hf_where_16_bit_weights_leave_no_room() -> None:
    assert generator_on(GPUS["L4"], LARGE) == "hf"
    assert generator_on(GPUS["A100-80GB"], LARGE) == "vllm"


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size"):
        generation_speed(H200, MISTRAL, generator="hf", batch_size=0)


# float32


def test_a_7b_model_in_float32_is_not_promised_the_speed_of_16_bits() -> None:
    """An H200 multiplies 67 TFLOP/s in float32, and makes 2 x 7.24e9 operations a token: 4,600 tokens/s at its peak."""
    fast, slow = (
        generation_speed(H200, MISTRAL, generator="vllm", batch_size=16, dtype=dtype)
        for dtype in ("bfloat16", "float32")
    )
    assert (fast.basis, slow.basis) == ("measured", "estimated")
    assert 1000 < slow.tokens_per_second < 67e12 / (2 * MISTRAL.parameters)
    ratio = [
        generation_speed(H200, MISTRAL, generator="hf", batch_size=256, dtype=dtype).tokens_per_second
        for dtype in ("bfloat16", "float32")
    ]
    assert ratio[0] > 2 * ratio[1]


def test_a_small_model_is_as_fast_in_float32_as_measured() -> None:
    """SmolLM2-135M with vLLM on an H200: 13,664 tokens/s."""
    found = generation_speed(
        H200, SHAPES[SMOLLM_NAME], generator="vllm", batch_size=16, dtype="float32"
    ).tokens_per_second
    assert found == pytest.approx(13_664, rel=0.1)


def test_float32_weights_fit_into_less_gpus() -> None:
    assert generator_on(GPUS["L4"], MISTRAL) == "vllm"
    assert generator_on(GPUS["L4"], MISTRAL, dtype="float32") == "hf"


@pytest.mark.parametrize(("name", "dtype"), [(SMOLLM_NAME, "float32"), (MISTRAL_NAME, "bfloat16")])
def test_the_plan_takes_the_dtype_that_answers_have(name: str, dtype: str) -> None:
    config, shape = RunConfig(model=ModelSection(name=name)), SHAPES[name]
    expected = generation_speed(GPUS["A100"], shape, generator="vllm", batch_size=16, dtype=dtype)
    assert answering_speed(config, GPUS["A100"], shape, 1034) == expected
    config.evaluation.dtype = "float32"
    assert answering_speed(config, GPUS["A100"], shape, 1034).basis == "estimated"
    exact = generation_speed(GPUS["A100"], shape, generator="vllm", batch_size=16, dtype="float32")
    assert answering_speed(config, GPUS["A100"], shape, 1034) == exact
