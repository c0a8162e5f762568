"""How this run computes a step on the machine that it finds itself on: lean or stock layers, how much at a time, what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from finetune.config.load import questions_per_step
from finetune.config.schema import RunConfig
from finetune.errors import UserError
from finetune.estimate.fit import Limits, choose
from finetune.estimate.memory_fused import LeanLoad, lean_estimate
from finetune.estimate.memory_hf import CONTEXT_GIB, MemoryEstimate, Workload, estimate, largest_rows, workload_of
from finetune.machine.gpus import GpuSpec, known_gpu
from finetune.machine.hardware import GIB
from finetune.models.architectures import FAMILIES, ModelShape, shape_from_config
from finetune.models.device import Device
from finetune.models.fused.model import LeanModel, why_not
from finetune.training.step.packing import steps_of_epoch

if TYPE_CHECKING:
    from peft import PeftModel

CPU_TOKENS = 2048
"""Of a micro-batch on a CPU, where larger ones gain nothing."""
AMPERE = (8, 0)
USUAL = 0.95
"""Share of the optimizer steps that are to fit into one micro-batch; the rest is cut in two."""


@dataclass(frozen=True)
class StepPlan:
    """questions: of an optimizer step over all GPUs. rows: of a micro-batch where the config names a number. checkpointing: of
    the stock layers. needed: memory of the largest micro-batch, estimated; None on a CPU and for models of unknown shape."""

    path: Literal["lean", "stock"]
    questions: int
    rows: int | None
    limits: Limits
    checkpointing: bool
    needed: MemoryEstimate | None
    why: str

    def lean_model(self, model: PeftModel, device: Device) -> LeanModel:
        return LeanModel(model, device.dtype, cached_layers=self.limits.cached_layers)

    def __str__(self) -> str:
        size = f"{self.rows} questions" if self.rows else f"up to {self.limits.tokens:,} tokens"
        layers = (
            f"{self.limits.kept_layers} layers kept, {self.limits.cached_layers} with unpacked weights"
            if self.path == "lean"
            else f"gradient checkpointing {'on' if self.checkpointing else 'off'}"
        )
        memory = f"; {self.needed.reserved / GIB:.1f} GiB (estimated)" if self.needed else ""
        return f"{self.path} layers ({self.why}); {self.questions} questions a step, micro-batches of {size}; {layers}{memory}"


def plan_step(
    config: RunConfig, model: PeftModel, device: Device, lengths: Sequence[int], *, gpus: int = 1
) -> StepPlan:
    """The plan for this process's device. lengths: tokens of every training example. Raises UserError where the longest text
    does not fit, and for training.kernels=lean with a model that cannot."""
    training, longest = config.training, max(lengths)
    path, why = _path(config, model, device, longest)
    rows = None if training.per_device_train_batch_size == "auto" else training.per_device_train_batch_size
    questions = questions_per_step(training, gpus)
    shape, memory_gib = _shape(model), _memory_gib(device, training.max_memory_gib)
    load = replace(workload_of(config, device.dtype_name), accumulating=True)
    wanted = None if training.gradient_checkpointing == "auto" else training.gradient_checkpointing
    if path == "stock":
        limits, checkpointing, needed = _stock(shape, load, memory_gib, longest, rows, wanted)
        return StepPlan(path, questions, rows, limits, checkpointing, needed, why)
    assert shape is not None
    if memory_gib is None:
        kept = 0 if wanted else shape.layers
        limits = Limits(max(longest, CPU_TOKENS), kept, shape.layers)
        return StepPlan(path, questions, rows, limits, False, None, why)
    mine = -(-questions // gpus)
    gpu, usual = _gpu(device), _usual_step(lengths, mine, training.seed)
    texts = min(rows or mine, mine)
    limits = choose(
        shape, load, memory_gib, longest=longest, usual_step=usual, checkpointing=wanted, rows=rows and texts,
        ampere=gpu.compute_capability >= AMPERE, texts=texts, gpu=gpu,
    )  # fmt: skip
    worst = LeanLoad(
        replace(load, tokens=longest), limits.tokens, limits.kept_layers, limits.cached_layers,
        ampere=gpu.compute_capability >= AMPERE, texts=texts,
    )  # fmt: skip
    needed = lean_estimate(shape, worst)
    return StepPlan(path, questions, rows, limits, False, needed, why)


def worst_micro_batch(
    lengths: Sequence[int], limits: Limits, rows: int | None, *, questions: int, padded: bool
) -> list[int]:
    """Indices of the examples that make up the largest micro-batch there may be: the longest, and of the next longest as many
    as there is room for.

    lengths: tokens of every training example. rows: questions in a micro-batch, whatever it holds; None goes by limits.tokens.
    questions: of an optimizer step, which no micro-batch exceeds. padded: every row counts as long as the longest.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    if rows is not None:
        return order[: min(rows, questions)]
    if padded:
        return order[: min(questions, max(1, limits.tokens // lengths[order[0]]))]
    chosen, room = order[:1], limits.tokens - lengths[order[0]]
    for index in order[1:]:
        if len(chosen) < questions and lengths[index] <= room:
            chosen.append(index)
            room -= lengths[index]
    return chosen


def _path(config: RunConfig, model: PeftModel, device: Device, longest: int) -> tuple[Literal["lean", "stock"], str]:
    asked = config.training.kernels
    if asked == "stock":
        return "stock", "training.kernels"
    reason = why_not(model, longest)
    if asked == "lean":
        if reason:
            raise UserError(
                f"training.kernels: lean does not go with this model: {reason}; use auto",
                code="model.unsupported_kernels",
            )
        return "lean", "training.kernels"
    if reason:
        return "stock", reason
    if device.place.type == "cpu":
        return "stock", "on a CPU"
    return "lean", f"one of {', '.join(family.name for family in FAMILIES.values())} on a GPU"


def _stock(
    shape: ModelShape | None,
    load: Workload,
    memory_gib: float | None,
    longest: int,
    rows: int | None,
    wanted: bool | None,
) -> tuple[Limits, bool, MemoryEstimate | None]:
    """Padded micro-batches: as many rows of the longest text as fit, with checkpointing unless the config forbids it."""
    if memory_gib is None:
        return Limits(max(longest, CPU_TOKENS), 0), bool(wanted), None
    checkpointing = wanted is not False
    if shape is None:
        return Limits(4 * longest, 0), checkpointing, None
    load = replace(load, tokens=longest, checkpointing=checkpointing)
    fitting = rows or max(1, largest_rows(shape, load, memory_gib))
    return Limits(fitting * longest, 0), checkpointing, estimate(shape, replace(load, rows=fitting))


def _shape(model: PeftModel) -> ModelShape | None:
    return shape_from_config(model.get_base_model().config.to_dict(), Path("config.json"))


def _gpu(device: Device) -> GpuSpec:
    """The entry of gpus.GPUS that this device is, or is most like."""
    found = torch.cuda.get_device_properties(device.place)
    return known_gpu(found.name, (found.major, found.minor), found.total_memory / GIB)


def _memory_gib(device: Device, most: float | None) -> float | None:
    """What this process may have of the GPU, CUDA's own share included (GiB); None on a CPU."""
    if device.place.type == "cpu":
        return None
    free, _ = torch.cuda.mem_get_info(device.place)
    ours = (free + torch.cuda.memory_reserved(device.place)) / GIB + CONTEXT_GIB
    return min(ours, most) if most else ours


def _usual_step(lengths: Sequence[int], questions: int, seed: int) -> int:
    """Tokens that all but a few of the first epoch's steps stay below."""
    steps = steps_of_epoch(lengths, questions=questions, seed=seed, epoch=0, by_length=False)
    sizes = sorted(sum(lengths[index] for index in step) for step in steps)
    return sizes[min(len(sizes) - 1, int(USUAL * len(sizes)))]
