"""The driver's side of a worker process of benchmarks.throughput: starts it, makes it run steps, ends it if it fails or hangs."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

Process = subprocess.Popen[str]


@dataclass
class Peer:
    """One variant. error: one line after it has failed; it then gets no further requests. info: its reply after loading.

    late: it reads the GPU's free memory when it loads, so the others load first. turns: one dict per turn with round, left_out
    (warm-up steps) and the worker's reply. The worker's stderr goes to `log`.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    out: Path
    late: bool = False
    error: str | None = None
    info: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, Any]] = field(default_factory=list)
    _process: Process | None = None
    _replies: queue.Queue[str | None] = field(default_factory=queue.Queue)

    @property
    def log(self) -> Path:
        return self.out / f"{self.name}.log"

    def start(self) -> None:
        """Does not wait, so that all peers load at the same time."""
        self.out.mkdir(parents=True, exist_ok=True)
        with self.log.open("w", encoding="utf-8") as log:
            try:
                self._process = subprocess.Popen(
                    self.command, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                    encoding="utf-8",
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                self.error = f"{self.command[0]}: {error.strerror or error}"
                return
        assert self._process.stdout is not None
        threading.Thread(target=_forward, args=(self._process.stdout, self._replies), daemon=True).start()

    def load(self, timeout: float) -> None:
        """Waits until the model is loaded."""
        reply = self._answer("ready", timeout)
        if reply is not None:
            self.info = reply["ready"]

    def turn(self, number: int, steps: int, left_out: int, timeout: float) -> None:
        """Runs `steps` optimizer steps, the first `left_out` of them for warm-up."""
        try:
            assert self._process is not None and self._process.stdin is not None
            self._process.stdin.write(json.dumps({"go": steps}) + "\n")
            self._process.stdin.flush()
        except OSError:  # it has died; the missing answer reports that
            pass
        reply = self._answer("steps", timeout)
        if reply is not None:
            self.turns.append({"round": number, "left_out": left_out} | reply)

    def end(self) -> None:
        """Ends the process and its children. A worker that waits for requests exits by itself; others are killed."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            assert process.stdin is not None
            process.stdin.close()
        except OSError:
            pass
        try:
            process.wait(timeout=0 if self.error else 10)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(process.pid, signal.SIGKILL)  # it has its own session, so no other process is affected
        except ProcessLookupError:
            pass
        process.wait()

    def _answer(self, key: str, timeout: float) -> dict[str, Any] | None:
        """The next reply with that key; None after an error, which is stored and ends the process."""
        if self.error is not None:
            return None
        deadline = time.monotonic() + timeout
        try:
            while (line := self._replies.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
                reply = _parsed(line)
                if key in reply:
                    return reply
                if "error" in reply:
                    self.error = str(reply["error"])
                    break
        except queue.Empty:
            self.error = f"no answer within {timeout:.0f} seconds, killed; see {self.log.name}"
        self.error = self.error or self._last_log_line()
        self.end()
        return None

    def _last_log_line(self) -> str:
        lines = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "ended without any output")


def _forward(pipe: IO[str], replies: queue.Queue[str | None]) -> None:
    for line in pipe:
        replies.put(line)
    replies.put(None)


def _parsed(line: str) -> dict[str, Any]:
    """The JSON object in a line; an empty dict for any other line, printed before the worker redirected its stdout."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
