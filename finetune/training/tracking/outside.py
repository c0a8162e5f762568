"""MLflow and Trackio as callbacks of the trainer."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from finetune.config.schema import TrackingSection
from finetune.training.tracking.names import LABELS
from finetune.training.tracking.process import TrackerProcess, opening
from finetune.training.tracking.step_rows import StepRows

LAST_WAIT_SECONDS = 10.0
"""A run that is done waits so long for the last rows; one that is interrupted does not wait, its machine may be about to go."""


class OutsideTracker(StepRows):
    """Sends the trainer's log, and what an earlier attempt may have lost of it, to a process that talks to the tracker."""

    def __init__(
        self, kind: str, tracking: TrackingSection, folder: Path, run_name: str, say: Callable[[str], None]
    ) -> None:
        super().__init__()
        self.kind, self._tracking, self._folder, self._name, self._say = kind, tracking, folder, run_name, say
        self._process: TrackerProcess | None = None

    @property
    def is_open(self) -> bool:
        return self._process is not None

    def open(self) -> None:
        try:
            self._process = TrackerProcess(self.kind, self._say)
        except OSError as error:
            self._say(f"{LABELS[self.kind]}: {error.strerror or error}; this attempt is not logged there")
            return
        self._process.send(opening(self.kind, self._tracking, self._folder, self._name, writes=True))

    def add_row(self, row: dict[str, float], step: int) -> None:
        if self._process is not None:
            self._process.send({"step": step, "values": row, "time": time.time()})

    def add_totals(self, totals: dict[str, float]) -> None:
        if self._process is not None:
            self._process.send({"totals": totals})

    def end(self, status: str) -> None:
        """status: as in run.json. Waits for the last rows, but not while a machine may be about to go."""
        self.send()
        if self._process is None:
            return
        self._process.send({"status": status})
        if not self._process.close(0.0 if status == "interrupted" else LAST_WAIT_SECONDS) and status != "interrupted":
            self._say(f"{LABELS[self.kind]}: its last rows are still being sent, for a minute at most")
        self._process = None
