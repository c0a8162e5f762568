"""The process that logs a run to MLflow or Trackio, its score to W&B: `python -m finetune.training.tracking.worker KIND`.

It reads one JSON object a line from stdin: first the opening, then rows, totals, results and the end. On stdout it writes lines
for the user. Being a process of its own, it can wait for a server, fail or be killed, and training does not notice. What cannot
be sent is kept and tried again; at most LAST_SECONDS after the end of stdin it gives up.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, TextIO

from finetune.runtime.credentials import without_secrets
from finetune.training.tracking.names import LABELS

Message = dict[str, Any]

LAST_SECONDS = 60.0
LONGEST_WAIT_SECONDS = 30.0
LOOK_SECONDS = 1.0
LONGEST_REASON = 300
"""Characters of a library's message; MLflow's hold whole responses."""


class Tracker(Protocol):
    """One run of a tracker, open. What it raises is reported, and the same messages are given to it again."""

    def deliver(self, messages: list[Message]) -> None: ...

    def close(self) -> None: ...


def opener(kind: str) -> Callable[[Message], Tracker]:
    if kind == "mlflow":
        from finetune.training.tracking.mlflow_run import MLflowRun

        return MLflowRun
    if kind == "wandb":
        from finetune.training.tracking.wandb_run import WandbResults

        return WandbResults
    from finetune.training.tracking.trackio_run import TrackioRun

    return TrackioRun


class Inbox:
    """What has been read from stdin. Ended: at its end, or once the process that writes it is gone, which another child of that
    process may hide by holding the pipe."""

    def __init__(self, lines: TextIO) -> None:
        self._queue: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._parent = os.getppid()
        self.ended_at: float | None = None
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()

    def _read(self, lines: TextIO) -> None:
        for line in lines:
            with suppress(ValueError):  # the last line of a process that was killed
                self._queue.put(json.loads(line))
        self._queue.put(None)

    def take(self, seconds: float) -> list[Message]:
        """All messages that are there, and the next one if it comes within the seconds."""
        until, found = time.monotonic() + seconds, list[Message]()
        while True:
            left = until - time.monotonic()
            try:
                message = (
                    self._queue.get(timeout=min(LOOK_SECONDS, max(left, 0.0))) if not found else self._queue.get(False)
                )
            except queue.Empty:
                if os.getppid() != self._parent:
                    self._end()
                if found or self.ended_at is not None or left <= 0:
                    return found
                continue
            if message is None:
                self._end()
                return found
            found.append(message)

    def _end(self) -> None:
        self.ended_at = self.ended_at or time.monotonic()


class Said:
    """Lines for the user: each kind of trouble once, with nothing secret in it."""

    def __init__(self, kind: str, out: TextIO) -> None:
        self._label, self._out, self._said = LABELS[kind], out, set[str]()

    def once(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            with suppress(OSError, ValueError):  # the run has ended
                self._out.write(f"{self._label}: {' '.join(without_secrets(text).split())}\n")
                self._out.flush()


def reason(error: Exception) -> str:
    text = " ".join(without_secrets(str(error)).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."


def work(open_tracker: Callable[[Message], Tracker], inbox: Inbox, said: Said) -> None:
    """Deliver everything that comes in, in order, until the end of it."""
    waiting: list[Message] = []
    tracker: Tracker | None = None
    opening: Message = {}
    wait = 0.0
    while True:
        waiting += inbox.take(wait or 3600.0)
        if not opening and waiting:
            opening = waiting.pop(0)
        if opening and (waiting or tracker is None):
            try:
                tracker = tracker or open_tracker(opening)
                tracker.deliver(waiting)
            except Exception as error:  # any error of the library, its server or the disk
                said.once("trouble", f"{reason(error)}; training goes on, and what is not logged is tried again")
                wait = min(max(1.0, 2 * wait), LONGEST_WAIT_SECONDS)
                if inbox.ended_at is not None:
                    wait = min(wait, 5.0)
                    time.sleep(wait)  # nothing more comes in, so `take` does not wait
                    if time.monotonic() > inbox.ended_at + LAST_SECONDS:
                        said.once("lost", "it could not be reached until the end; the last steps are missing there")
                        return
                continue
            if wait:
                said.once("again", "logged again, from where it stopped")
            wait, waiting = 0.0, []
        if inbox.ended_at is not None:
            if tracker is not None:
                with suppress(Exception):
                    tracker.close()
            return


def main() -> None:
    kind = sys.argv[1]
    said = Said(kind, os.fdopen(os.dup(1), "w", encoding="utf-8"))
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # whatever the libraries print
        os.dup2(nothing, stream)
    warnings.simplefilter("ignore")
    if kind == "trackio":  # it warns of errors instead of raising them
        warnings.showwarning = lambda message, *_: said.once(
            "trouble", f"{reason(Exception(str(message)))}; training goes on"
        )
        warnings.filterwarnings("always", message=r"(\* )?(?i:trackio)|Could not")
    work(opener(kind), Inbox(os.fdopen(os.dup(0), encoding="utf-8")), said)


if __name__ == "__main__":
    main()
