"""Training throughput of a GPU in tokens per second on the fused backend (finetune/models/fused/layer.py), without padding.

Measured if there is a measurement, else estimated as in speed.py, whose table has the figures for an H100. Its error: it is
within 3% of the GPU time of eight measured steps (its figures are fitted to five of them), and up to 12% faster than the steps
of benchmarks.throughput. On other GPUs we have no measurement: take it as right within a factor of 2 either way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.estimate.speed import MISTRAL_7B, SAME_LENGTH, Speed, projection_widths, reached_share

if TYPE_CHECKING:
    from finetune.machine.gpus import GpuSpec
    from finetune.models.architectures import ModelShape


@dataclass(frozen=True)
class FusedStep:
    """An optimizer step on the fused backend. batch_size: examples in it, of mean_tokens each. tokens: the most in a micro-batch.

    micro_batch_size: in examples, if the config sets it. uncheckpointed_layers, dequantized_layers: how many layers keep their
    activations, their dequantized weights (finetune/estimate/fit.py). labelled: share of the tokens whose rows the last layer's
    MLP computes.
    """

    batch_size: int
    mean_tokens: float
    tokens: int
    uncheckpointed_layers: int
    dequantized_layers: int
    micro_batch_size: int | None = None
    dropout: bool = True
    four_bit: bool = True
    labelled: float = 0.12


@dataclass(frozen=True)
class FusedMeasurement:
    """One measured configuration of the fused step; add a row to FUSED_MEASURED for another one.

    saved: True if no layer was recomputed, False if all were. cached: True if all weights stayed dequantized, False if none
    did. batch_size: of an optimizer step, which was one micro-batch.
    """

    gpu: str
    linear_parameters: int
    saved: bool
    cached: bool
    dropout: bool
    batch_size: int
    mean_tokens: float
    tokens_per_second: float
    source: str


FUSED_MEASURED = (
    FusedMeasurement("H100", MISTRAL_7B, True, True, True, 16, 322, 15409,
        "H100 80GB, `benchmarks.throughput`, fused layers in bfloat16, random Mistral-7B weights, texts of 322 tokens on "
        "average, 2026-11-23: median of 15,329 to 16,017"),
)  # fmt: skip
"""The row is from a table in docs/performance.md, which also has the results of other machines."""

FUSED_HOST, FUSED_HOST_RECOMPUTE = 0.152 / 32, 0.060 / 32
"""Seconds a layer that the host takes to launch a micro-batch (forward 60 ms, backward 92 ms at a tiny size, H100's host), and to
launch a layer's forward pass once more."""
FUSED_HOST_DEQUANTIZE = 0.037 / 32
"""Seconds a layer that the host takes to launch the dequantizing of its 4-bit weights for one pass (a forward pass over weights
that are not cached took it 97 ms at a tiny size instead of 60)."""
FUSED_STEP = 0.012
"""Seconds of an optimizer step besides its micro-batches: clipping 5 ms, refreshed copies 4 ms (measured); the optimizer on one
flat tensor 3 ms (estimated)."""
FUSED_WEIGHT_BYTES = 4.77
"""Of a 4-bit parameter and pass, as StepCost.weight_bytes. In the profile of a step of 4,696 tokens with checkpointing, two
dequantizing kernels and an addition took 28.2 ms for 2.84 passes."""
FUSED_TRAFFIC = {(True, False): 21.8, (True, True): 23.1, (False, False): 57.5, (False, True): 75.8}
"""Bytes of a token and element of a projection's input or output, by (Triton's operations and FlashAttention, LoRA dropout): what
the GPU time of such steps (259, 264 ms; with torch's operations 371, 438 ms, and 19 ms for the memory-efficient attention
kernel) leaves beside 179 ms of matrix products."""
FUSED_RECOMPUTE = 0.275
"""Share of that traffic that recomputing a forward pass adds, without its matrix products (22 of 80 ms)."""
STEP_SIZES = (-1.465, -0.792, -0.366, 0.0, 0.366, 0.792, 1.465)
"""Sizes of optimizer steps as standard deviations from the mean: the middles of seven equal parts of a normal distribution."""
LENGTH_SPREAD = 0.97
"""Standard deviation of the lengths of text-to-SQL examples over their mean: that of a log-normal distribution with the median
(223) and 95th percentile (853 tokens) of the benchmarks."""


def fused_speed(gpu: GpuSpec, shape: ModelShape, step: FusedStep) -> Speed:
    """Tokens a second of whole optimizer steps on the fused backend (adapters on all seven projections).

    Measured where FUSED_MEASURED has the GPU, shape and kind of step, and it is one micro-batch; else estimated.
    """
    asked = (
        gpu.name, shape.linear_parameters, step.uncheckpointed_layers == shape.layers,
        step.dequantized_layers == shape.layers, step.dropout, step.batch_size,
    )  # fmt: skip
    in_one_piece = min(step.tokens / step.mean_tokens, step.micro_batch_size or math.inf) >= step.batch_size
    whole = (
        in_one_piece and step.four_bit and {step.uncheckpointed_layers, step.dequantized_layers} <= {0, shape.layers}
    )
    for row in FUSED_MEASURED:
        of_row = (row.gpu, row.linear_parameters, row.saved, row.cached, row.dropout, row.batch_size)
        if whole and of_row == asked and abs(step.mean_tokens - row.mean_tokens) <= SAME_LENGTH * row.mean_tokens:
            return Speed(row.tokens_per_second, "measured", row.source)
    sizes = step_sizes(step)
    seconds = sum(fused_step_seconds(gpu, shape, size, step) for size in sizes)
    source = f"estimated from an H100's fused step (2026-11) by matrix rate and bandwidth of the {gpu.name}, to a factor of 2"
    return Speed(sum(sizes) / seconds, "estimated", source)


def step_sizes(step: FusedStep) -> list[float]:
    """Tokens of seven optimizer steps that represent the distribution of step sizes."""
    mean, deviation = step.batch_size * step.mean_tokens, LENGTH_SPREAD / math.sqrt(step.batch_size)
    return [mean * max(0.1, 1 + deviation * size) for size in STEP_SIZES]


def fused_step_seconds(gpu: GpuSpec, shape: ModelShape, tokens: float, step: FusedStep) -> float:
    """Seconds of wall time of an optimizer step of `tokens` tokens, in micro-batches of equal size."""
    pieces = (
        math.ceil(step.batch_size / step.micro_batch_size) if step.micro_batch_size else math.ceil(tokens / step.tokens)
    )
    recomputed = shape.layers - step.uncheckpointed_layers
    packed, packed_recomputed = packed_layers(shape, step)
    host = (
        FUSED_HOST * shape.layers
        + FUSED_HOST_RECOMPUTE * recomputed
        + FUSED_HOST_DEQUANTIZE * (2 * packed + packed_recomputed)
    )
    return pieces * max(host, fused_gpu_seconds(gpu, shape, tokens / pieces, step)) + FUSED_STEP


def packed_layers(shape: ModelShape, step: FusedStep) -> tuple[int, int]:
    """Layers that dequantize their weights at every use, and those among them that are recomputed: the first layers are cached,
    the last ones not recomputed."""
    packed = shape.layers - step.dequantized_layers if step.four_bit else 0
    return packed, max(0, packed - step.uncheckpointed_layers)


def fused_gpu_seconds(gpu: GpuSpec, shape: ModelShape, tokens: float, step: FusedStep) -> float:
    """Seconds that the GPU is busy with one micro-batch.

    As `gpu_seconds`, but recomputation leaves out down_proj, and after its attention the last layer computes only labelled rows.
    """
    names = shape.projections
    of_layer = shape.linear_parameters / shape.layers
    recomputed = (1 - math.prod(names["down_proj"]) / of_layer) * (shape.layers - step.uncheckpointed_layers)
    skipped = (1 - step.labelled) * (
        1 - sum(math.prod(names[name]) for name in ("q_proj", "k_proj", "v_proj")) / of_layer
    )
    flop = 2 * of_layer * (2 * (shape.layers - skipped) + recomputed) * tokens
    traffic = FUSED_TRAFFIC[gpu.compute_capability >= (8, 0), step.dropout] * projection_widths(shape)
    traffic *= (1 + FUSED_RECOMPUTE * (1 - step.uncheckpointed_layers / shape.layers)) * tokens
    packed, packed_recomputed = packed_layers(shape, step)
    dequantized = (
        FUSED_WEIGHT_BYTES
        * of_layer
        * (2 * packed + packed_recomputed * (1 - math.prod(names["down_proj"]) / of_layer))
    )
    return flop / (gpu.tflops * 1e12 * reached_share(gpu)) + (traffic + dequantized) / (gpu.bandwidth * 1e9)
