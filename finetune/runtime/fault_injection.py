"""Where `make chaos` kills a run: the places at which a machine may vanish and something could be left half done."""

from __future__ import annotations

import os
import signal

VARIABLE = "FINETUNE_FAULT"
"""PLACE:COUNT, such as copy:7: the process is killed when it comes to that place for the seventh time. Unset: never."""

PLACES = ("step", "snapshot", "copy", "half-copy", "verify", "manifest", "committed", "prune", "ledger", "adapter")

_left: dict[str, int] = {}


def place(name: str) -> None:
    """Says that the run has come to a place. Kills this process with SIGKILL where the environment asks for it."""
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    assert name in PLACES
    chosen, _, count = wanted.partition(":")
    if chosen == name:
        _left[name] = _left.get(name, int(count)) - 1
        if _left[name] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
