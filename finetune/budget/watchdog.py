"""What ends a process that no longer listens, and how often the ledger hears that one is alive."""

from __future__ import annotations

import faulthandler
import math
import os
import threading

from finetune.errors import UserError

HEARTBEAT_VARIABLE = "FINETUNE_HEARTBEAT_SECONDS"
HEARTBEAT_SECONDS = 30.0
HARD_SECONDS = 5.0
"""Before the ceiling the run is ended: time for a last line in the ledger and for run.json."""
DAY_SECONDS = 86400.0
STDERR = 2


class LastResort:
    """faulthandler's timer: at the ceiling it writes where every thread hangs to stderr, and exits with 1.

    1, because nothing of Python can run any more that would say so in run.json; 1 is not a code that is retried.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._set = self._cancelled = False

    def set(self, seconds: float) -> None:
        """Anew, unless the end is so near that a timer put off would never fire."""
        with self._lock:
            if self._cancelled or (self._set and seconds <= HARD_SECONDS):
                return
            faulthandler.dump_traceback_later(min(max(seconds, HARD_SECONDS), DAY_SECONDS), exit=True, file=STDERR)
            self._set = True

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            if self._set:
                faulthandler.cancel_dump_traceback_later()


def heartbeat_seconds() -> float:
    """FINETUNE_HEARTBEAT_SECONDS, for tests; else 30. Raises UserError for what is no number above 0."""
    text = os.environ.get(HEARTBEAT_VARIABLE)
    try:
        seconds = float(text) if text else HEARTBEAT_SECONDS
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= HEARTBEAT_SECONDS:
        raise UserError(
            f"{HEARTBEAT_VARIABLE}: expected seconds above 0 and at most {HEARTBEAT_SECONDS:g}, found {text!r}",
            code="budget.bad_heartbeat",
        )
    return seconds
