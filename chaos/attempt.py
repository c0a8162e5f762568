"""One attempt of a run: starts a `finetune train` process, watches the files that it writes, and kills it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from finetune.errors import UserError
from finetune.run_record import read_record
from finetune.runtime.fault_injection import PLACES, VARIABLE

HEARTBEAT_SECONDS = 0.05
"""Interval of the heartbeats in the ledger; a kill between two of them loses less than this from the ledger."""
POLL_SECONDS = 0.005
PATIENCE_SECONDS = 180.0
"""An attempt that takes longer counts as hung."""
LEFT_OUT = ("FINETUNE_", "WANDB_", "SKYPILOT_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
"""Prefixes of environment variables that are not passed to an attempt."""

Action = tuple[int, Callable[[], object]]
"""(steps, function): the function is called once an attempt has completed that many steps."""
How = Literal["place", "step", "start", "notice"]


@dataclass(frozen=True)
class Kill:
    """When an attempt is killed.

    place: at one of the places of finetune/runtime/fault_injection.py, when it is reached for the `count`-th time.
    step: `delay` seconds after the attempt has completed `count` steps. start: `delay` seconds after the start.
    notice: after `count` steps SIGTERM, and SIGKILL `delay` seconds later if the process is still running.
    """

    how: How
    place: str = ""
    count: int = 1
    delay: float = 0.0

    def __post_init__(self) -> None:
        assert (self.how == "place") == (self.place in PLACES)

    @property
    def name(self) -> str:
        return {"place": self.place, "step": "any instant", "start": "start-up", "notice": "after SIGTERM"}[self.how]


@dataclass(frozen=True)
class EndedProcess:
    """What was observed of an attempt's process.

    seconds: from its start until it was killed, or else until its last write to run.json. teardown: seconds from then
    to the end of the process, in which Python shuts down. resumed: the step that it reported resuming from, 0 for the
    beginning, None if it died before. done: the last step that run.json counted in this attempt, None if it counted none.
    finished: it had recorded the run as done, so nothing is left to resume even if it was killed after that.
    """

    kill: Kill | None
    code: int
    seconds: float
    resumed: int | None
    done: int | None
    output: str
    teardown: float = 0.0
    hung: bool = False
    finished: bool = False

    @property
    def lived(self) -> float:
        """Seconds from its start to the end of the process."""
        return self.seconds + self.teardown

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL and not self.finished


@dataclass
class Machine:
    """Where attempts run; its temporary and home folders are deleted with it. prices: price table of a provisioned machine."""

    folder: Path
    prices: str | None = None
    python_path: Path = field(default_factory=lambda: Path(__file__).resolve().parents[1])

    def environment(self, kill: Kill | None) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(LEFT_OUT)}
        own = {
            "HOME": str(self._made("home")),
            "TMPDIR": str(self.temporary),
            "NETRC": str(self.folder / "no-netrc"),
            "PYTHONPATH": str(self.python_path),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",  # identical bytes are guaranteed on CPUs only
            "GCE_METADATA_HOST": "127.0.0.1:9",  # the discard port, where nothing listens
            "FINETUNE_HEARTBEAT_SECONDS": str(HEARTBEAT_SECONDS),
        }
        if self.prices:
            own["FINETUNE_PRICES"] = self.prices
        fault = {VARIABLE: f"{kill.place}:{kill.count}"} if kill and kill.how == "place" else {}
        return kept | own | fault

    @property
    def temporary(self) -> Path:
        return self._made("tmp")

    def _made(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return path


class Watch:
    """Follows run.json: which steps this attempt has completed so far."""

    def __init__(self, run: Path) -> None:
        self._file = run / "run.json"
        self._seen = self._stamp()
        self._before: int | None = None
        self._begun = self._moved = False
        self.done: int | None = None
        self.changed: float | None = None  # monotonic seconds

    def look(self) -> None:
        """An attempt first writes the step that it resumes from; only a later change of the number is progress."""
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen, self.changed = stamp, time.monotonic()
        now = steps_done(self._file.parent)
        if not self._begun:
            self._begun, self._before = True, now
        self._moved = self._moved or now != self._before
        if self._moved:
            self.done = now

    def _stamp(self) -> tuple[int, int] | None:
        try:
            found = self._file.stat()
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_ino


def steps_done(run: Path) -> int | None:
    """The completed steps in run.json; None if there is none yet."""
    try:
        steps = read_record(run / "run.json").steps
    except UserError:
        return None
    return steps.done if steps else None


def is_done(run: Path) -> bool:
    try:
        return read_record(run / "run.json").status == "done"
    except UserError:
        return False


def attempt(
    machine: Machine, arguments: list[str], run: Path, kill: Kill | None, log: Path, action: Action | None = None
) -> EndedProcess:
    """Start `finetune train ARGUMENTS`, kill it as `kill` says, and wait for its end. log: file for its output."""
    watch = Watch(run)
    command = [sys.executable, "-m", "finetune", "train", *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        began = time.monotonic()
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=machine.environment(kill),
            cwd=machine.folder,
            start_new_session=True,
        )
        try:
            hung = _until_gone(process, watch, kill, began, action)
        finally:
            _kill(process)
            process.wait()
        gone = time.monotonic()
    watch.look()
    finished = is_done(run)
    died = process.returncode < 0 and not finished
    ended = gone if died or watch.changed is None else min(gone, watch.changed)
    said = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    resumed = resumed_step(said, fresh="--resume" not in arguments)
    return EndedProcess(
        kill, process.returncode, ended - began, resumed, watch.done, said, gone - ended, hung, finished
    )


def _until_gone(
    process: subprocess.Popen[bytes], watch: Watch, kill: Kill | None, began: float, action: Action | None
) -> bool:
    """Returns whether the process was still running after PATIENCE_SECONDS."""
    kill_at = began + kill.delay if kill and kill.how == "start" else None
    waits = kill is not None and kill.how in ("step", "notice")
    while process.poll() is None:
        now = time.monotonic()
        if now - began > PATIENCE_SECONDS:
            return True
        watch.look()
        if action and watch.done is not None and watch.done >= action[0]:
            action[1]()
            action = None
        if kill and waits and watch.done is not None and watch.done >= kill.count:
            waits, kill_at = False, now + kill.delay
            if kill.how == "notice":
                process.send_signal(signal.SIGTERM)
        if kill_at is not None and now >= kill_at:
            return False
        time.sleep(POLL_SECONDS)
    return False


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its children, as when a machine disappears."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def resumed_step(said: str, *, fresh: bool) -> int | None:
    """The step that an attempt resumes from according to its output; 0 for the beginning, None if it does not say."""
    found = re.findall(r"resuming from \S*?step-(\d+)", said)
    if found:
        return int(found[-1])
    return 0 if fresh or "starting from the beginning" in said else None
