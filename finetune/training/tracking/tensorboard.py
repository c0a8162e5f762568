"""Logs a run to TensorBoard: one folder for all attempts, and each point once, even if an attempt was killed."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import rewrite_logs

EVENT_FILES = "events.out.tfevents.*"


def scalars(logs: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one log entry under transformers' names: train/loss, eval/loss. Every entry has the epoch; it is kept only
    in those with the loss, so that a step has one such point."""
    left_out = {"step"} if "loss" in logs else {"step", "epoch"}
    kept = {key: value for key, value in logs.items() if key not in left_out and isinstance(value, int | float)}
    return dict(rewrite_logs(kept))


def are_totals(logs: Mapping[str, Any]) -> bool:
    """Whether transformers logs the totals of a training that has ended, at a step that already has a row. Only these hold the
    mean loss; the run time so far is in every log."""
    return "train_loss" in logs


class TensorBoard(TrainerCallback):
    """Writes one folder for all attempts, with one file for each."""

    def __init__(self, folder: Path, resumed_step: int | None, say: Callable[[str], None]) -> None:
        self._folder, self._resumed, self._say = folder, resumed_step or 0, say
        self._file: EventFile | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        with self._disabled_on_error():
            first, lost = self._resumed + 1, _lost_rows(state.log_history, logged_points(self._folder))
            self._file = EventFile(self._folder, min([first, *(row["step"] for row in lost)]))
            for row in lost:
                self._file.add(scalars(row), row["step"])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self._file is not None and logs:
            with self._disabled_on_error():
                self._file.add(scalars(logs), state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        with self._disabled_on_error():
            if self._file is not None:
                self._file.close()

    @contextmanager
    def _disabled_on_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._say(
                f"TensorBoard: {self._folder}: {error.strerror or error}; the rest of this attempt is not logged there"
            )
            if self._file is not None:
                with suppress(OSError):
                    self._file.close()
            self._file = None


def _lost_rows(history: list[dict[str, Any]], existing: set[tuple[str, int]]) -> list[dict[str, Any]]:
    """The rows of the trainer's log, starting with the first one that lacks a point in TensorBoard's files. TensorBoard needs the
    points of a curve in order, so all later rows are written again too."""
    missing = [row["step"] for row in history if any((tag, row["step"]) not in existing for tag in scalars(row))]
    return [row for row in history if missing and row["step"] >= min(missing)]


def logged_points(folder: Path) -> set[tuple[str, int]]:
    """(tag, step) of each point that TensorBoard would show for the files in a folder; a truncated file counts up to its end."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import SessionLog  # type: ignore[import-untyped]

    points: set[tuple[str, int]] = set()
    for path in sorted(folder.glob(EVENT_FILES)):
        for event in LegacyEventFileLoader(str(path)).Load():
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                points = {point for point in points if point[1] < event.step}
            points.update((value.tag, event.step) for value in event.summary.value)
    return points


class EventFile:
    """A new TensorBoard event file, which discards all points of earlier files from `first_step` on.

    torch's SummaryWriter is not used, for two reasons: it names files by the clock alone, and TensorBoard reads them in order of
    their names, so a clock that is behind would reverse the attempts; and it writes in a thread that dies when the disk is full.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        """Raises OSError, as `add` and `close` do."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        stamps = [int(found[1]) for path in folder.glob(EVENT_FILES) if (found := re.search(r"\.(\d+)\.", path.name))]
        stamp = max([int(time.time()), *(stamp + 1 for stamp in stamps)])
        name = EVENT_FILES.replace("*", f"{stamp:010d}.{socket.gethostname()}.{os.getpid()}.0")
        self._records = RecordWriter((folder / name).open("xb"))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._write(Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, values: Mapping[str, float], step: int) -> None:
        points = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(self._event(wall_time=time.time(), step=step, summary=self._summary(value=points)))

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()

    def close(self) -> None:
        self._records.close()
