"""run.json: what a run was made of, how far it is, and what it measured. Written at the start, at every log, at the end."""

from __future__ import annotations

import resource
import sys
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from finetune.budget.run_budget import RunBudget
from finetune.config.load import config_hash, to_dict
from finetune.config.schema import RunConfig
from finetune.data.prepared import Prepared
from finetune.data.prompts import PromptTemplate
from finetune.data.records import SPLITS
from finetune.estimate.memory_hf import GIB
from finetune.machine.hardware import detect
from finetune.models.device import Device
from finetune.models.load import parameter_counts
from finetune.run_folder import RunFolder, git_state, package_versions, utc_now
from finetune.runtime import distributed
from finetune.runtime.files import as_text
from finetune.training.callbacks import Throughput, history_rows
from finetune.training.snapshot import Saves
from finetune.training.step.plan import StepPlan
from finetune.training.step.runner import Stepper


def new_record(
    run: RunFolder, config: RunConfig, config_file: Path, data: Prepared, template: PromptTemplate
) -> dict[str, Any]:
    """The record of a run that begins: everything that is known before the first step."""
    commit, dirty = git_state()
    return {
        "status": "running",
        "run_id": uuid.uuid4().hex,
        "run_name": run.path.name,
        "started_at": utc_now(),
        "ended_at": None,
        "config_file": as_text(config_file),
        "config": to_dict(config),
        "config_hash": config_hash(config),
        "data": {
            "path": config.data.output_dir,
            "manifest_sha256": data.manifest_hash,
            "counts": {split: data.manifest["counts"][split] for split in SPLITS},
        },
        "git_commit": commit,
        "git_dirty": dirty,
        "prompt_version": template.identity(),
        "python": sys.version.split()[0],
        "packages": package_versions(),
        "seed": config.training.seed,
        "threads": torch.get_num_threads(),
        "attempts": 1,
        "wall_seconds": 0.0,
        "history": [],
    }


def describe_attempt(config: RunConfig, device: Device, model: torch.nn.Module) -> dict[str, Any]:
    """The machine and the model, which may be other ones after a resume."""
    hardware = replace(detect(), dtype=device.dtype_name).to_dict()
    return {"hardware": hardware, "model": _describe_model(config, model)}


def _describe_model(config: RunConfig, model: torch.nn.Module) -> dict[str, Any]:
    total, trainable = parameter_counts(model)
    quantization = config.quantization
    return {
        "name": config.model.name,
        "revision": config.model.revision,
        "parameters": total,
        "trainable_parameters": trainable,
        "quantization": quantization.bnb_4bit_quant_type if quantization.load_in_4bit else None,
    }


def describe_step(plan: StepPlan, stepper: Stepper | None = None) -> dict[str, Any]:
    """How an optimizer step is computed: as planned, and where memory did not suffice as the stepper has it now.

    questions and ranks (processes, each with its GPU): of the whole step; the rest for each rank. rows: None unless the config
    names a number; then micro_batch_tokens do not limit it. out_of_memory, bad_steps: counted in this attempt.
    """
    limits = stepper.limits if stepper else plan.limits
    return {
        "path": plan.path,
        "why": plan.why,
        "questions": plan.questions,
        "ranks": distributed.count(),
        "micro_batch_tokens": limits.tokens,
        "rows": stepper.rows if stepper else plan.rows,
        "kept_layers": limits.kept_layers if plan.path == "lean" else None,
        "cached_layers": limits.cached_layers if plan.path == "lean" else None,
        "checkpointing": plan.checkpointing,
        "out_of_memory": stepper.out_of_memory if stepper else 0,
        "bad_steps": stepper.watch.bad_steps if stepper else 0,
    }


def describe_memory(plan: StepPlan) -> dict[str, Any] | None:
    """GiB of the GPU of rank 0 at the peak of this attempt, estimated before it and measured in it; None on a CPU.

    What torch's allocator gave out and what it held; CUDA's own share is in neither.
    """
    if not torch.cuda.is_available():
        return None
    needed = plan.needed
    return {
        "predicted_peak_gib": needed and _gib(needed.peak),
        "predicted_reserved_gib": needed and _gib(needed.reserved),
        "measured_peak_gib": _gib(torch.cuda.max_memory_allocated()),
        "measured_reserved_gib": _gib(torch.cuda.max_memory_reserved()),
        "basis": "predicted: estimated before the first step for the largest micro-batch; measured: torch.cuda's peaks so far",
    }


def _gib(size: int) -> float:
    return round(size / GIB, 3)


def describe_progress(state: TrainerState) -> dict[str, Any]:
    """How far a run is, as its trainer's state or that of a checkpoint has it."""
    history = history_rows(state.log_history)
    losses = [row["loss"] for row in history if "loss" in row]
    validation = [row["eval_loss"] for row in history if "eval_loss" in row]
    return {
        "history": history,
        "steps": {"done": state.global_step, "planned": state.max_steps},
        "epochs": state.epoch,
        "tokens": {"trained": int(state.num_input_tokens_seen)},
        "losses": {
            "first": losses[0] if losses else None,
            "last": losses[-1] if losses else None,
            "eval_first": validation[0] if validation else None,
            "eval_last": validation[-1] if validation else None,
        },
    }


class RunRecorder:
    """Keeps a run's record and its file up to date during one attempt, which began at `began` (time.monotonic()).

    While the attempt trains the record is as far as the last logged step. Once it has ended, however that was, it is as far as
    the newest checkpoint: what was trained after that is lost. So it is at the start of an attempt, too, where the one before it
    was killed. newest: the checkpoint that this attempt goes on from. Of several ranks only the first writes the file.
    """

    def __init__(
        self, run: RunFolder, record: dict[str, Any], spending: RunBudget, began: float, newest: Path | None = None
    ) -> None:
        self.record, self.newest = record, newest
        self._run, self._spending = run, spending
        self._seconds_before = float(record.get("wall_seconds") or 0.0)  # of earlier attempts
        self._began = began
        self._reason: str | None = None
        self._lock = threading.RLock()  # the threads of the saver and of the meter write, too
        self._saved = _progress_at(newest) if newest and distributed.first() else None
        self.record.update(self._as_saved())

    def committed(self, checkpoint: Path) -> None:
        """There is a newer checkpoint. It may be one that was still being copied when the attempt ended."""
        progress = _progress_at(checkpoint)
        with self._lock:
            self.newest, self._saved = checkpoint, progress
            if self._reason:
                self._put(self._as_saved())

    def write(self, **values: Any) -> None:
        """Add values, bring time and dollars up to date, write run.json; nothing once the attempt has ended."""
        with self._lock:
            if self._reason is None:
                self._put(values)

    def _put(self, values: dict[str, Any]) -> None:
        seconds = time.monotonic() - self._began
        self.record.update(
            values, wall_seconds=round(self._seconds_before + seconds, 1), **self._spending.record(self._reason)
        )
        if distributed.first():
            self._run.write_record(self.record)

    def planned(self, plan: StepPlan) -> None:
        self.write(step=describe_step(plan), memory=describe_memory(plan))

    def progress(
        self, state: TrainerState, throughput: Throughput, plan: StepPlan, stepper: Stepper, saves: Saves
    ) -> None:
        """Write steps, tokens, speed, memory and losses as the trainer's state and its stepper have them."""
        self.write(
            **describe_progress(state),
            tokens_per_second=throughput.per_second() or self.record.get("tokens_per_second"),
            step=describe_step(plan, stepper),
            memory=describe_memory(plan),
            saves=saves.to_dict(throughput.wall_seconds()),
            peak_memory_gib=_higher(peak_memory(), self.record.get("peak_memory_gib")),
        )

    def close(self, status: str, **values: Any) -> None:
        """The attempt has ended. Called again, it adds values."""
        with self._lock:
            self._reason = status
            self._put(self._as_saved() | {"status": status, "ended_at": utc_now()} | values)

    def _as_saved(self) -> dict[str, Any]:
        """Of the record what has to agree with the newest checkpoint; nothing for a run that has neither."""
        saved = self._saved
        if saved is None:
            if "steps" not in self.record:
                return {}
            saved = describe_progress(TrainerState(max_steps=self.record["steps"]["planned"], epoch=0.0))
        saves = self.record.get("saves") or Saves().to_dict(0.0)
        step = saved["steps"]["done"] or None
        if saves["committed_step"] != step:
            saves = saves | {"committed_step": step, "commit_seconds": None, "bytes": None}
        return saved | {"saves": saves}


def _progress_at(checkpoint: Path) -> dict[str, Any]:
    return describe_progress(TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)))


def peak_memory() -> dict[str, Any]:
    """GiB, measured: what torch reserved on this GPU, or the resident peak of this process."""
    if torch.cuda.is_available():
        return {"value": round(torch.cuda.max_memory_reserved() / 2**30, 3), "kind": "cuda reserved"}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes on macOS, KiB on Linux
    return {"value": round(peak / unit, 3), "kind": "process resident"}


def _higher(peak: dict[str, Any], earlier: dict[str, Any] | None) -> dict[str, Any]:
    """The peak over all attempts, as far as they measured the same thing."""
    return earlier if earlier and earlier["kind"] == peak["kind"] and earlier["value"] > peak["value"] else peak
