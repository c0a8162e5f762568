"""Enforces a run's ceilings whatever the training loop does, and keeps its ledger up to date while it trains.

Two threads: one watches the ceilings, the other writes the ledger, so that a bucket that does not respond cannot block the
first. The run is asked to stop while there is time to save before a ceiling; if it does not stop, it is ended shortly before
the ceiling; and if a call that holds Python's global interpreter lock prevents even that, the timer of `faulthandler`, a C
thread that needs no lock, ends the process at the ceiling.
"""

from __future__ import annotations

import faulthandler
import math
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from finetune.budget.ledger import AttemptLog
from finetune.budget.meter import Meter
from finetune.errors import UserError
from finetune.runtime.quantities import duration

HEARTBEAT_VARIABLE = "FINETUNE_HEARTBEAT_SECONDS"
HEARTBEAT_SECONDS = 30.0
SAVE_RESERVE_SECONDS = 20.0
"""At least this much time is reserved for a save before a ceiling."""
HARD_SECONDS = 5.0
"""The run is ended this long before the ceiling: time for a last line in the ledger and for run.json."""
RETRY_SECONDS = 1.0
END_SECONDS = 15.0
"""Timeout for the ledger's last line when a run closes."""
DAY_SECONDS = 86400.0
STDERR = 2
THREADS = "budget "
"""Prefix of the threads' names."""


class Event(Protocol):
    """The part of threading.Event that is used. Tests pass one that waits on a fake clock."""

    def is_set(self) -> bool: ...

    def set(self) -> None: ...

    def clear(self) -> None: ...

    def wait(self, timeout: float | None = None) -> bool: ...


class Watchdog:
    """Watches one attempt, from `start` to `close`.

    log: not yet begun. time_to_save: seconds that a save needs now. ask_stop: sets a flag for the end of the step. hard_stop:
    records the stop and ends the process. Both hooks are called from a thread, with the reason as text. last_resort: whether to
    set faulthandler's timer, of which a process has only one, if there is a ceiling. event: makes the events that the threads
    wait on.
    """

    def __init__(
        self,
        meter: Meter,
        log: AttemptLog,
        *,
        say: Callable[[str], None],
        time_to_save: Callable[[], float],
        ask_stop: Callable[[str], None],
        hard_stop: Callable[[str], None],
        last_resort: bool = True,
        event: Callable[[], Event] = threading.Event,
    ) -> None:
        """Raises UserError like `heartbeat_seconds`."""
        self._meter, self._log = meter, log
        self._say, self._time_to_save, self._ask_stop, self._hard_stop = say, time_to_save, ask_stop, hard_stop
        self._step = log.attempt().resumed_step
        self._heartbeat = heartbeat_seconds()
        self._notes: deque[tuple[str, dict[str, Any]]] = deque()
        self._end: str | None = None  # why the attempt ends, for the writer
        self._wake, self._ended, self._closing = event(), event(), event()
        self._started = self._asked = self._stopped = False
        self._faults: dict[str, str] = {}
        self._timer = LastResort() if last_resort else None
        self._threads = [
            threading.Thread(target=work, name=f"{THREADS}{name}", daemon=True)
            for name, work in (("ceilings", self._watch), ("ledger", self._write))
        ]

    def start(self) -> None:
        """Begins the attempt in the ledger and starts the threads. Raises UserError if the ledger cannot be written."""
        self._log.begin(self._meter.time.take())
        self._started = True
        self._keep("marker", self._meter.time.mark)
        for thread in self._threads:
            thread.start()

    def reached(self, step: int) -> None:
        """Sets the number of optimizer steps done, for the next heartbeats."""
        self._step = step

    def note(self, event: str, **facts: Any) -> None:
        """Queues a line for the ledger, which the writing thread adds; never raises and never waits."""
        self._notes.append((event, facts))
        self._wake.set()

    def close(self, reason: str) -> None:
        """Writes the end of an attempt that has begun and stops watching; a second call does nothing. Never raises."""
        if self._closing.is_set():
            return
        self._end = reason
        self._closing.set()
        self._wake.set()
        for thread in reversed(self._threads):
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(END_SECONDS)
        if self._timer is not None:
            self._timer.cancel()
        if self._started and not self._ended.is_set():
            self._say(
                f"{self._log.path}: the end of this attempt could not be written; its cost since the last line is missing"
            )

    def _watch(self) -> None:
        """The thread that enforces the ceilings; it survives whatever the hooks raise."""
        while not self._closing.is_set():
            wait = RETRY_SECONDS
            try:
                wait = self._hold()
                self._faults.pop("ceilings", None)
            except Exception as error:
                self._complain("ceilings", f"the budget watchdog continues after an error: {error!r}")
            self._closing.wait(wait)

    def _hold(self) -> float:
        """Checks the ceilings once; returns seconds until the next check."""
        left = self._meter.seconds_left()
        if math.isinf(left) and left > 0:
            return self._heartbeat
        if self._timer is not None:
            self._timer.set(left)
        if left <= HARD_SECONDS and not self._stopped:
            self._write_end("budget_stop")
            self._hard_stop(f"{self._meter.room().key}: {self._meter.usage().text}; the run did not stop by itself")
            self._stopped = True
        room, save = self._meter.room(), self._save_seconds()
        if room.seconds <= save and not self._asked:
            self._asked = True
            reserve = (
                f"; {duration(room.reserve_seconds)} are reserved for a restart after a preemption"
                if room.reserve_seconds is not None
                else ""
            )
            self._ask_stop(f"{room.key}: {self._meter.usage().text}{reserve}")
        due = [self._heartbeat, left - HARD_SECONDS if left > HARD_SECONDS else RETRY_SECONDS]
        return max(0.05, min([*due, room.seconds - save] if room.seconds > save else due))

    def _save_seconds(self) -> float:
        try:
            return max(SAVE_RESERVE_SECONDS, self._time_to_save())
        except Exception as error:
            self._complain("save", f"the time for a save is not known: {error!r}")
            return SAVE_RESERVE_SECONDS

    def _write_end(self, reason: str) -> None:
        """Has the writing thread write the last line; waits only briefly for a store that does not respond."""
        self._end = reason
        self._wake.set()
        self._ended.wait(HARD_SECONDS / 2)

    def _write(self) -> None:
        """The thread that writes heartbeats, notes and the end."""
        while not self._ended.is_set():
            near = max(RETRY_SECONDS, self._meter.seconds_left() / 2)
            self._wake.wait(min(self._heartbeat, near))
            self._wake.clear()
            closing = self._closing.is_set()  # read before self._end, or a close in between would leave no last line
            if self._keep("ledger", self._record):
                self._keep("marker", self._meter.time.mark)
            if closing:
                return
            self._keep("account of other attempts", lambda: self._meter.see(self._log.others()))

    def _record(self) -> None:
        seconds, reason = self._meter.time.take(), self._end
        while self._notes:
            event, facts = self._notes.popleft()
            self._log.note(event, **facts)
        if reason is None:
            self._log.heartbeat(seconds, self._step)
        else:
            self._log.end(seconds, reason, self._step)
            self._ended.set()

    def _keep(self, what: str, action: Callable[[], object]) -> bool:
        try:
            action()
        except Exception as error:
            why = str(error) if isinstance(error, UserError) else repr(error)
            self._complain(what, f"the {what} is not up to date and is retried at each heartbeat: {why}")
            return False
        if self._faults.pop(what, None):
            self._say(f"the {what} is up to date again")
        return True

    def _complain(self, what: str, message: str) -> None:
        """Reports a fault once, until it is over."""
        if what not in self._faults:
            self._faults[what] = message
            self._say(message)


class LastResort:
    """faulthandler's timer: at the ceiling it prints every thread's traceback to stderr and exits with 1.

    1, because no Python code can run any more to record the stop in run.json; an exit with 1 is not retried.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._set = self._cancelled = False

    def set(self, seconds: float) -> None:
        """Restarts the timer, unless the ceiling is so near that a timer put off again and again would never fire."""
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
    """FINETUNE_HEARTBEAT_SECONDS, for tests; else 30. Raises UserError if it is not a number above 0 and at most 30."""
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
