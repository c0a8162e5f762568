"""Runs `finetune train` for a trial, as a program of its own: on this computer, without SkyPilot.

The program gets no signal of the terminal. The first Ctrl-C or SIGTERM is passed on once, so that it saves and ends; a second one
kills it. If this process is killed, the system sends the program a SIGTERM.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

from finetune.stage_end.tell import WITHIN

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Ended:
    """code: exit code as in a shell. over: at which limit of this machine it was stopped; "" if at none."""

    code: int
    over: str = ""


@dataclass
class LocalTrainer:
    """Call it with a run's name and the words after `finetune train`. interrupted: whether this process was asked to end."""

    interrupted: bool = False
    _program: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def __call__(self, name: str, words: Sequence[str]) -> Ended:
        if self.interrupted:
            return Ended(128 + signal.SIGTERM)
        command = [sys.executable, "-m", "finetune.sweep.programs", str(os.getpid()), "train", *words]
        self._program = subprocess.Popen(command, env=os.environ | {WITHIN: "1"}, start_new_session=True)
        self._pass_on()  # what came while it was starting
        code = self._program.wait()
        self._program = None
        return Ended(code if code >= 0 else 128 - code)

    def _pass_on(self) -> None:
        if self.interrupted and self._program is not None:
            self._program.terminate()

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        earlier = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again, self.interrupted = self.interrupted, True
        if self._program is not None:
            (self._program.kill if again else self._program.terminate)()


def become(parent: int, words: Sequence[str]) -> None:
    """Become `finetune WORDS`, which ends with the process `parent`. Never returns."""
    with suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)  # an exec keeps it
    if os.getppid() != parent:  # it has ended before that
        raise SystemExit(128 + signal.SIGTERM)
    os.execv(sys.executable, [sys.executable, "-m", "finetune", *words])


if __name__ == "__main__":
    become(int(sys.argv[1]), sys.argv[2:])
