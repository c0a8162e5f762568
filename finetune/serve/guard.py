"""Runs a backend so that nothing of it outlives the server: `python -I -S guard.py FOLDER COMMAND...`, with a pipe as standard
input.

The server holds the other end of the pipe. However the server ends, also by kill -9, the pipe closes, and the guard ends the
backend with everything that it has started. A backend such as vLLM starts processes of its own, which hold GPU memory; that they
are ended, too, takes a process that becomes their parent when their own is gone. FOLDER, which is the server's, is deleted then.
If the guard itself is killed, the kernel ends the backend's first process.

Standard library alone, because the guard runs without the project's environment. Its exit code is the backend's, as in a shell.
"""

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
GRACE_SECONDS = 5.0
"""From SIGTERM to SIGKILL."""
POLL_SECONDS = 0.2


def main() -> int:
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda which, _: stopping.append(which))
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    guard = os.getpid()

    def begin() -> None:  # in the child; this process has one thread
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:
            os._exit(1)

    try:
        backend = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=begin)
    except OSError as error:
        print(f"{sys.argv[2]}: {error.strerror}", file=sys.stderr)
        return 127
    code: int | None = None
    gone = False
    try:
        while code is None and not stopping and not (gone := _server_is_gone()):
            code = _reaped(backend.pid)
    finally:
        code = _end(backend.pid, code)
    if gone:
        shutil.rmtree(sys.argv[1], ignore_errors=True)
    return code


def _server_is_gone() -> bool:
    """Waits POLL_SECONDS at most."""
    ready, _, _ = select.select([0], [], [], POLL_SECONDS)
    return bool(ready) and not os.read(0, 1024)


def _reaped(backend: int) -> int | None:
    """Collect processes that have ended. Returns the backend's exit code if it is one of them."""
    code = None
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            if pid == backend:
                ended = os.waitstatus_to_exitcode(status)
                code = ended if ended >= 0 else 128 - ended
    return code


def _end(backend: int, code: int | None) -> int:
    """End the backend and all its descendants. Returns its exit code."""
    for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, 60.0)):
        until = time.monotonic() + seconds
        sent: set[int] = set()
        while left := set(_descendants()):
            for pid in left if number == signal.SIGKILL else left - sent:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
            sent |= left
            if time.monotonic() > until:
                break
            time.sleep(0.05)
            ended = _reaped(backend)
            code = ended if code is None else code
    return 143 if code is None else code


def _descendants() -> Iterator[int]:
    """All living processes that come from this one."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():  # noqa: PTH208, PTH112
        if name.isdigit():
            with suppress(OSError, ValueError), open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
                state, parent = file.read().rpartition(b")")[2].split()[:2]  # the name before may hold anything
                if state != b"Z":
                    parents.setdefault(int(parent), []).append(int(name))
    waiting = [os.getpid()]
    while waiting:
        for child in parents.get(waiting.pop(), ()):
            yield child
            waiting.append(child)


def _prctl(option: int, value: int) -> None:
    with suppress(OSError, AttributeError):  # Linux alone has it
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
