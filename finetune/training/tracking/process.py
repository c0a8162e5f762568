"""Starts the process that talks to a tracker (worker.py), and passes it messages without ever waiting for it."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from finetune.config.schema import TrackingSection
from finetune.runtime.files import load_json
from finetune.training.tracking.names import LABELS, project
from finetune.training.tracking.run_ids import tracked_id
from finetune.training.tracking.trackio_run import NAME_FILE
from finetune.training.tracking.wandb_run import wandb_run_id

WRITE_SECONDS = 2.0
"""The other process reads at once, whatever its tracker does."""
WORKER = "finetune.training.tracking.worker"


class TrackerProcess:
    """It outlives this process by a minute at most, to send the last rows; it is in a session of its own, so that Ctrl-C and what
    ends the run's processes at a preemption leave it that time."""

    def __init__(self, kind: str, say: Callable[[str], None]) -> None:
        """Raises OSError if it cannot be started."""
        self.kind, self._say = kind, say
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", WORKER, kind],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._writer, self._reader = (threading.Thread(target=task, daemon=True) for task in (self._write, self._read))
        self._writer.start()
        self._reader.start()

    def send(self, message: dict[str, Any]) -> None:
        self._queue.put(json.dumps(message))

    def close(self, seconds: float) -> bool:
        """No more messages. Waits for its end, as long as given; returns whether it has ended."""
        until = time.monotonic() + seconds
        self._queue.put(None)
        with suppress(subprocess.TimeoutExpired):
            self._writer.join(max(seconds, WRITE_SECONDS))  # what this process exits with is lost
            self._process.wait(max(0.0, until - time.monotonic()))
            self._reader.join(max(0.0, until - time.monotonic()))
        return self._process.returncode is not None

    def _write(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError, ValueError), self._process.stdin as pipe:
            while (line := self._queue.get()) is not None:
                pipe.write(line.encode() + b"\n")
                pipe.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._say(line.decode(errors="replace").rstrip())
        if self._process.wait() != 0:
            self._say(
                f"{LABELS[self.kind]}: its process has ended ({self._process.returncode}); the rest is not logged there"
            )


def opening(kind: str, tracking: TrackingSection, folder: Path, name: str, *, writes: bool) -> dict[str, Any]:
    """The first message: which run this is, and its config. writes: whether it logs steps; false: only results are added."""
    with suppress(OSError, ValueError):
        record = load_json(folder / "run.json")
        run_id = record.get("run_id") if isinstance(record, dict) else None
        return _opening(kind, tracking, folder, name, writes, str(run_id or ""))
    return _opening(kind, tracking, folder, name, writes, "")


def _opening(
    kind: str, tracking: TrackingSection, folder: Path, name: str, writes: bool, run_id: str
) -> dict[str, Any]:
    config: Any = {}
    with suppress(OSError, ValueError, yaml.YAMLError):
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return {
        "folder": str(folder.resolve()),
        "name": name,
        "run_name": _known_as(kind, folder, name),
        "project": tracking.wandb_project if kind == "wandb" else project(tracking),
        "run_id": run_id,
        "config": config if isinstance(config, dict) else {},
        "writes": writes,
    }


def _known_as(kind: str, folder: Path, name: str) -> str:
    """What the tracker itself finds a run by, where that is not kept by its own client."""
    if kind == "wandb":
        return wandb_run_id(folder, name)
    return tracked_id(folder, name, NAME_FILE) if kind == "trackio" else name
