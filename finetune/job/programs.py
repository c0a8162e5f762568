"""The programs that a job starts, and its messages about them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from finetune.job.settings import JobSettings

TENSORBOARD_PORT = 6006


class ProgramFailed(Exception):
    """A program that the job needs has failed and reported why; the job ends with its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


def say(message: str) -> None:
    print(f"machine: {message}", file=sys.stderr, flush=True)


def shell_code(code: int) -> int:
    """An exit code as in a shell: 128 plus the number of the signal."""
    return code if code >= 0 else 128 - code


@contextmanager
def signals_later() -> Iterator[None]:
    """SIGTERM and SIGINT that arrive while the block runs are handled at its end. For the start of a program: a handler that
    raises during the start would leave a running program without a handle."""
    arrived: list[int] = []
    earlier = {
        number: signal.signal(number, lambda which, _: arrived.append(which))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
        for which in arrived[:1]:
            signal.raise_signal(which)


def call(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run a program to its end; it is terminated if this process is interrupted. Raises ProgramFailed."""
    program: subprocess.Popen[bytes] | None = None
    try:
        with signals_later():
            program = subprocess.Popen(command, env=environment)
        code = program.wait()
    except BaseException:
        if program is not None:
            program.terminate()
            program.wait()
        raise
    if code:
        raise ProgramFailed(shell_code(code))


@contextmanager
def tensorboard(settings: JobSettings) -> Iterator[None]:
    """While the block runs, TensorBoard shows all runs of the bucket, reachable through ssh."""
    words = ["tensorboard", "--logdir", str(settings.runs), "--host", "127.0.0.1", "--port", str(TENSORBOARD_PORT)]
    log = settings.state / "tensorboard.log"
    program: subprocess.Popen[bytes] | None = None
    try:
        try:
            with log.open("wb") as file, signals_later():
                program = subprocess.Popen(
                    [*words, "--reload_interval", "60"], env=settings.environment, stdout=file, stderr=file
                )
        except OSError as error:  # the job continues without TensorBoard
            say(f"TensorBoard does not start: {error}")
            yield
            return
        say(
            f"TensorBoard: ssh -L {TENSORBOARD_PORT}:localhost:{TENSORBOARD_PORT} {settings.cluster}, then "
            f"http://localhost:{TENSORBOARD_PORT}"
        )
        yield
    finally:
        if program is not None:
            program.terminate()


def last_lines(path: Path, count: int) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])
