"""How this run computes a step on this machine: the backend, the size of micro-batches, and which layers recompute their
activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from finetune.config.load import examples_per_step
from finetune.config.schema import RunConfig
from finetune.errors import UserError
from finetune.estimate.fit import MicroBatchConfig, autotune
from finetune.estimate.memory_fused import FusedLoad, fused_estimate
from finetune.estimate.memory_hf import (
    CONTEXT_GIB,
    MemoryEstimate,
    Workload,
    estimate,
    largest_micro_batch,
    workload_of,
)
from finetune.machine.gpus import GpuSpec, known_gpu
from finetune.machine.hardware import GIB
from finetune.models.architectures import FAMILIES, ModelShape, shape_from_config
from finetune.models.device import Device
from finetune.models.fused.model import FusedModel, unsupported_reason
from finetune.training.step.packing import steps_of_epoch

if TYPE_CHECKING:
    from peft import PeftModel

CPU_TOKENS = 2048
"""Tokens of a micro-batch on a CPU, where larger ones are no faster."""
AMPERE = (8, 0)
LAYERS = {"fused": "fused", "hf": "Hugging Face"}
USUAL = 0.95
"""Fraction of optimizer steps that should fit into one micro-batch; the others are split in two."""


@dataclass(frozen=True)
class StepPlan:
    """batch_size: examples per optimizer step over all GPUs. micro_batch_size: in examples, None unless the config sets it.
    checkpointing: of the Hugging Face layers. needed: estimated memory of the largest micro-batch; None on a CPU and for models
    of unknown shape."""

    backend: Literal["fused", "hf"]
    batch_size: int
    micro_batch_size: int | None
    limits: MicroBatchConfig
    checkpointing: bool
    needed: MemoryEstimate | None
    why: str

    def fused_model(self, model: PeftModel, device: Device) -> FusedModel:
        return FusedModel(model, device.dtype, dequantized_layers=self.limits.dequantized_layers)

    def __str__(self) -> str:
        size = f"{self.micro_batch_size} examples" if self.micro_batch_size else f"up to {self.limits.tokens:,} tokens"
        layers = (
            f"{self.limits.uncheckpointed_layers} layers not recomputed, {self.limits.dequantized_layers} dequantized"
            if self.backend == "fused"
            else f"gradient checkpointing {'on' if self.checkpointing else 'off'}"
        )
        memory = f"; {self.needed.reserved / GIB:.1f} GiB (estimated)" if self.needed else ""
        step = f"{self.batch_size} examples a step, micro-batches of {size}"
        return f"{LAYERS[self.backend]} layers ({self.why}); {step}; {layers}{memory}"


def plan_step(
    config: RunConfig, model: PeftModel, device: Device, lengths: Sequence[int], *, gpus: int = 1
) -> StepPlan:
    """The plan for this process's device. lengths: tokens of every training example. Raises UserError if the longest text does
    not fit, and for training.kernels=fused with a model that the fused backend does not support."""
    training, longest = config.training, max(lengths)
    backend, why = _backend(config, model, device, longest)
    micro_batch_size = None if training.per_device_train_batch_size == "auto" else training.per_device_train_batch_size
    batch_size = examples_per_step(training, gpus)
    shape, memory_gib = _shape(model), _memory_gib(device, training.max_memory_gib)
    load = replace(workload_of(config, device.dtype_name), accumulating=True)
    requested = None if training.gradient_checkpointing == "auto" else training.gradient_checkpointing
    if backend == "hf":
        limits, checkpointing, needed = _hf(shape, load, memory_gib, longest, micro_batch_size, requested)
        return StepPlan(backend, batch_size, micro_batch_size, limits, checkpointing, needed, why)
    assert shape is not None
    if memory_gib is None:
        saved = 0 if requested else shape.layers
        limits = MicroBatchConfig(max(longest, CPU_TOKENS), saved, shape.layers)
        return StepPlan(backend, batch_size, micro_batch_size, limits, False, None, why)
    mine = -(-batch_size // gpus)
    gpu, usual = _gpu(device), _usual_step(lengths, mine, training.seed)
    texts = min(micro_batch_size or mine, mine)
    limits = autotune(
        shape, load, memory_gib, longest=longest, usual_step=usual, checkpointing=requested,
        micro_batch_size=micro_batch_size and texts, ampere=gpu.compute_capability >= AMPERE, texts=texts, gpu=gpu,
    )  # fmt: skip
    worst = FusedLoad(
        replace(load, tokens=longest), limits.tokens, limits.uncheckpointed_layers, limits.dequantized_layers,
        ampere=gpu.compute_capability >= AMPERE, texts=texts,
    )  # fmt: skip
    needed = fused_estimate(shape, worst)
    return StepPlan(backend, batch_size, micro_batch_size, limits, False, needed, why)


def worst_micro_batch(
    lengths: Sequence[int], limits: MicroBatchConfig, micro_batch_size: int | None, *, batch_size: int, padded: bool
) -> list[int]:
    """Indices of the examples of the largest possible micro-batch: the longest one, and as many of the next longest as fit.

    lengths: tokens of every training example. micro_batch_size: a fixed number of examples; None applies limits.tokens instead.
    batch_size: examples per optimizer step, an upper bound. padded: every row counts as many tokens as the longest.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    if micro_batch_size is not None:
        return order[: min(micro_batch_size, batch_size)]
    if padded:
        return order[: min(batch_size, max(1, limits.tokens // lengths[order[0]]))]
    chosen, room = order[:1], limits.tokens - lengths[order[0]]
    for index in order[1:]:
        if len(chosen) < batch_size and lengths[index] <= room:
            chosen.append(index)
            room -= lengths[index]
    return chosen


def _backend(config: RunConfig, model: PeftModel, device: Device, longest: int) -> tuple[Literal["fused", "hf"], str]:
    requested = config.training.kernels
    if requested == "hf":
        return "hf", "training.kernels"
    reason = unsupported_reason(model, longest)
    if requested == "fused":
        if reason:
            raise UserError(
                f"training.kernels: fused does not support this model: {reason}; use auto",
                code="model.unsupported_kernels",
            )
        return "fused", "training.kernels"
    if reason:
        return "hf", reason
    if device.place.type == "cpu":
        return "hf", "on a CPU"
    return "fused", f"one of {', '.join(family.name for family in FAMILIES.values())} on a GPU"


def _hf(
    shape: ModelShape | None,
    load: Workload,
    memory_gib: float | None,
    longest: int,
    micro_batch_size: int | None,
    requested: bool | None,
) -> tuple[MicroBatchConfig, bool, MemoryEstimate | None]:
    """Padded micro-batches: as many rows of the longest text as fit, with checkpointing unless the config disables it."""
    if memory_gib is None:
        return MicroBatchConfig(max(longest, CPU_TOKENS), 0), bool(requested), None
    checkpointing = requested is not False
    if shape is None:
        return MicroBatchConfig(4 * longest, 0), checkpointing, None
    load = replace(load, tokens=longest, checkpointing=checkpointing)
    fitting = micro_batch_size or max(1, largest_micro_batch(shape, load, memory_gib))
    return (
        MicroBatchConfig(fitting * longest, 0),
        checkpointing,
        estimate(shape, replace(load, micro_batch_size=fitting)),
    )


def _shape(model: PeftModel) -> ModelShape | None:
    return shape_from_config(model.get_base_model().config.to_dict(), Path("config.json"))


def _gpu(device: Device) -> GpuSpec:
    """The entry of gpus.GPUS for this device, or the most similar one."""
    found = torch.cuda.get_device_properties(device.place)
    return known_gpu(found.name, (found.major, found.minor), found.total_memory / GIB)


def _memory_gib(device: Device, most: float | None) -> float | None:
    """GPU memory available to this process in GiB, including its CUDA context; None on a CPU."""
    if device.place.type == "cpu":
        return None
    free, _ = torch.cuda.mem_get_info(device.place)
    ours = (free + torch.cuda.memory_reserved(device.place)) / GIB + CONTEXT_GIB
    return min(ours, most) if most else ours


def _usual_step(lengths: Sequence[int], batch_size: int, seed: int) -> int:
    """Tokens per step: the USUAL quantile over the steps of the first epoch."""
    steps = steps_of_epoch(lengths, batch_size=batch_size, seed=seed, epoch=0, by_length=False)
    sizes = sorted(sum(lengths[index] for index in step) for step in steps)
    return sizes[min(len(sizes) - 1, int(USUAL * len(sizes)))]
