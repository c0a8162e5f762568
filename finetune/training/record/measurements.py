"""What run.json records about an attempt: its machine, model, steps, memory and progress."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from finetune.config.schema import RunConfig
from finetune.errors import UserError, first_line
from finetune.machine.hardware import GIB, detect
from finetune.models.device import Device
from finetune.models.load import parameter_counts
from finetune.run_record import (
    HardwareRecord,
    LossesRecord,
    MemoryRecord,
    ModelRecord,
    PeakMemory,
    Row,
    RunRecord,
    StepCount,
    StepRecord,
    TokenCount,
)
from finetune.runtime import distributed
from finetune.runtime.typed_json import decode
from finetune.training.callbacks import history_rows
from finetune.training.saved_files import read_progress_state
from finetune.training.step.plan import StepPlan
from finetune.training.step.runner import Stepper


def describe_hardware(device: Device) -> HardwareRecord:
    return decode(HardwareRecord, replace(detect(), dtype=device.dtype_name).to_dict())


def describe_model(config: RunConfig, model: torch.nn.Module) -> ModelRecord:
    total, trainable = parameter_counts(model)
    quantization = config.quantization
    return ModelRecord(
        name=config.model.name,
        revision=config.model.revision,
        parameters=total,
        trainable_parameters=trainable,
        quantization=quantization.bnb_4bit_quant_type if quantization.load_in_4bit else None,
    )


def describe_step(plan: StepPlan, stepper: Stepper | None = None) -> StepRecord:
    """How an optimizer step is computed: as planned, or as the stepper's OOM fallback has changed it."""
    limits = stepper.limits if stepper else plan.limits
    return StepRecord(
        backend=plan.backend,
        why=plan.why,
        batch_size=plan.batch_size,
        ranks=distributed.world_size(),
        micro_batch_tokens=limits.tokens,
        micro_batch_size=stepper.micro_batch_size if stepper else plan.micro_batch_size,
        uncheckpointed_layers=limits.uncheckpointed_layers if plan.backend == "fused" else None,
        dequantized_layers=limits.dequantized_layers if plan.backend == "fused" else None,
        checkpointing=plan.checkpointing,
        out_of_memory=stepper.out_of_memory if stepper else 0,
        bad_steps=stepper.watch.bad_steps if stepper else 0,
    )


def describe_memory(plan: StepPlan) -> MemoryRecord | None:
    """Peak memory of this attempt on the GPU of rank 0, in GiB: estimated beforehand and measured; None on a CPU.

    Memory that torch's allocator handed out (peak) and held (reserved); the CUDA context is in neither.
    """
    if not torch.cuda.is_available():
        return None
    needed = plan.needed
    return MemoryRecord(
        predicted_peak_gib=_gib(needed.peak) if needed else None,
        predicted_reserved_gib=_gib(needed.reserved) if needed else None,
        measured_peak_gib=_gib(torch.cuda.max_memory_allocated()),
        measured_reserved_gib=_gib(torch.cuda.max_memory_reserved()),
        basis="predicted: estimated before the first step for the largest micro-batch; measured: torch.cuda's peaks so far",
    )


def _gib(size: int) -> float:
    return round(size / GIB, 3)


@dataclass(frozen=True)
class Progress:
    """The progress of a run: the part of its record that must agree with its newest checkpoint."""

    history: Sequence[Row]
    steps: StepCount
    epochs: float | None
    tokens: TokenCount
    losses: LossesRecord

    def into(self, record: RunRecord) -> None:
        record.history, record.steps, record.epochs = self.history, self.steps, self.epochs
        record.tokens, record.losses = self.tokens, self.losses


def progress_of(state: TrainerState) -> Progress:
    """The progress in a trainer's state, of a running trainer or from a checkpoint."""
    history = history_rows(state.log_history)
    losses = [row["loss"] for row in history if "loss" in row]
    validation = [row["eval_loss"] for row in history if "eval_loss" in row]
    return Progress(
        history,
        StepCount(state.global_step, state.max_steps),
        state.epoch,
        TokenCount(trained=int(state.num_input_tokens_seen)),
        LossesRecord(
            first=losses[0] if losses else None,
            last=losses[-1] if losses else None,
            eval_first=validation[0] if validation else None,
            eval_last=validation[-1] if validation else None,
        ),
    )


def progress_at(checkpoint: Path) -> Progress:
    """The progress saved in a checkpoint. Raises UserError if its trainer state cannot be read."""
    file = checkpoint / TRAINER_STATE_NAME
    try:
        state = read_progress_state(file)
        step = checkpoint.name.rpartition("-")[2]
        if step.isdecimal() and int(step) != state.global_step:
            raise ValueError(f"it is of step {state.global_step}")
        return progress_of(TrainerState.load_from_json(str(file)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        why = error.strerror if isinstance(error, OSError) else first_line(error)
        raise UserError(
            f"{file}: cannot read the progress of the run ({why})", code="checkpoint.unreadable_state"
        ) from error


def peak_memory() -> PeakMemory:
    """Measured, in GiB: what torch reserved on this GPU, or without one the resident peak of this process."""
    if torch.cuda.is_available():
        return PeakMemory(round(torch.cuda.max_memory_reserved() / GIB, 3), "cuda reserved")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = GIB if sys.platform == "darwin" else 2**20  # bytes on macOS, KiB on Linux
    return PeakMemory(round(peak / unit, 3), "process resident")


def higher(peak: PeakMemory, earlier: PeakMemory | None) -> PeakMemory:
    """The higher of two peaks if they are of the same kind, else the new one."""
    return earlier if earlier and earlier.kind == peak.kind and earlier.value > peak.value else peak
