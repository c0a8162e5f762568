"""What fits on a GPU: how many tokens a micro-batch holds, how many layers keep their activations or unpacked weights.

Arithmetic over finetune/estimate/memory_fused.py, without torch: a run decides with it, and `finetune plan` foretells
the decision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from finetune.config.load import questions_per_step
from finetune.config.schema import RunConfig
from finetune.errors import UserError
from finetune.estimate.memory_fused import LeanLoad, lean_estimate
from finetune.estimate.memory_hf import (
    CONTEXT_GIB,
    MemoryEstimate,
    Workload,
    estimate,
    fits,
    largest_rows,
    workload_of,
)
from finetune.estimate.speed_fused import LENGTH_SPREAD, LeanStep, lean_step_seconds, step_sizes
from finetune.machine.gpus import GPUS, GpuSpec
from finetune.machine.hardware import GIB, dtype_for
from finetune.models.architectures import ModelShape

MOST_TOKENS = 32_768
"""More tokens in one micro-batch gain nothing: an H100's matrix products are as fast from 2,000 on."""
PIECES = (1, 1.5, 2, 3, 4, 6, 8, 12, 16)
"""Into so many micro-batches of one size an optimizer step is tried to be cut."""
ALIKE = 1.02
"""Times nearer than this factor count as the same: then the larger micro-batch is taken."""
MARGIN = 0.03
"""Share of a GPU's memory that is left free, for what the estimate does not know."""
USUAL_DEVIATIONS = 1.645
"""So many standard deviations above the mean end 95% of a normal distribution."""


@dataclass(frozen=True)
class Limits:
    """tokens: of one micro-batch. kept_layers: the last so many keep what their backward pass needs, the others are computed
    again. cached_layers: so many keep their 4-bit weights unpacked."""

    tokens: int
    kept_layers: int
    cached_layers: int = 0


@dataclass(frozen=True)
class Fitted:
    """How a config's step is computed on one GPU. needed: at the peak; of the least that could run where nothing fits.

    limits: of the lean way; None on the stock way, which pads `rows` questions to one length and checkpoints all layers or none.
    rows: None where tokens alone bound a micro-batch.
    """

    limits: Limits | None
    rows: int | None
    checkpointing: bool
    needed: MemoryEstimate
    memory_gib: float
    fits: bool

    @property
    def needed_gib(self) -> float:
        """GiB with CUDA's own share; where it does not fit on the lean way, with what has to be left free."""
        margin = 0.0 if self.fits or self.limits is None else MARGIN * self.memory_gib
        return self.needed.reserved / GIB + CONTEXT_GIB + margin


def fit_on(config: RunConfig, shape: ModelShape, gpu: GpuSpec, *, usual_step: float) -> Fitted:
    """What a run of this config will do on a GPU, as far as its model and memory decide. usual_step: as for `choose`.

    Raises UserError for projections and dtypes that memory is not known for.
    """
    training = config.training
    dtype = dtype_for(gpu.compute_capability, config.model.torch_dtype)
    load, there = workload_of(config, dtype), min(gpu.memory_gib, training.max_memory_gib or math.inf)
    questions = questions_per_step(training)
    named = training.per_device_train_batch_size
    rows = None if named == "auto" else min(named, questions)  # no micro-batch is larger than the step
    if training.kernels == "stock":
        padded = rows or max(1, min(questions, largest_rows(shape, load, there)))
        needed = estimate(shape, replace(load, rows=padded))
        return Fitted(None, padded, load.checkpointing, needed, there, fits(needed, there))
    wanted = None if training.gradient_checkpointing == "auto" else training.gradient_checkpointing
    ampere = gpu.compute_capability >= (8, 0)
    try:
        limits = choose(
            shape, load, there, longest=load.tokens, usual_step=math.ceil(usual_step), checkpointing=wanted, rows=rows,
            ampere=ampere, texts=rows or questions, gpu=gpu,
        )  # fmt: skip
        fitting = True
    except TooSmall as error:
        limits, fitting = error.least, False
    lean = _lean(load, limits, ampere=ampere, texts=rows or questions)
    return Fitted(limits, rows, limits.kept_layers < shape.layers, lean_estimate(shape, lean), there, fitting)


def usual_step_tokens(questions: int, mean_tokens: float) -> float:
    """Tokens that 95% of the optimizer steps of `questions` stay below, whose mean length is mean_tokens. Estimated."""
    return questions * mean_tokens * (1 + USUAL_DEVIATIONS * LENGTH_SPREAD / math.sqrt(questions))


class TooSmall(UserError):
    """least: the limits that did not fit either."""

    def __init__(self, message: str, least: Limits, *, code: str) -> None:
        super().__init__(message, code=code)
        self.least = least


def choose(
    shape: ModelShape,
    load: Workload,
    memory_gib: float,
    *,
    longest: int,
    usual_step: int,
    checkpointing: bool | None = None,
    rows: int | None = None,
    ampere: bool | None = None,
    texts: int = 16,
    gpu: GpuSpec | None = None,
) -> Limits:
    """The limits for a GPU that reports memory_gib (GiB) in all: of those that fit, the fastest by
    finetune/estimate/speed.py.

    longest: tokens of the longest text, which must fit as a whole. usual_step: tokens of nearly every optimizer step; beyond it a
    micro-batch need not grow. checkpointing: True computes every layer again, False none, None as few as possible. rows: texts in
    a micro-batch where the config names a number. ampere, texts: as in LeanLoad. gpu: whose speed decides between few large
    micro-batches with layers computed again and many small ones without (an H100 waits for its host in small ones, a T4 does
    not); None: an A100's. Raises TooSmall, a UserError, where not even the longest text fits with every layer computed again.
    """
    load, gpu = replace(load, tokens=longest), gpu or GPUS["A100"]

    def fit(limits: Limits) -> bool:
        needed = lean_estimate(shape, _lean(load, limits, ampere=ampere, texts=texts))
        return fits(needed, memory_gib * (1 - MARGIN))

    def filled(tokens: int) -> Limits | None:
        """With so many tokens: as many layers kept as may be and fit, then as many unpacked; None if it does not fit at all."""
        kept = 0 if checkpointing else shape.layers
        if checkpointing is None:
            kept = _most(kept, lambda n: fit(Limits(tokens, n)))
        if not fit(Limits(tokens, kept)):
            return None
        unpacked = shape.layers if load.four_bit else 0
        return Limits(tokens, kept, _most(unpacked, lambda n: fit(Limits(tokens, kept, n))))

    def seconds(limits: Limits) -> float:
        mean = usual_step / usual_step_tokens(texts, 1)
        step = LeanStep(
            texts, mean, limits.tokens, limits.kept_layers, limits.cached_layers, rows, bool(load.lora_dropout), load.four_bit
        )  # fmt: skip
        return sum(lean_step_seconds(gpu, shape, size, step) for size in step_sizes(step))

    least = longest * (rows or 1)
    top = least if rows else max(least, min(MOST_TOKENS, usual_step))
    tries = {max(least, math.ceil(top / pieces)) for pieces in PIECES}
    found = [limits for tokens in sorted(tries, reverse=True) if (limits := filled(tokens))]
    if not found:
        last = Limits(least, shape.layers if checkpointing is False else 0)
        needed = lean_estimate(shape, _lean(load, last, ampere=ampere, texts=texts))
        raise TooSmall(_too_small(needed, memory_gib, least, checkpointing), last, code="gpu.too_small")
    times = [seconds(limits) for limits in found]
    return next(limits for limits, time in zip(found, times, strict=True) if time <= ALIKE * min(times))


def _lean(load: Workload, limits: Limits, *, ampere: bool | None, texts: int) -> LeanLoad:
    return LeanLoad(load, limits.tokens, limits.kept_layers, limits.cached_layers, ampere=ampere, texts=texts)


def _most(top: int, holds: Callable[[int], bool]) -> int:
    """The largest number of 0 .. top for which `holds` is true, given that it is so up to some number; 0 if for none."""
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
