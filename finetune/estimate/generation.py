"""How fast a GPU answers questions, in new tokens per second: measured on one H200, scaled to other GPUs and models.

Arithmetic without torch, for `finetune plan`. Measured on 2026-11-29 with Mistral-7B's shape and 64 new tokens an answer. vLLM
0.24: `finetune evaluate` on 1,034 questions, the tuned model, after 136 s of loading for the base model (dequantized weights
written to the disk, compilation, graphs) and 44 s for the tuned one. hf: benchmarks.generation on 192 prompts of 187 tokens, NF4
weights with the adapter beside them, 16 rows.

Scaled so:
- vLLM: a GPU is as much slower as the lower of its two ratios to the H200, that of the matrix rate and that of the bandwidth; a
  larger model is slower by its parameters, a smaller one is taken to be no faster, because the host schedules every token.
- hf: the host takes as long everywhere (0.6 ms a layer), unless the GPU needs longer to unpack the weights and to compute.
- float32: hf's weights take twice the time, and its matrix products FLOAT32_MATRIX times; for vLLM a model counts as one of
  FLOAT32_SIZE times the parameters. SmolLM2-135M made 13,664 tokens/s in float32 with vLLM on an H200.
- Loading takes as long everywhere.
Nothing of that was measured on another GPU: take it as right within a factor of 2 either way. Left out: prompts, which both
compute once where a schema repeats, and answers of very different lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from finetune.config.schema import FEW_QUESTIONS
from finetune.estimate.speed import PLAIN, reached_share
from finetune.machine.gpus import GPUS, GpuSpec
from finetune.models.answer_dtype import answer_dtype

if TYPE_CHECKING:
    from finetune.config.schema import RunConfig
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

FLOAT32_MATRIX = 16
"""The 16-bit matrix rate by the float32 rate of the same GPU: 4 (L4) to 16 (A100, H200), by NVIDIA's data sheets."""
FLOAT32_SIZE = 4
"""vLLM's 12,599 tokens/s are 182 TFLOP/s in 16 bits. An H200's peak in float32 is 67 TFLOP/s, of which 70% would be a quarter of
that. Estimated: no such model was measured in float32."""

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


def answering_speed(config: RunConfig, gpu: GpuSpec, shape: ModelShape, questions: int) -> GenerationSpeed:
    """How fast a GPU answers so many questions of a config, with the generator and in the dtype that it comes to there."""
    dtype, rows = answer_dtype(config, gpu.compute_capability, shape.parameters), config.evaluation.batch_size
    generator = generator_on(gpu, shape, config.evaluation.generator, dtype=dtype, questions=questions)
    return generation_speed(gpu, shape, generator=generator, batch_size=rows, dtype=dtype)


def generator_on(
    gpu: GpuSpec,
    shape: ModelShape,
    wanted: str = "auto",
    *,
    dtype: str = "bfloat16",
    questions: int = FEW_QUESTIONS,
) -> GeneratorName:
    """Which generator `evaluation.generator` comes to on a GPU. dtype: of the answers (models.answer_dtype). questions: that a
    model is asked, by default enough for vLLM to be worth its loading."""
    if wanted != "auto":
        return "vllm" if wanted == "vllm" else "hf"
    if questions < FEW_QUESTIONS:
        return "hf"
    fits = (4 if dtype == "float32" else 2) * shape.parameters <= VLLM_SHARE * gpu.memory_gib * GIB
    return "vllm" if gpu.compute_capability >= VLLM_FROM and fits else "hf"


def generation_speed(
    gpu: GpuSpec, shape: ModelShape, *, generator: GeneratorName, batch_size: int, dtype: str = "bfloat16"
) -> GenerationSpeed:
    """Speed of a generator on a GPU. batch_size: rows of a step, for hf. dtype: of the answers. ValueError if batch_size is not
    positive."""
    if batch_size < 1:
        raise ValueError(f"batch_size ({batch_size}) must be positive")
    exact = dtype == "float32"
    measured = gpu.name == H200.name and shape.parameters == PARAMETERS and not exact
    origin = "one H200 with Mistral-7B's shape on 2026-11-29"
    if generator == "vllm":
        ratio = min(
            gpu.tflops * reached_share(gpu) / (H200.tflops * reached_share(H200)), gpu.bandwidth / H200.bandwidth
        )
        parameters = shape.parameters * (FLOAT32_SIZE if exact else 1)
        speed = VLLM_TOKENS_PER_SECOND * min(1.0, ratio) * min(1.0, PARAMETERS / parameters)
        source = (
            f"vLLM on {origin}" if measured else f"vLLM, from {origin} by matrix rate or bandwidth, to a factor of 2"
        )
        return GenerationSpeed("vllm", speed, VLLM_LOADING_SECONDS, "measured" if measured else "estimated", source)
    step = max(HF_STEP_SECONDS * shape.layers / HF_LAYERS, _gpu_step_seconds(gpu, shape, batch_size, exact))
    measured = measured and batch_size == 16
    source = f"hf on {origin}" if measured else f"hf, from {origin}, by the slower of host and GPU, to a factor of 2"
    return GenerationSpeed("hf", batch_size / step, HF_LOADING_SECONDS, "measured" if measured else "estimated", source)


def _gpu_step_seconds(gpu: GpuSpec, shape: ModelShape, rows: int, exact: bool) -> float:
    """Of one token for each row: the weights are unpacked once, and read and multiplied for each row. exact: in float32."""
    weights = PLAIN.weight_bytes * shape.linear_parameters / (gpu.bandwidth * 1e9)
    products = 2 * shape.parameters * rows / (gpu.tflops * 1e12 * reached_share(gpu))
    return 2 * weights + FLOAT32_MATRIX * products if exact else weights + products
