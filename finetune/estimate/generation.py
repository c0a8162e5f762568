"""How fast a GPU answers questions, in new tokens per second: measured on one H200, scaled to other GPUs and models.

Arithmetic without torch, for `finetune plan`. Measured on 2026-11-29 with Mistral-7B's shape and 64 new tokens an answer. vLLM
0.24: `finetune evaluate` on 1,034 questions, the tuned model, after 136 s of loading for the base model (dequantized weights
written to the disk, compilation, graphs) and 44 s for the tuned one. hf: benchmarks.generation on 192 prompts of 187 tokens, NF4
weights with the adapter beside them, 16 rows.

Scaled so:
- vLLM: a GPU is as much slower as the lower of its two ratios to the H200, that of the matrix rate and that of the bandwidth; a
  larger model is slower by its parameters, a smaller one is taken to be no faster, because the host schedules every token.
- hf: the host takes as long everywhere (0.6 ms a layer), unless the GPU needs longer to unpack the weights and to compute.
- Loading takes as long everywhere.
Nothing of that was measured on another GPU: take it as right within a factor of 2 either way. Left out: prompts, which both
compute once where a schema repeats, and answers of very different lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from finetune.estimate.speed import PLAIN, reached_share
from finetune.machine.gpus import GPUS, GpuSpec

if TYPE_CHECKING:
    from finetune.models.architectures import ModelShape

GIB = 2**30
GeneratorName = Literal["vllm", "hf"]

H200 = GPUS["H200"]
"""The GPU of the measurements."""
PARAMETERS = 7_241_732_096
"""Of the model of the measurements, Mistral-7B."""

VLLM_FROM = (8, 0)
"""Compute capability from which on_machine/setup.sh builds vLLM's environment."""
VLLM_TOKENS_PER_SECOND = 12_599.0
VLLM_LOADING_SECONDS = 180.0
VLLM_SHARE = 0.85
"""Of the GPU's memory that 16-bit weights may take, so that the keys and values of many answers find room. Assumed."""

HF_STEP_SECONDS = 16 / 798
"""Of a step with 32 layers in 4 bits with the adapter beside them: 798 tokens/s at 16 rows (2,231 at 64)."""
HF_LAYERS = 32
HF_LOADING_SECONDS = 60.0
"""Assumed: reading and quantising the weights of a 7B model, which is not measured apart."""


@dataclass(frozen=True)
class GenerationSpeed:
    """tokens_per_second: new tokens, after loading_seconds. source: where the figures come from, in one line."""

    generator: GeneratorName
    tokens_per_second: float
    loading_seconds: float
    basis: Literal["measured", "estimated"]
    source: str


def generator_on(gpu: GpuSpec, shape: ModelShape, wanted: str = "auto") -> GeneratorName:
    """Which generator `evaluation.generator` comes to on a GPU."""
    if wanted != "auto":
        return "vllm" if wanted == "vllm" else "hf"
    fits = 2 * shape.parameters <= VLLM_SHARE * gpu.memory_gib * GIB
    return "vllm" if gpu.compute_capability >= VLLM_FROM and fits else "hf"


def generation_speed(gpu: GpuSpec, shape: ModelShape, *, generator: GeneratorName, batch_size: int) -> GenerationSpeed:
    """Speed of a generator on a GPU. batch_size: rows of a step, for hf. ValueError if it is not positive."""
    if batch_size < 1:
        raise ValueError(f"batch_size ({batch_size}) must be positive")
    measured = gpu.name == H200.name and shape.parameters == PARAMETERS
    origin = "one H200 with Mistral-7B's shape on 2026-11-29"
    if generator == "vllm":
        ratio = min(
            gpu.tflops * reached_share(gpu) / (H200.tflops * reached_share(H200)), gpu.bandwidth / H200.bandwidth
        )
        speed = VLLM_TOKENS_PER_SECOND * min(1.0, ratio) * min(1.0, PARAMETERS / shape.parameters)
        source = (
            f"vLLM on {origin}" if measured else f"vLLM, from {origin} by matrix rate or bandwidth, to a factor of 2"
        )
        return GenerationSpeed("vllm", speed, VLLM_LOADING_SECONDS, "measured" if measured else "estimated", source)
    step = max(HF_STEP_SECONDS * shape.layers / HF_LAYERS, _gpu_step_seconds(gpu, shape, batch_size))
    measured = measured and batch_size == 16
    source = f"hf on {origin}" if measured else f"hf, from {origin}, by the slower of host and GPU, to a factor of 2"
    return GenerationSpeed("hf", batch_size / step, HF_LOADING_SECONDS, "measured" if measured else "estimated", source)


def _gpu_step_seconds(gpu: GpuSpec, shape: ModelShape, rows: int) -> float:
    """Of one token for each row: the weights are unpacked once, and read and multiplied for each row."""
    weights = PLAIN.weight_bytes * shape.linear_parameters / (gpu.bandwidth * 1e9)
    return weights + 2 * shape.parameters * rows / (gpu.tflops * 1e12 * reached_share(gpu))
