"""What fits on a GPU: the tokens of a micro-batch, and how many layers keep their activations or dequantized weights.

Arithmetic over finetune/estimate/memory_fused.py, without torch: a run makes its choice with it, and `finetune plan` predicts
that choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from finetune.config.load import examples_per_step
from finetune.config.schema import RunConfig
from finetune.errors import UserError
from finetune.estimate.memory_fused import FusedLoad, fused_estimate
from finetune.estimate.memory_hf import (
    CONTEXT_GIB,
    MemoryEstimate,
    Workload,
    estimate,
    fits,
    largest_micro_batch,
    workload_of,
)
from finetune.estimate.speed_fused import LENGTH_SPREAD, FusedStep, fused_step_seconds, step_sizes
from finetune.machine.gpus import GPUS, GpuSpec
from finetune.machine.hardware import GIB, dtype_for
from finetune.models.architectures import ModelShape

MOST_TOKENS = 32_768
"""More tokens in one micro-batch gain nothing: an H100's matrix products reach full speed at 2,000."""
PIECES = (1, 1.5, 2, 3, 4, 6, 8, 12, 16)
"""Candidate numbers of equal micro-batches per optimizer step."""
ALIKE = 1.02
"""Times within this factor of the best count as equal; then the larger micro-batch is chosen."""
MARGIN = 0.03
"""Share of a GPU's memory that is left free, for errors of the estimate."""
USUAL_DEVIATIONS = 1.645
"""95% of a normal distribution is below this many standard deviations above the mean."""


@dataclass(frozen=True)
class MicroBatchConfig:
    """tokens: of one micro-batch. uncheckpointed_layers: how many of the last layers keep their activations; the others recompute
    them in the backward pass. dequantized_layers: how many of the first layers keep their 4-bit weights dequantized."""

    tokens: int
    uncheckpointed_layers: int
    dequantized_layers: int = 0


@dataclass(frozen=True)
class Fitted:
    """How a config's step is computed on one GPU. needed: memory at the peak; if nothing fits, that of the smallest choice.

    limits: of the fused backend; None on the Hugging Face backend, which pads micro_batch_size examples to one length and
    checkpoints all layers or none. micro_batch_size: in examples; None if only tokens limit a micro-batch.
    """

    limits: MicroBatchConfig | None
    micro_batch_size: int | None
    checkpointing: bool
    needed: MemoryEstimate
    memory_gib: float
    fits: bool

    @property
    def needed_gib(self) -> float:
        """GiB including CUDA's own share, and including MARGIN if it does not fit on the fused backend."""
        margin = 0.0 if self.fits or self.limits is None else MARGIN * self.memory_gib
        return self.needed.reserved / GIB + CONTEXT_GIB + margin


def fit_on(config: RunConfig, shape: ModelShape, gpu: GpuSpec, *, usual_step: float, gpus: int = 1) -> Fitted:
    """What a run of this config will choose on a GPU, given its model and memory. usual_step: as for `autotune`. gpus: that train
    together.

    Raises UserError for projections and dtypes whose memory cannot be estimated, and like `examples_per_step`.
    """
    training = config.training
    dtype = dtype_for(gpu.compute_capability, config.model.torch_dtype)
    load, there = workload_of(config, dtype), min(gpu.memory_gib, training.max_memory_gib or math.inf)
    batch_size = examples_per_step(training, gpus)
    named = training.per_device_train_batch_size
    micro_batch_size = None if named == "auto" else min(named, batch_size)  # no micro-batch is larger than the step
    if training.kernels == "hf":
        padded = micro_batch_size or max(1, min(batch_size, largest_micro_batch(shape, load, there)))
        needed = estimate(shape, replace(load, micro_batch_size=padded))
        return Fitted(None, padded, load.checkpointing, needed, there, fits(needed, there))
    wanted = None if training.gradient_checkpointing == "auto" else training.gradient_checkpointing
    ampere = gpu.compute_capability >= (8, 0)
    try:
        limits = autotune(
            shape, load, there, longest=load.tokens, usual_step=math.ceil(usual_step), checkpointing=wanted,
            micro_batch_size=micro_batch_size, ampere=ampere, texts=micro_batch_size or batch_size, gpu=gpu,
        )  # fmt: skip
        fitting = True
    except TooSmall as error:
        limits, fitting = error.least, False
    fused = _fused(load, limits, ampere=ampere, texts=micro_batch_size or batch_size)
    return Fitted(
        limits,
        micro_batch_size,
        limits.uncheckpointed_layers < shape.layers,
        fused_estimate(shape, fused),
        there,
        fitting,
    )


def usual_step_tokens(batch_size: int, mean_tokens: float) -> float:
    """Estimated 95th percentile of the tokens in an optimizer step of batch_size examples with mean length mean_tokens."""
    return batch_size * mean_tokens * (1 + USUAL_DEVIATIONS * LENGTH_SPREAD / math.sqrt(batch_size))


class TooSmall(UserError):
    """least: the smallest micro-batch, which does not fit either."""

    def __init__(self, message: str, least: MicroBatchConfig, *, code: str) -> None:
        super().__init__(message, code=code)
        self.least = least


def autotune(
    shape: ModelShape,
    load: Workload,
    memory_gib: float,
    *,
    longest: int,
    usual_step: int,
    checkpointing: bool | None = None,
    micro_batch_size: int | None = None,
    ampere: bool | None = None,
    texts: int = 16,
    gpu: GpuSpec | None = None,
) -> MicroBatchConfig:
    """The fastest micro-batch config, by finetune/estimate/speed_fused.py, that fits on a GPU with memory_gib (GiB) in total.

    longest: tokens of the longest text, which must fit as a whole. usual_step: tokens that nearly every optimizer step stays
    below; a micro-batch need not be larger. checkpointing: True recomputes every layer, False none, None as few as possible.
    micro_batch_size: examples in a micro-batch, if the config sets it. ampere, texts: as in FusedLoad. gpu: its speed decides
    between few large micro-batches with recomputed layers and many small ones without (in small ones an H100 waits for its
    host, a T4 does not); None: an A100. Raises TooSmall, a UserError, if not even the longest text fits with every layer
    recomputed.
    """
    load, gpu = replace(load, tokens=longest), gpu or GPUS["A100"]

    def fit(limits: MicroBatchConfig) -> bool:
        needed = fused_estimate(shape, _fused(load, limits, ampere=ampere, texts=texts))
        return fits(needed, memory_gib * (1 - MARGIN))

    def filled(tokens: int) -> MicroBatchConfig | None:
        """For this many tokens: as many layers without recomputation as fit, then as many dequantized as fit; None if it does
        not fit at all."""
        saved = 0 if checkpointing else shape.layers
        if checkpointing is None:
            saved = _most(saved, lambda n: fit(MicroBatchConfig(tokens, n)))
        if not fit(MicroBatchConfig(tokens, saved)):
            return None
        dequantized = shape.layers if load.four_bit else 0
        return MicroBatchConfig(tokens, saved, _most(dequantized, lambda n: fit(MicroBatchConfig(tokens, saved, n))))

    def seconds(limits: MicroBatchConfig) -> float:
        mean = usual_step / usual_step_tokens(texts, 1)
        step = FusedStep(
            texts, mean, limits.tokens, limits.uncheckpointed_layers, limits.dequantized_layers, micro_batch_size,
            bool(load.lora_dropout), load.four_bit,
        )  # fmt: skip
        return sum(fused_step_seconds(gpu, shape, size, step) for size in step_sizes(step))

    least = longest * (micro_batch_size or 1)
    top = least if micro_batch_size else max(least, min(MOST_TOKENS, usual_step))
    tries = {max(least, math.ceil(top / pieces)) for pieces in PIECES}
    found = [limits for tokens in sorted(tries, reverse=True) if (limits := filled(tokens))]
    if not found and (smallest := filled(least)):  # every piece of a usual step was too large
        found = [smallest]
    if not found:
        last = MicroBatchConfig(least, shape.layers if checkpointing is False else 0)
        needed = fused_estimate(shape, _fused(load, last, ampere=ampere, texts=texts))
        raise TooSmall(_too_small(needed, memory_gib, least, checkpointing), last, code="gpu.too_small")
    times = [seconds(limits) for limits in found]
    return next(limits for limits, time in zip(found, times, strict=True) if time <= ALIKE * min(times))


def _fused(load: Workload, limits: MicroBatchConfig, *, ampere: bool | None, texts: int) -> FusedLoad:
    return FusedLoad(
        load, limits.tokens, limits.uncheckpointed_layers, limits.dequantized_layers, ampere=ampere, texts=texts
    )


def _most(top: int, holds: Callable[[int], bool]) -> int:
    """The largest n in 0 .. top for which `holds` is true, by bisection: it must be true up to some n; 0 if it never is."""
    low, high = 0, top
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _too_small(needed: MemoryEstimate, memory_gib: float, tokens: int, checkpointing: bool | None) -> str:
    advice = "lower model.max_seq_length, or training.per_device_train_batch_size where it is a number"
    if checkpointing is False:
        advice += ", or set training.gradient_checkpointing=auto"
    return (
        f"GPU memory: {tokens:,} tokens in one micro-batch need about {needed.reserved / GIB + CONTEXT_GIB:.1f} GiB (estimated) "
        f"and {MARGIN:.0%} left free, this GPU has {memory_gib:.1f}; {advice}"
    )
