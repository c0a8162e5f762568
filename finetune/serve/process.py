"""A backend as a process of its own, under its guard: see `Running`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from finetune.errors import LONGEST_MESSAGE, shortened
from finetune.evaluation.generators.vllm_process import end_of, reason_in
from finetune.runtime.console import one_line
from finetune.serve.backends.base import Address

GUARD = Path(__file__).with_name("guard.py")
ROOT = Path(__file__).resolve().parents[2]
STOP_SECONDS = 30.0
_STAMP = re.compile(r"^(?:\(\w+ pid=\d+\) )?(?:ERROR|WARNING|INFO) \d[\d-]* [\d:]+ \[[^\]]*\] ")
"""Before each line of vLLM's log."""
_CONSEQUENCE = re.compile(r"EngineDeadError|Engine core initialization failed|See root cause above")
"""Errors that vLLM reports because another one came before."""


class GuardedProgram:
    """words: the program and its arguments. socket: on which it will listen. log: a file for what it
    prints, in the server's own folder, which is deleted with the server."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], *, socket: Path, log: Path) -> None:
        self._socket, self._log = socket, log
        with log.open("wb") as file:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", str(GUARD), str(log.parent), *words],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C is for the server, which then ends the backend
            )

    @property
    def code(self) -> int | None:
        return self._guard.poll()

    @property
    def address(self) -> Address | None:
        return Address("http://backend", self._socket) if self._socket.exists() else None

    def last_words(self) -> str:
        lines = [_STAMP.sub("", line) for line in end_of(self._log).splitlines()]
        reason = reason_in("\n".join(line for line in lines if not _CONSEQUENCE.search(line)))
        return one_line(shortened(reason.strip().removeprefix("finetune: "), LONGEST_MESSAGE))

    def stop(self) -> None:
        assert self._guard.stdin is not None
        with suppress(OSError):
            self._guard.stdin.close()
        try:
            self._guard.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()


def worker_environment() -> dict[str, str]:
    """For a small program of ours that reads text of clients: nothing of the user's."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LD_LIBRARY_PATH", "HOME", "LANG")}
    return with_package(kept | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")})


def backend_environment(hidden: str | None) -> dict[str, str]:
    """For a backend that is a module of ours: that of the server, without the variable `hidden`, which holds its key."""
    return with_package({name: value for name, value in os.environ.items() if name != hidden})


def with_package(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a program that is a module of ours, wherever it starts."""
    path = environment.get("PYTHONPATH", "")
    return {
        **environment,
        "PYTHONPATH": os.pathsep.join(part for part in (str(ROOT), path) if part),
        "PYTHONUNBUFFERED": "1",
    }
