"""The billed seconds of an attempt, from clocks that cannot be set.

A cloud machine costs money from its boot, so boot, set-up and idle hours between two runs count. Each second is billed once: a
marker in the home folder records up to which age of the machine runs have been billed, and each attempt continues from there.
Runs that use a machine at the same time share its seconds. Elsewhere (a laptop with budget.usd_per_hour) this process's own
time counts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from finetune.runtime.files import load_json, write_json

MARKER = Path(".finetune") / "metered.json"
"""In the home folder of a cloud machine."""
START_FIELD = 22
"""Field of /proc/PID/stat (man 5 proc): when the process started, in clock ticks after the boot."""


def machine_age() -> float | None:
    """Seconds since this machine booted; in a container, since it was started. None if the system does not report it."""
    started = _started(1)
    return None if started is None else max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)


def process_age() -> float:
    """Seconds since this process started, or since the import if unknown. Time during which a laptop sleeps does not count."""
    return _AGE_AT_IMPORT + time.monotonic() - _IMPORTED


def machine_identity() -> str | None:
    """An identifier that differs after every boot and for every container; None if the system does not report it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    started = _started(1)
    return None if started is None else f"{boot}/{started:.2f}"


class MachineTime:
    """The billed seconds of one attempt. Any thread may call `seconds`; only one thread at a time `take` and `mark`."""

    def __init__(self, *, provisioned: bool, home: Path | None = None, age: Callable[[], float] | None = None) -> None:
        """provisioned: the machine costs money from its boot. age: a monotonic clock in seconds, in place of the system's."""
        by_machine = provisioned and (age is not None or machine_age() is not None)
        self._age = age or (_age_of_machine if by_machine else process_age)
        self._identity = machine_identity() if by_machine else None
        self._marker = (home or Path.home()) / MARKER if self._identity else None
        self._state = (0.0, self._marked(self._age()))  # seconds taken; age up to which this or another run was billed

    def seconds(self) -> float:
        """Billed to this attempt so far, including the time before this process started."""
        taken, since = self._state
        return taken + max(0.0, self._age() - since)

    def take(self) -> float:
        """`seconds`, less what another run on this machine has marked as its own since the last call."""
        taken, since = self._state
        now = self._age()
        taken += max(0.0, now - max(since, self._marked(now)))
        self._state = (taken, max(now, since))
        return taken

    def mark(self) -> None:
        """Records for other runs on this machine what was billed up to the last `take`. Call it after the ledger is written: a
        kill in between then bills a moment twice rather than never. Raises UserError if the marker cannot be written."""
        since = self._state[1]
        if self._marker is not None and self._marked(self._age()) < since:
            write_json(self._marker, {"machine": self._identity, "seconds": since})

    def _marked(self, now: float) -> float:
        """Age up to which runs on this machine were billed; 0 if the marker is missing, corrupt, ahead, or of another boot."""
        if self._marker is None:
            return 0.0
        try:
            mark = load_json(self._marker)
            seconds = float(mark["seconds"])
            return seconds if mark["machine"] == self._identity and 0 <= seconds <= now else 0.0
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0


def _started(process: int) -> float | None:
    """Seconds from the boot to the start of a process."""
    try:
        line = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        fields = line.rpartition(")")[2].split()  # the process name before it may contain spaces and brackets
        return int(fields[START_FIELD - 3]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def _age_of_machine() -> float:
    return machine_age() or 0.0


def _age_at_import() -> float:
    started = _started(os.getpid())
    return 0.0 if started is None else max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)


_IMPORTED, _AGE_AT_IMPORT = time.monotonic(), _age_at_import()
