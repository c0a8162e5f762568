"""The worker process of a SQL sandbox, as its parent sees it: start, one message and its answer, end.

Nothing that the worker does, or fails to do, may block the parent or end it: a worker that was stopped or killed, or that sends
something else than it should.
"""

import json
import os
import select
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from finetune.errors import UserError
from finetune.sql.engines.base import Limits

ROOT = Path(__file__).resolve().parents[3]
START_WORKER = (
    "import sys; sys.path.append({!r}); from finetune.sql.engines.sqlite_worker import main; del sys.path[-1]; main()"
)
"""The folder of our package comes last, so that nothing in it can stand for a module of the standard library."""
START_SECONDS = 30.0
END_SECONDS = 5.0
LONGEST_WAIT_SECONDS = 3600.0
"""Of one call: poll() takes an int of milliseconds."""
READ_BYTES = 1 << 16


class WorkerEnded(Exception):
    """The worker ended before its answer was complete. had_begun: whether it had begun with the request."""

    def __init__(self, had_begun: bool):
        super().__init__(had_begun)
        self.had_begun = had_begun


class Worker:
    """A running worker. layers: those of `confinement.py` that hold. readable: the databases that it may read."""

    def __init__(self, limits: Limits, readable: Iterable[Path], folder: Path) -> None:
        """folder: for temporary files. Raises UserError if the process does not start."""
        self.limits = limits
        self.readable = frozenset(readable)
        environment: dict[str, str | Path] = {
            "PATH": os.defpath,
            "MALLOC_ARENA_MAX": "1",  # one arena, because each reserves address space
            "SQLITE_TMPDIR": folder,  # SQLite reads it once, when it is loaded
        }
        if "LD_LIBRARY_PATH" in os.environ:  # some Python builds need it to find their own library
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", START_WORKER.format(str(ROOT))],
            bufsize=0,  # so that closing the pipe to a dead worker writes nothing
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._answers = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._requests, False)
        settings = {
            "parent": os.getpid(),
            "memory_bytes": limits.memory_bytes,
            "temp_bytes": min(limits.temp_bytes, shutil.disk_usage(folder).free // 2),
            "max_result_bytes": limits.max_result_bytes,
            "readable": [_bytes_as_text(path) for path in sorted(self.readable)],
        }
        try:
            answer = self.exchange(json.dumps(settings).encode() + b"\n", time.monotonic() + START_SECONDS, READ_BYTES)
            self.layers = tuple(json.loads(answer)["layers"])
        except (WorkerEnded, TimeoutError, ValueError, LookupError, TypeError):
            self.stop()
            raise UserError(
                f"the SQL worker did not start with {limits.memory_bytes >> 20} MiB of memory; give it more, and check that "
                f"`{shlex.join([sys.executable, '-c', 'import sqlite3'])}` works",
                code="sql.worker_failed",
            ) from None
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_running(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> int | None:
        """End the worker, whatever state it is in. Returns its exit status, negative for a signal."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # only if the kernel waits for a disk; it ends the worker afterwards
            self._process.wait(END_SECONDS)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        return self._process.returncode

    def disown(self) -> None:
        """In a process that was forked off: leave the worker to the process that started it."""
        self._process.returncode = 0  # not our child: nothing to wait for

    def exchange(self, message: bytes, deadline: float, most: int) -> bytearray:
        """Send a message, and read the answer up to the JSON object that ends it.

        most: bytes of an answer. Raises TimeoutError after the deadline, and WorkerEnded if the worker has ended.
        """
        try:
            _write(self._requests, message, deadline)
        except BrokenPipeError:
            raise WorkerEnded(had_begun=False) from None
        received = bytearray()
        ready = select.poll()
        ready.register(self._answers, select.POLLIN)
        while not _is_complete(received):
            _wait(ready, deadline)
            chunk = os.read(self._answers, READ_BYTES)
            if not chunk or len(received) > most:
                raise WorkerEnded(had_begun=bool(received))
            received += chunk
        return received


def start_of_last_line(received: bytearray) -> int:
    return received.rfind(b"\n", 0, len(received) - 1) + 1


def _write(descriptor: int, message: bytes, deadline: float) -> None:
    """Write to a pipe that does not block. Raises TimeoutError, and BrokenPipeError if nobody can read it."""
    left = memoryview(message)
    ready = select.poll()
    ready.register(descriptor, select.POLLOUT)
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:
            _wait(ready, deadline)


def _wait(ready: select.poll, deadline: float) -> None:
    while (remaining := deadline - time.monotonic()) > 0:
        if ready.poll(min(remaining, LONGEST_WAIT_SECONDS) * 1000):
            return
    raise TimeoutError


def _bytes_as_text(path: Path) -> str:
    return os.fsencode(path).decode("latin-1")


def _is_complete(received: bytearray) -> bool:
    return received.endswith(b"\n") and received.startswith(b"{", start_of_last_line(received))
