"""What a run chooses on a GPU: it fits, nothing larger does, and memory is used first where it gains most."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune.config.load import load_config
from finetune.config.schema import RunConfig
from finetune.estimate.fit import (
    ALIKE,
    MARGIN,
    MOST_TOKENS,
    MicroBatchConfig,
    TooSmall,
    autotune,
    fit_on,
    usual_step_tokens,
)
from finetune.estimate.memory_fused import FusedLoad, fused_estimate
from finetune.estimate.memory_hf import CONTEXT_GIB, Workload, estimate, fits, largest_micro_batch, workload_of
from finetune.estimate.speed_fused import FusedStep, fused_step_seconds, step_sizes
from finetune.machine.gpus import GPUS, GpuSpec
from finetune.machine.hardware import GIB
from finetune.models.architectures import SHAPES
from tests.helpers.errors import raises

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "mistral_7b_qlora.yaml"
MISTRAL = SHAPES["mistralai/Mistral-7B-v0.1"]
BFLOAT16, FLOAT16 = Workload(1, 2048), Workload(1, 2048, dtype="float16")


def config(*overrides: str) -> RunConfig:
    return load_config(CONFIG, [f"training.{override}" for override in overrides])


def needs(limits: MicroBatchConfig, load: Workload, **settings_: Any) -> float:
    """GiB with CUDA's own share."""
    fused = FusedLoad(load, limits.tokens, limits.uncheckpointed_layers, limits.dequantized_layers, **settings_)
    return fused_estimate(MISTRAL, fused).reserved / GIB + CONTEXT_GIB


def on(name: str, **settings_: Any) -> MicroBatchConfig:
    gpu = GPUS[name]
    load = BFLOAT16 if gpu.dtype == "bfloat16" else FLOAT16
    return autotune(MISTRAL, load, gpu.memory_gib, longest=2048, usual_step=8000, **settings_)


def size(limits: MicroBatchConfig) -> tuple[int, int, int]:
    """In the order of what memory goes to."""
    return limits.uncheckpointed_layers, limits.tokens, limits.dequantized_layers


def epoch(limits: MicroBatchConfig, gpu: GpuSpec, usual: int) -> float:
    """Seconds of a few steps of 16 questions, 95% of which stay below `usual` tokens."""
    step = FusedStep(
        16, usual / usual_step_tokens(16, 1), limits.tokens, limits.uncheckpointed_layers, limits.dequantized_layers
    )
    return sum(fused_step_seconds(gpu, MISTRAL, tokens, step) for tokens in step_sizes(step))


# ---- the GPUs of the plan


@pytest.mark.parametrize(("name", "tokens", "dequantized"), [
    ("T4", (2048, 4000), (0, 6)), ("V100", (2048, 4000), (0, 8)), ("L4", (2048, 8000), (0, 31)),
    ("A100", (8000, 8000), (16, 31)), ("A100-80GB", (8000, 8000), (32, 32)), ("H100", (8000, 8000), (32, 32)),
])  # fmt: skip
def test_mistral_keeps_all_its_layers_on_every_gpu(
    name: str, tokens: tuple[int, int], dequantized: tuple[int, int]
) -> None:
    limits = on(name)
    assert limits.uncheckpointed_layers == 32
    assert tokens[0] <= limits.tokens <= tokens[1]
    assert dequantized[0] <= limits.dequantized_layers <= dequantized[1]


def test_longer_texts_are_recomputed_in_as_many_layers_as_necessary() -> None:
    kept = [autotune(MISTRAL, FLOAT16, 14.5, longest=longest, usual_step=8000).uncheckpointed_layers
            for longest in (2048, 3000, 4000, 6000, 8000)]  # fmt: skip
    assert kept[0] == 32 and kept == sorted(kept, reverse=True) and len(set(kept)) == 5
    with raises(
        "gpu.too_small", match=r"^GPU memory: 30,000 tokens in one micro-batch need about .* this GPU has 14\.5"
    ):
        autotune(MISTRAL, FLOAT16, 14.5, longest=30_000, usual_step=8000)


def test_what_the_config_says_about_checkpointing_is_obeyed() -> None:
    assert on("H100", checkpointing=True).uncheckpointed_layers == 0
    with raises("gpu.too_small", match=r"or set training\.gradient_checkpointing=auto") as caught:
        autotune(MISTRAL, FLOAT16, 14.5, longest=4000, usual_step=8000, checkpointing=False)
    assert isinstance(caught.value, TooSmall) and caught.value.least == MicroBatchConfig(4000, 32)
    assert 0 < autotune(MISTRAL, FLOAT16, 14.5, longest=4000, usual_step=8000).uncheckpointed_layers < 32


def test_a_number_of_rows_is_obeyed_and_must_fit_at_the_longest() -> None:
    assert on("A100", micro_batch_size=4).tokens == 4 * 2048
    assert on("H100", micro_batch_size=1).tokens == 2048  # also where more would fit
    with raises("gpu.too_small") as caught:
        on("T4", micro_batch_size=16, checkpointing=False)
    assert isinstance(caught.value, TooSmall) and caught.value.least.tokens == 16 * 2048


def test_a_micro_batch_grows_as_far_as_it_gains() -> None:
    for usual, tokens in ((10_000, 10_000), (40_000, MOST_TOKENS), (100, 2048)):
        assert autotune(MISTRAL, BFLOAT16, 140, longest=2048, usual_step=usual).tokens == tokens


def test_unquantised_weights_need_no_dequantized_weight_cache() -> None:
    load = replace(BFLOAT16, four_bit=False)
    limits = autotune(MISTRAL, load, 79.1, longest=2048, usual_step=8000)
    assert limits == MicroBatchConfig(8000, 32, 0)


def test_an_older_gpu_holds_fewer_tokens() -> None:
    newer, older = (autotune(MISTRAL, BFLOAT16, 14.5, longest=2048, usual_step=8000, ampere=a) for a in (True, False))
    assert size(newer) > size(older)
    assert autotune(MISTRAL, FLOAT16, 14.5, longest=2048, usual_step=8000) == older


def test_the_longest_of_its_own_texts_counts() -> None:
    short, long = (autotune(MISTRAL, FLOAT16, 14.5, longest=n, usual_step=8000) for n in (500, 2048))
    assert size(short) > size(long)
    assert autotune(MISTRAL, replace(FLOAT16, tokens=500), 14.5, longest=2048, usual_step=8000) == long


def test_a_newer_gpu_stays_one_in_float16() -> None:
    half = load_config(CONFIG, ["model.torch_dtype=float16"])
    for name in ("L4", "T4"):
        assert fit_on(half, MISTRAL, GPUS[name], usual_step=8000.0).limits == on(name)


def test_more_texts_at_once_leave_less_to_an_older_gpu() -> None:
    """Its attention kernel lays out its sums as if each were as long as the longest."""
    few, many = (autotune(MISTRAL, FLOAT16, 14.5, longest=2048, usual_step=8000, texts=n) for n in (4, 64))
    assert size(few) > size(many)


# ---- whatever the memory


@settings(max_examples=60)
@given(
    memory_gib=st.floats(4, 120),
    longest=st.integers(16, 8192),
    usual=st.integers(16, 40_000),
    checkpointing=st.sampled_from([None, True, False]),
    micro_batch_size=st.none() | st.integers(1, 16),
    ampere=st.booleans(),
)
@example(memory_gib=5.5, longest=16, usual=785, checkpointing=False, micro_batch_size=None, ampere=False)
def test_what_is_chosen_fits_and_one_more_of_anything_does_not(
    memory_gib: float, longest: int, usual: int, checkpointing: bool | None, micro_batch_size: int | None, ampere: bool
) -> None:
    load, free = replace(BFLOAT16, tokens=longest), memory_gib * (1 - MARGIN)
    try:
        limits = autotune(
            MISTRAL, load, memory_gib, longest=longest, usual_step=usual, checkpointing=checkpointing,
            micro_batch_size=micro_batch_size, ampere=ampere,
        )  # fmt: skip
    except TooSmall as error:
        assert error.least.uncheckpointed_layers == (32 if checkpointing is False else 0)
        assert needs(error.least, load, ampere=ampere) > free
        return
    assert needs(limits, load, ampere=ampere) <= free
    assert limits.uncheckpointed_layers == {None: limits.uncheckpointed_layers, True: 0, False: 32}[checkpointing]
    assert longest * (micro_batch_size or 1) <= limits.tokens
    assert not micro_batch_size or limits.tokens == micro_batch_size * longest
    if checkpointing is None and limits.uncheckpointed_layers < 32:
        assert (
            needs(
                replace(limits, uncheckpointed_layers=limits.uncheckpointed_layers + 1, dequantized_layers=0),
                load,
                ampere=ampere,
            )
            > free
        )
    if limits.dequantized_layers < 32:
        assert needs(replace(limits, dequantized_layers=limits.dequantized_layers + 1), load, ampere=ampere) > free


@settings(max_examples=40)
@given(
    memory_gib=st.floats(8, 100), more=st.floats(0, 40), longest=st.integers(16, 4096), usual=st.integers(16, 20_000),
    name=st.sampled_from(sorted(GPUS)),
)  # fmt: skip
def test_more_memory_never_means_slower(memory_gib: float, more: float, longest: int, usual: int, name: str) -> None:
    """Apart from what counts as alike."""

    def seconds(gib: float) -> float:
        limits = autotune(MISTRAL, BFLOAT16, gib, longest=longest, usual_step=usual, gpu=GPUS[name])
        return epoch(limits, GPUS[name], usual)

    try:
        smaller = seconds(memory_gib)
    except TooSmall:
        return
    assert seconds(memory_gib + more) <= smaller * ALIKE


def test_a_host_bound_gpu_takes_few_large_micro_batches_and_a_slow_one_many_small_ones() -> None:
    """Measured on an H100 held to 10 GiB: 6,965 tokens/s in pieces of 1,651 tokens with 30 layers kept, 10,793 in one piece with
    all layers computed again."""
    fast, slow = (
        autotune(MISTRAL, BFLOAT16, 10.0, longest=1200, usual_step=6400, gpu=GPUS[name]) for name in ("H100", "T4")
    )
    assert fast.tokens == 6400 and fast.uncheckpointed_layers < 8
    assert slow.tokens < 2200 and slow.uncheckpointed_layers > 28


# ---- from a config


def test_a_config_is_fitted_as_its_run_will_choose() -> None:
    for name, gpu in GPUS.items():
        found = fit_on(config(), MISTRAL, gpu, usual_step=8000.0)
        assert found.limits == on(name) and found.fits
        assert found.needed_gib <= gpu.memory_gib * (1 - MARGIN)


def test_explicit_numbers_reach_the_choice() -> None:
    found = fit_on(config("per_device_train_batch_size=2"), MISTRAL, GPUS["A100"], usual_step=8000.0)
    assert found.limits and (found.micro_batch_size, found.limits.tokens) == (2, 4096)
    whole_step = fit_on(config("per_device_train_batch_size=64"), MISTRAL, GPUS["H100"], usual_step=8000.0)
    assert whole_step.limits and (whole_step.micro_batch_size, whole_step.limits.tokens) == (16, 16 * 2048)
    again = fit_on(config("gradient_checkpointing=true"), MISTRAL, GPUS["A100"], usual_step=8000.0)
    assert again.limits and again.limits.uncheckpointed_layers == 0 and again.checkpointing
    capped = fit_on(config("max_memory_gib=10"), MISTRAL, GPUS["A100"], usual_step=8000.0)
    assert capped.memory_gib == 10 and capped.needed_gib <= 10 * (1 - MARGIN)
    many_texts = fit_on(config("effective_batch_size=64"), MISTRAL, GPUS["T4"], usual_step=8000.0)
    assert many_texts.limits and many_texts.limits != on("T4")  # up to 64 texts in a micro-batch


def test_the_error_says_what_the_smallest_micro_batch_needs() -> None:
    big = config("per_device_train_batch_size=16", "gradient_checkpointing=false")
    found = fit_on(big, MISTRAL, GPUS["T4"], usual_step=8000.0)
    assert not found.fits and found.limits == MicroBatchConfig(16 * 2048, 32)
    assert found.needed_gib == pytest.approx(needs(MicroBatchConfig(16 * 2048, 32), FLOAT16) + MARGIN * 14.5)


def test_the_hf_backend_pads_rows_as_before() -> None:
    found = fit_on(config("kernels=hf", "per_device_train_batch_size=4"), MISTRAL, GPUS["L4"], usual_step=8000.0)
    assert found.limits is None and found.checkpointing and found.micro_batch_size == 4
    assert found.needed_gib == estimate(MISTRAL, Workload(4, 2048)).reserved / GIB + CONTEXT_GIB
    auto = config("kernels=hf")
    for name, gpu in GPUS.items():
        one, load = fit_on(auto, MISTRAL, gpu, usual_step=8000.0), workload_of(auto, gpu.dtype)
        assert one.micro_batch_size == min(16, largest_micro_batch(MISTRAL, load, gpu.memory_gib)), name
        assert one.fits and fits(one.needed, gpu.memory_gib)
    off = fit_on(config("kernels=hf", "gradient_checkpointing=false"), MISTRAL, GPUS["T4"], usual_step=8000.0)
    assert (off.micro_batch_size, off.fits) == (1, False)


def test_a_usual_step_exceeds_the_mean_by_more_the_fewer_its_examples() -> None:
    shares = [usual_step_tokens(n, 311) / (n * 311) for n in (1, 4, 16, 64)]
    assert shares == sorted(shares, reverse=True)
    assert usual_step_tokens(16, 311) == pytest.approx(16 * 311 * 1.4, rel=0.01)
