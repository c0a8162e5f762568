"""run.json: a run's inputs, progress and measurements. Written at the start, at every log and at the end."""

from __future__ import annotations

import sys
import threading
import time
import uuid
from collections.abc import Callable
from copy import copy
from pathlib import Path

import torch
from transformers import TrainerState

from finetune.budget.run_budget import RunBudget
from finetune.config.load import config_hash, to_dict
from finetune.config.schema import RunConfig
from finetune.data.prepared import Prepared
from finetune.data.prompts import PromptTemplate
from finetune.data.records import SPLITS
from finetune.errors import UserError
from finetune.run_folder import RunFolder, git_state, package_versions, utc_now
from finetune.run_record import DataRecord, RunRecord, StopRecord
from finetune.runtime import distributed
from finetune.runtime.console import say
from finetune.runtime.files import as_text
from finetune.runtime.typed_json import update
from finetune.training.callbacks import Throughput
from finetune.training.record.measurements import (
    Progress,
    describe_hardware,
    describe_memory,
    describe_model,
    describe_step,
    higher,
    peak_memory,
    progress_at,
    progress_of,
)
from finetune.training.setup import Inputs, Parts
from finetune.training.staging import Saves
from finetune.training.step.plan import StepPlan
from finetune.training.step.runner import Stepper


def new_record(
    run: RunFolder, config: RunConfig, config_file: Path, data: Prepared, template: PromptTemplate
) -> RunRecord:
    """The record of a new run: everything known before the first step."""
    record = RunRecord()
    record.status = "running"
    record.run_id, record.run_name = uuid.uuid4().hex, run.path.name
    record.started_at, record.ended_at = utc_now(), None
    record.config_file = as_text(config_file)
    record.config, record.config_hash = to_dict(config), config_hash(config)
    counts: dict[str, int] = {split: data.manifest["counts"][split] for split in SPLITS}
    record.data = DataRecord(
        path=config.data.output_dir,
        manifest_sha256=data.manifest_hash,
        counts=counts,
        dialects=list(template.dialects),
    )
    record.git_commit, record.git_dirty = git_state()
    record.prompt_version = template.identity()
    record.python, record.packages = sys.version.split()[0], package_versions()
    record.seed, record.threads = config.training.seed, torch.get_num_threads()
    record.attempts, record.wall_seconds = 1, 0.0
    record.history = []
    return record


class RunRecorder:
    """Keeps a run's record and its file up to date during one attempt, which began at `began` (time.monotonic()).

    While the attempt trains, the record is at the last logged step. However the attempt ends, the record then goes back to the
    newest checkpoint, because later steps are lost; it does the same at the start of an attempt, in case the previous one was
    killed. Only rank 0 writes the file.

    A writer holds the lock until the file is written, which may take forever on a hanging bucket: a thread that has to end the
    process must not wait for these methods without a timeout.
    """

    def __init__(
        self,
        run: RunFolder,
        record: RunRecord,
        budget: RunBudget,
        began: float,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """check: called before the file is written; raises TakenOver if this attempt has lost the run."""
        self.record, self._check = record, check
        self.newest: Path | None = None
        self._run, self._budget = run, budget
        self._seconds_before = record.wall_seconds or 0.0  # of earlier attempts
        self._began = began
        self._reason: str | None = None
        self._lock = threading.RLock()  # the threads of the checkpoint writer and of the meter write too
        self._saved: Progress | None = None  # at the newest checkpoint, once it has been read

    def resume_from(self, checkpoint: Path | None) -> None:
        """Set the checkpoint that this attempt resumes from, the newest one. Raises UserError if it cannot be read."""
        with self._lock:
            self.newest = checkpoint
            if checkpoint and distributed.is_rank0():
                self._saved = progress_at(checkpoint)
            self._go_back_to_saved()

    def begin(self) -> None:
        def change(record: RunRecord) -> None:
            record.status, record.ended_at = "running", None

        self._write(change)

    def loaded(self, inputs: Inputs, parts: Parts) -> None:
        """Record the data, the machine and the model, which may differ after a resume."""
        data = copy(self.record.data) or DataRecord()
        data.path, data.manifest_sha256 = inputs.config.data.output_dir, inputs.data.manifest_hash
        data.counts = {split: inputs.data.manifest["counts"][split] for split in SPLITS}
        data.used = {"train": len(parts.train), "val": len(parts.validation)}
        hardware, model = describe_hardware(inputs.device), describe_model(inputs.config, parts.model)

        def change(record: RunRecord) -> None:
            record.data, record.hardware, record.model = data, hardware, model

        self._write(change)

    def planned(self, plan: StepPlan) -> None:
        def change(record: RunRecord) -> None:
            record.step, record.memory = describe_step(plan), describe_memory(plan)

        self._write(change)

    def progress(
        self, state: TrainerState, throughput: Throughput, plan: StepPlan, stepper: Stepper, saves: Saves
    ) -> None:
        """Record steps, tokens, throughput, memory and losses from the trainer's state and its stepper."""

        def change(record: RunRecord) -> None:
            progress_of(state).into(record)
            record.tokens_per_second = throughput.per_second() or record.tokens_per_second
            record.step, record.memory = describe_step(plan, stepper), describe_memory(plan)
            record.saves = saves.record(throughput.wall_seconds())
            record.peak_memory_gib = higher(peak_memory(), record.peak_memory_gib)

        self._write(change)

    def stopped(self, reason: str, detail: str, seconds: float) -> None:
        """seconds: from the request to stop to the checkpoint."""

        def change(record: RunRecord) -> None:
            record.stop = StopRecord(reason, detail, round(seconds, 2))

        self._write(change)

    def committed(self, checkpoint: Path) -> None:
        """Record a new checkpoint. It may be committed after the attempt has ended."""
        progress = _progress_or_warn(checkpoint, "will retry when the attempt ends")
        with self._lock:
            self.newest, self._saved = checkpoint, progress
            if self._reason:
                self._go_back_to_saved()
                self._put()

    def close(self, status: str, adapter_step: int | None = None) -> None:
        """End the attempt; later updates are ignored. A second call adds the step of the adapter."""
        with self._lock:
            self._reason = status
            if self.newest and self._saved is None and distributed.is_rank0():
                self._saved = _progress_or_warn(
                    self.newest, f"{self._run.run_json} is not up to date until the run resumes"
                )
            self._go_back_to_saved()
            self.record.status, self.record.ended_at = status, utc_now()
            if adapter_step is not None:
                self.record.adapter_step = adapter_step
            self._put()

    def _write(self, change: Callable[[RunRecord], None]) -> None:
        """Change the record, update time and cost, write run.json; does nothing once the attempt has ended."""
        with self._lock:
            if self._reason is None:
                change(self.record)
                self._put()

    def _put(self) -> None:
        self.record.wall_seconds = round(self._seconds_before + time.monotonic() - self._began, 1)
        update(self.record, self._budget.record(self._reason))
        if distributed.is_rank0():
            self._check()
            self._run.write_record(self.record)

    def _go_back_to_saved(self) -> None:
        """Reset progress and saves to the newest checkpoint; does nothing if that cannot be read, or if the run has neither
        checkpoint nor steps."""
        saved, record = self._saved, self.record
        if saved is None:
            if self.newest or record.steps is None:
                return
            saved = progress_of(TrainerState(max_steps=record.steps.planned or 0, epoch=0.0))
        saved.into(record)
        record.saves = copy(record.saves) or Saves().record(0.0)
        step = saved.steps.done or None
        if record.saves.committed_step != step:
            record.saves.committed_step, record.saves.commit_seconds, record.saves.bytes = step, None, None


def _progress_or_warn(checkpoint: Path, consequence: str) -> Progress | None:
    """The progress saved in the checkpoint; if it cannot be read, print one line with the consequence and return None."""
    try:
        return progress_at(checkpoint)
    except UserError as error:
        say(f"{error}; {consequence}")
        return None
