"""Where `make chaos` kills a run: places at which the end of a machine could leave something half done."""

from __future__ import annotations

import os
import signal

VARIABLE = "FINETUNE_FAULT"
"""PLACE:COUNT, such as copy:7: the process is killed when it reaches that place for the seventh time. Unset: never."""

PLACES = ("step", "snapshot", "copy", "half-copy", "verify", "manifest", "committed", "prune", "ledger", "adapter")

_left: dict[str, int] = {}


def place(name: str) -> None:
    """Marks a place in the code. Kills this process with SIGKILL if the environment asks for it here."""
    fault = os.environ.get(VARIABLE)
    if not fault:
        return
    assert name in PLACES
    chosen, _, count = fault.partition(":")
    if chosen == name:
        _left[name] = _left.get(name, int(count)) - 1
        if _left[name] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
