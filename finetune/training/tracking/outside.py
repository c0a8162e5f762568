"""MLflow and Trackio as callbacks of the trainer."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.config.schema import TrackingSection
from finetune.training.tracking.names import LABELS
from finetune.training.tracking.process import TrackerProcess, opening
from finetune.training.tracking.tensorboard import are_totals, scalars

LAST_WAIT_SECONDS = 10.0
"""A run that is done waits so long for the last rows; one that is interrupted does not wait, its machine may be about to go."""


class OutsideTracker(TrainerCallback):
    """Sends the trainer's log, and what an earlier attempt may have lost of it, to a process that talks to the tracker.

    All logs of a step are one row, sent once it is complete: when the next step begins, before a checkpoint, or at the end.
    """

    def __init__(
        self, kind: str, tracking: TrackingSection, folder: Path, run_name: str, say: Callable[[str], None]
    ) -> None:
        self.kind, self._tracking, self._folder, self._name, self._say = kind, tracking, folder, run_name, say
        self._process: TrackerProcess | None = None
        self._row: dict[str, float] = {}
        self._row_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        try:
            self._process = TrackerProcess(self.kind, self._say)
        except OSError as error:
            self._say(f"{LABELS[self.kind]}: {error.strerror or error}; this attempt is not logged there")
            return
        self._process.send(opening(self.kind, self._tracking, self._folder, self._name, writes=True))
        for row in state.log_history:
            self._put(scalars(row), row["step"])

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._send()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._send()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self._process is None or not logs:
            return
        if are_totals(logs):
            self._process.send({"totals": scalars(logs)})
            return
        self._put(scalars(logs), state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._send()

    def end(self, status: str) -> None:
        """status: as in run.json. Waits for the last rows, but not while a machine may be about to go."""
        self._send()
        if self._process is None:
            return
        self._process.send({"status": status})
        if not self._process.close(0.0 if status == "interrupted" else LAST_WAIT_SECONDS) and status != "interrupted":
            self._say(f"{LABELS[self.kind]}: its last rows are still being sent, for a minute at most")
        self._process = None

    def _put(self, values: dict[str, float], step: int) -> None:
        if step != self._row_step:
            self._send()
        self._row, self._row_step = self._row | values, step

    def _send(self) -> None:
        row, self._row = self._row, {}
        if row and self._process is not None:
            self._process.send({"step": self._row_step, "values": row, "time": time.time()})
