"""The backend as a process of its own, under its guard: start, look whether it lives, end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from finetune.runtime.console import one_line, visible
from finetune.serve.backends.base import Command

GUARD = Path(__file__).with_name("guard.py")
STOP_SECONDS = 30.0
LOG_TAIL_BYTES = 64 << 10
_NOISE = re.compile(r"^\s*(?:File \"|Traceback|\^|~|at |\[rank\d\]: *(?:File|Traceback))")


class BackendProcess:
    """log: where its output goes. key_variable: a variable of the environment that the backend is not given."""

    def __init__(self, command: Command, log: Path, key_variable: str | None = None) -> None:
        self.log = log
        environment = {name: value for name, value in os.environ.items() if name != key_variable}
        environment |= command.environment
        with log.open("wb") as file:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", str(GUARD), *command.words],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the server, which then ends the backend
            )

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._guard.poll()

    def stop(self) -> None:
        """End the backend with all that it has started."""
        assert self._guard.stdin is not None
        with suppress(OSError):
            self._guard.stdin.close()
        try:
            self._guard.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()

    def last_words(self) -> str:
        """The last line of its output that says something; "" if there is none."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - LOG_TAIL_BYTES))
                lines = file.read().decode("utf-8", "replace").splitlines()
        except OSError:
            return ""
        told = [line.strip() for line in lines if line.strip() and not _NOISE.match(line)]
        errors = [line for line in told if re.search(r"\b\w*(?:Error|Exception)\b|^finetune: ", line)]
        return one_line(visible((errors or told or [""])[-1], one_line=True))
