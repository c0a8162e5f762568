"""Which process this is, so that another process can tell whether it still exists."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from finetune.machine.billed_time import machine_identity

STATE_FIELD, START_FIELD = 3, 22
"""Fields of /proc/PID/stat (man 5 proc): the state, and the start in clock ticks after the boot."""
DEAD = "ZX"
"""States of a process that has ended: a zombie runs no more code."""


@dataclass(frozen=True)
class ProcessId:
    """machine: differs after every boot and for every container; "" if the system does not report it. started: in clock ticks
    after the boot, because process ids are used again; 0 if unknown. host: the machine's name, for people."""

    machine: str
    pid: int
    started: int
    host: str


def this_process() -> ProcessId:
    pid = os.getpid()
    found = _stat(pid)
    return ProcessId(_machine() if found else "", pid, found[1] if found else 0, socket.gethostname())


def is_gone(process: ProcessId) -> bool:
    """Whether a process has certainly ended: it ran on this machine, and its id is free, a zombie's, or another process's. False
    for one on another machine, about which nothing is known here."""
    if not process.machine or process.machine != _machine():
        return False
    found = _stat(process.pid)
    return found is None or found[0] in DEAD or found[1] != process.started


def _machine() -> str:
    try:
        return f"{machine_identity() or ''} {os.readlink('/proc/self/ns/pid')}" if machine_identity() else ""
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, int] | None:
    try:
        line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = line.rpartition(")")[2].split()  # the name before it may contain spaces and brackets
        return fields[0], int(fields[START_FIELD - STATE_FIELD])
    except (OSError, ValueError, IndexError):
        return None
