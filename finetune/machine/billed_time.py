"""For how many seconds an attempt of a run has to pay, by clocks that nobody sets.

A rented machine costs money from its boot, so boot, set-up and idle hours between two runs count. It is paid once: a marker in
the home folder says up to which age of the machine runs have booked it, and each attempt books on from there. Runs that share a
machine at the same time share its seconds, too. Elsewhere (a laptop with budget.usd_per_hour) this process's own time counts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from finetune.runtime.files import write_json

MARKER = Path(".finetune") / "metered.json"
"""In the home folder of a rented machine."""
START_FIELD = 22
"""Of /proc/PID/stat (man 5 proc): when the process started, in clock ticks after the boot."""


def machine_age() -> float | None:
    """Seconds since this machine booted; in a container, since it was started. None where the system does not tell."""
    started = _started(1)
    return None if started is None else max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)


def process_age() -> float:
    """Seconds since this process started, as far as the system tells; those that a laptop sleeps cost nothing."""
    return _AGE_AT_IMPORT + time.monotonic() - _IMPORTED


def machine_identity() -> str | None:
    """Another one after every boot, and for every container; None where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    started = _started(1)
    return None if started is None else f"{boot}/{started:.2f}"


class MachineTime:
    """The seconds of one attempt. `seconds` may be asked by any thread; `take` and `mark` are for one thread at a time."""

    def __init__(self, *, provisioned: bool, home: Path | None = None, age: Callable[[], float] | None = None) -> None:
        """provisioned: the machine costs money from its boot. age: seconds that only grow, in place of the system's."""
        by_machine = provisioned and (age is not None or machine_age() is not None)
        self._age = age or (_age_of_machine if by_machine else process_age)
        self._identity = machine_identity() if by_machine else None
        self._marker = (home or Path.home()) / MARKER if self._identity else None
        self._state = (0.0, self._marked(self._age()))  # seconds taken; age up to which they, or another run's, go

    def seconds(self) -> float:
        """On the meter of this attempt up to now, those before this process did anything included."""
        taken, since = self._state
        return taken + max(0.0, self._age() - since)

    def take(self) -> float:
        """`seconds`, less what another run of this machine has marked as its own since the last call."""
        taken, since = self._state
        now = self._age()
        taken += max(0.0, now - max(since, self._marked(now)))
        self._state = (taken, max(now, since))
        return taken

    def mark(self) -> None:
        """Tells other runs of this machine what was taken up to the last `take`. Call it once the ledger has it: a kill in
        between then bills a moment twice, rather than never. Raises UserError where the marker cannot be written."""
        since = self._state[1]
        if self._marker is not None and self._marked(self._age()) < since:
            write_json(self._marker, {"machine": self._identity, "seconds": since})

    def _marked(self, now: float) -> float:
        """Age up to which runs have booked this machine; 0 where the marker is missing, damaged, of another boot, or ahead."""
        if self._marker is None:
            return 0.0
        try:
            mark = json.loads(self._marker.read_text(encoding="utf-8"))
            seconds = float(mark["seconds"])
            return seconds if mark["machine"] == self._identity and 0 <= seconds <= now else 0.0
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0


def _started(process: int) -> float | None:
    """Seconds from the boot to the start of a process."""
    try:
        line = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        fields = line.rpartition(")")[2].split()  # the name before it may hold blanks and brackets
        return int(fields[START_FIELD - 3]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def _age_of_machine() -> float:
    return machine_age() or 0.0


def _age_at_import() -> float:
    started = _started(os.getpid())
    return 0.0 if started is None else max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)


_IMPORTED, _AGE_AT_IMPORT = time.monotonic(), _age_at_import()
