"""The state shared by the phases of one attempt of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetune.budget.lease import Lease
from finetune.budget.run_budget import RunBudget
from finetune.checkpoint.folders import read_manifest
from finetune.run_folder import RunFolder
from finetune.run_record import RunRecord
from finetune.runtime.stop_request import Stop
from finetune.training.record.recorder import RunRecorder
from finetune.training.setup import Inputs


@dataclass(frozen=True)
class Session:
    """The objects of one attempt of a run. resume_from: the checkpoint that it resumes from, None for a fresh start. stop_step:
    the step after which it pauses, None to train to the end."""

    run: RunFolder
    inputs: Inputs
    recorder: RunRecorder
    budget: RunBudget
    stop: Stop
    lease: Lease
    resume_from: Path | None = None
    stop_step: int | None = None

    @property
    def record(self) -> RunRecord:
        return self.recorder.record

    @property
    def resumed_step(self) -> int | None:
        return int(read_manifest(self.resume_from)["step"]) if self.resume_from else None
