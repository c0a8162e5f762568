"""Files that a process locks while it works on something, and others wait for. The system releases a lock with its process."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path

POLL_SECONDS = 0.2


def is_locked(lock: Path) -> bool:
    """Whether another process holds the lock; not where there is no such file."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def wait_while_locked(lock: Path, seconds: float) -> float:
    """Wait for at most `seconds`. Returns the seconds waited."""
    began = time.monotonic()
    while is_locked(lock) and time.monotonic() - began < seconds:
        time.sleep(POLL_SECONDS)
    return time.monotonic() - began
