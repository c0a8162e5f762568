"""Training throughput of a GPU in tokens per second: measured if there is a measurement, else estimated from an H100's step.

Arithmetic without torch, for `finetune plan`. Tokens are those of prompt and answer; padding does not count.

A micro-batch (one forward and backward pass) takes as long as the slower of two that run side by side: the host, whose Python
process launches kernels, which no GPU makes faster, and the GPU. The GPU's time is a sum, here of an H100 with Mistral-7B:

                         TRL and PEFT, checkpointing                    fused layers, nothing recomputed
    host                 21.6 ms a layer                               4.75 ms a layer
    matrix products      57 us a padded token                          38 us a token
    memory traffic       139 us a padded token                         18 us a token
    4-bit weights        25 ms a micro-batch                           20 ms a micro-batch, 0 where they stay dequantized
    short kernels        32 ms a micro-batch                           in the traffic

For another GPU the products are divided by its matrix rate, traffic and weights by its bandwidth; for another model they grow
with its parameters, the widths of its projections, its parameters, and its layers (as does the host's part).

How wrong it may be. Put back on the H100 the hf figures meet the wall time of sixteen measured runs within 20% (nine of them
had no part in it), six of padded TRL in bfloat16 within 6%; our own trainer they take to be 14% faster than it was on texts of
304 tokens (1,711 tokens/s for 1,497), presumably because casts to and from float32 adapters keep the host busy for longer, and
9% slower on texts of 224; the same run also differed by up to 1.4 times between machines. On other GPUs nobody has measured it
for us: take it as right within a factor of 2 either way. Left out: the host's processor (older ones of N1 and A2 machines may
launch kernels 1.5 times as slowly), kernels of T4 and V100 that are worse than the same ones on an H100, cards that get too
warm, and the data loader.

The Hugging Face layers are here, ours in speed_fused.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from finetune.machine.gpus import GpuSpec
    from finetune.models.architectures import ModelShape


@dataclass(frozen=True)
class Speed:
    """tokens_per_second counts prompt and answer without padding; source: where the number comes from, in one line."""

    tokens_per_second: float
    basis: Literal["measured", "estimated"]
    source: str


@dataclass(frozen=True)
class Measurement:
    """One measured configuration of our training step; add a row to MEASURED for another one.

    gpu: its name in finetune.machine.gpus.GPUS. linear_parameters: of the model's shape; another model with the same
    projections is as fast, since its head sees labelled tokens alone.
    micro_batch_size: in examples. mean_tokens: of one example, prompt and answer.
    """

    gpu: str
    linear_parameters: int
    micro_batch_size: int
    checkpointing: bool
    mean_tokens: float
    tokens_per_second: float
    source: str


MISTRAL_7B = 6_979_321_856
"""Parameters in the projections of Mistral-7B: 32 layers x (4096 x (4096 + 1024 + 1024 + 4096) + 3 x 4096 x 14336)."""

MEASURED = (
    Measurement("H100", MISTRAL_7B, 4, True, 304.4, 1497,
        "H100 80GB, our trainer in bfloat16, random Mistral-7B weights, texts of 304 tokens on average, 2026-11-22: one machine"),
    Measurement("H100", MISTRAL_7B, 4, False, 294, 3328,
        "H100 80GB, plain TRL path, random Mistral-7B weights, texts of 294 tokens, 2026-11: mean of 3,215 and 3,441"),
    Measurement("H100", MISTRAL_7B, 4, True, 224, 1431,
        "H100 80GB, `finetune train`, random Mistral-7B weights, texts of 224 tokens, 2026-11-22: middle of 1,318 to 1,897"),
)  # fmt: skip
"""The first: benchmarks/step_memory.py with torch 2.11 (float32 adapters, dropout 0.05, log-normal lengths grouped by length; 15
optimizer steps of 4 x 4, the first left out): 1,496.8, and on another machine 1,568.1 in float16. Plain TRL did as much with
float32 adapters (1,508 and 1,516: a_fp16 and a0_fp16_kbitprep of h100_anchors.json in ../shared/reference), and 1,677 to 1,738
with bfloat16 ones (b_bf16, b_bf16_rep, d_grouped). The second: c_nogc and d_grouped_nogc of that file, two machines, bfloat16
adapters; our trainer was not measured without checkpointing. The third: tests/training/test_gpu.py in bfloat16 on three
machines."""

SAME_LENGTH = 0.10
"""A measurement applies to texts whose mean length differs by at most this share: if host-bound, speed grows with the length."""


@dataclass(frozen=True)
class StepCost:
    """What a training step costs per unit that can be counted from a model's shape. Times in seconds on any GPU; bytes at the
    full bandwidth of the data sheet, so that what a kernel does not reach of it is part of the figure."""

    host_per_layer: float  # of one micro-batch, gradient checkpointing on
    host_per_layer_saved: float  # the same with activations kept
    short_kernels: float  # a layer and pass
    weight_bytes: float  # a 4-bit parameter and pass
    activation_bytes: float  # a padded token, element of a projection's input or output, and forward pass


PLAIN_BF16_ADAPTERS = StepCost(
    host_per_layer=0.69 / 32,
    host_per_layer_saved=0.35 / 32,
    short_kernels=338e-6,
    weight_bytes=3.98,
    activation_bytes=17.1,
)
"""Plain TRL with bfloat16 adapters, from h100_anchors.json. host: fits the five runs of four examples a micro-batch (three with
checkpointing, two without). The others: two profiled steps with checkpointing spent 1,163.9 ms of GPU time on 8,448 tokens in
four micro-batches, and 520.9 ms on 4,190 in one, so 110.6 us a token and 57.3 ms a micro-batch. Of the first 57.2 us are matrix
products at H100_SHARE; the rest is traffic. Of the second 24.9 ms are kDequantizeBlockwise; the rest goes to short kernels."""

PLAIN = replace(PLAIN_BF16_ADAPTERS, activation_bytes=44.3)
"""Our trainer, whose adapters are float32. Only the traffic differs (presumably casts around every projection): 196 us a token
fit the steps above 5,000 tokens of the run t4_pf16_eff_fp16 (same file), less 57.2 us of matrix products. That run was in float16
with the attention kernel of a T4; for bfloat16 it is taken over."""

H100_SHARE = 0.74
"""Of its peak matrix rate an H100 reaches this on the shapes of Mistral-7B in bfloat16 (measured: 732 of 989 TFLOP/s, mean of the
seven products in run 1/micro). Assumed for V100 and A100 too, where we have no measurement."""

LOW_POWER_SHARE = 0.5
LOW_POWER = ("T4", "L4")
"""Cards of 70 and 72 W are taken not to hold the clock that their peak is quoted at (throttling of the T4: Jia et al.,
"Dissecting the NVidia Turing T4 GPU via Microbenchmarking", 2019). The share is assumed, not measured."""

FILL = 0.91
"""Real tokens of all tokens in batches grouped by length (measured 0.913 with four examples a batch; at random it was 0.55)."""

SPREAD = (0.21, 0.35, 0.49, 0.66, 0.92, 1.38, 2.99)
"""Sizes of micro-batches grouped by length over their mean, in seven equal groups (the 56 of d_grouped, Spider-like text): short
ones wait for the host even where the mean one does not."""


PARALLEL = ((8, 0.80), (32, 0.96))
"""(examples of an optimizer step on each GPU, share of the speed of as many GPUs that each train alone): measured on two H200
with 16 and with 64 examples a step (docs/performance.md)."""


def data_parallel(speed: Speed, gpus: int, batch_size: int, step_tokens: float, least_seconds: float) -> Speed:
    """The speed of `gpus` GPUs in one machine that share optimizer steps of batch_size examples, given that of one.

    step_tokens: of an optimizer step. least_seconds: what a step takes however many GPUs share it, because each process has to
    launch its kernels. Otherwise by PARALLEL, in proportion to the logarithm of the examples that each GPU gets, and never better
    than was measured. An estimate on every other machine: small GPUs exchange gradients over PCIe, but their steps last seconds.
    """
    if gpus == 1:
        return speed
    (few, low), (many, high) = PARALLEL
    steepness = (high - low) / math.log2(many / few)
    share = low + steepness * math.log2(batch_size / gpus / few)
    share = max(1 / gpus, min(high, share, batch_size / gpus))  # as fast as one alone, at least
    source = f"{gpus} GPUs at {share:.0%} of their sum at most, estimated from two H200 (80% at 16, 96% at 64 examples); of one: "
    together = min(gpus * share * speed.tokens_per_second, step_tokens / least_seconds)
    return Speed(max(together, speed.tokens_per_second), "estimated", source + speed.source)


def training_speed(
    gpu: GpuSpec, shape: ModelShape, *, micro_batch_size: int, mean_tokens: float, checkpointing: bool
) -> Speed:
    """Real tokens a second of QLoRA training (NF4, adapters on all seven projections, batches grouped by length).

    micro_batch_size: in examples. mean_tokens: mean length of an example, prompt and answer, in tokens.
    Measured if MEASURED has the GPU, shape, micro-batch size, checkpointing and a similar length; else estimated, see the
    module's docstring for the error. ValueError if micro_batch_size or mean_tokens is not positive and finite.
    """
    if micro_batch_size < 1 or not (math.isfinite(mean_tokens) and mean_tokens > 0):
        raise ValueError(f"micro_batch_size ({micro_batch_size}) and mean_tokens ({mean_tokens}) must be positive")
    asked = (gpu.name, shape.linear_parameters, micro_batch_size, checkpointing)
    like = [
        row
        for row in MEASURED
        if (row.gpu, row.linear_parameters, row.micro_batch_size, row.checkpointing) == asked
        and abs(mean_tokens - row.mean_tokens) <= SAME_LENGTH * row.mean_tokens
    ]
    if like:
        nearest = min(like, key=lambda row: abs(mean_tokens - row.mean_tokens))
        return Speed(nearest.tokens_per_second, "measured", nearest.source)
    padded = micro_batch_size * mean_tokens / (FILL if micro_batch_size > 1 else 1.0)
    times = [micro_batch_seconds(gpu, shape, size * padded, checkpointing=checkpointing) for size in SPREAD]
    seconds = sum(times) / len(times)
    source = f"estimated from an H100's plain TRL step (2026-11) by matrix rate and bandwidth of the {gpu.name}, to a factor of 2"
    return Speed(micro_batch_size * mean_tokens / seconds, "estimated", source)


def micro_batch_seconds(
    gpu: GpuSpec, shape: ModelShape, padded_tokens: float, *, checkpointing: bool, cost: StepCost = PLAIN
) -> float:
    """Seconds of wall time of one micro-batch of padded_tokens tokens, padding included: the slower of host and GPU."""
    host = cost.host_per_layer if checkpointing else cost.host_per_layer_saved
    return max(host * shape.layers, gpu_seconds(gpu, shape, padded_tokens, checkpointing=checkpointing, cost=cost))


def gpu_seconds(
    gpu: GpuSpec, shape: ModelShape, padded_tokens: float, *, checkpointing: bool, cost: StepCost = PLAIN
) -> float:
    """Seconds that the GPU is busy with one micro-batch.

    Passes over the frozen weights: forward, backward (to the inputs alone), and with checkpointing forward again, 2 FLOP a
    parameter and token each. The backward pass is taken to move twice the activations of a forward pass. Left out, at 1 to 2%
    of the FLOP: attention's own products, and the head, which sees labelled tokens alone.
    """
    passes, traffic = (3, 4) if checkpointing else (2, 3)
    flop = 2 * shape.linear_parameters * passes * padded_tokens
    activations = cost.activation_bytes * projection_widths(shape) * traffic * padded_tokens
    weights = cost.weight_bytes * shape.linear_parameters * passes
    products = flop / (gpu.tflops * 1e12 * reached_share(gpu))
    return products + (activations + weights) / (gpu.bandwidth * 1e9) + cost.short_kernels * shape.layers * passes


def reached_share(gpu: GpuSpec) -> float:
    """The share of a GPU's peak matrix rate that a step's products reach."""
    return LOW_POWER_SHARE if gpu.name in LOW_POWER else H100_SHARE


def projection_widths(shape: ModelShape) -> int:
    """Elements of the inputs and outputs of the seven projections, summed over all layers, for one token."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = 2 * (shape.hidden + query) + 2 * (shape.hidden + key)
    return shape.layers * (attention + 3 * (shape.hidden + shape.intermediate))
