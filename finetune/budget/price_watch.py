"""Looks at the machine's price again once a day while an attempt runs: spot prices may change so often."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from typing import Any

from finetune.budget.attempts import METERED, PRICE
from finetune.budget.meter import Meter
from finetune.budget.newest_prices import look
from finetune.budget.watchdog import THREADS, Event
from finetune.errors import UserError, first_line
from finetune.machine.price import dearest_usd_per_hour, machine_price, too_dear

LOOK_VARIABLE = "FINETUNE_LOOK_SECONDS"
LOOK_SECONDS = 86400.0
TOO_DEAR = "too_dear"
"""Why an attempt has ended, in the ledger."""


class PriceWatch:
    """Keeps the price of a meter up to date, from `start` to `close`, in a thread of its own, which may wait for the network.

    note: queues a line for the ledger. ask_stop: called once, with the reason as text, if the machine is above `max_hourly_cost`
    by then. find: in place of `look`, which fetches the newest prices. event: makes the event that the thread waits on.
    """

    def __init__(
        self,
        meter: Meter,
        *,
        note: Callable[..., None],
        ask_stop: Callable[[str], None],
        say: Callable[[str], None],
        find: Callable[[Callable[[str], None]], None] | None = None,
        event: Callable[[], Event] = threading.Event,
    ) -> None:
        """Raises UserError like `look_seconds`."""
        self.too_dear = False
        """Whether it has asked for a stop."""
        self._meter, self._note, self._ask_stop, self._say, self._find = meter, note, ask_stop, say, find or look
        self._every, self._closing = look_seconds(), event()
        self._thread = threading.Thread(target=self._watch, name=f"{THREADS}prices", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Never waits for a look that is under way: it changes nothing that counts any more."""
        self._closing.set()

    def look_again(self) -> None:
        """Takes a changed price over, and asks for a stop if it is above the ceiling. Raises UserError for a broken table."""
        self._find(self._say)
        if self._closing.is_set():
            return
        price, before = machine_price(), self._meter.price
        if price is not None and before is not None and price.usd_per_hour != before.usd_per_hour:
            seconds = self._meter.reprice(price, dearest_usd_per_hour())
            facts: dict[str, Any] = {METERED: round(seconds, 3), "usd_per_hour": price.usd_per_hour}
            self._note(PRICE, **facts, basis=price.basis)
        found = too_dear()
        if found is not None and not self.too_dear:
            self.too_dear = True
            self._ask_stop(found.reason)

    def _watch(self) -> None:
        while not self._closing.is_set():
            self._closing.wait(self._every)
            if self._closing.is_set():
                return
            try:
                self.look_again()
            except Exception as error:  # the run goes on, at the price that it knows
                why = str(error) if isinstance(error, UserError) else repr(first_line(error))
                self._say(f"prices: not looked at again ({why})")


def look_seconds() -> float:
    """FINETUNE_LOOK_SECONDS, for tests; else a day. Raises UserError if it is not a number above 0 and at most a day."""
    text = os.environ.get(LOOK_VARIABLE)
    try:
        seconds = float(text) if text else LOOK_SECONDS
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= LOOK_SECONDS:
        raise UserError(
            f"{LOOK_VARIABLE}: expected seconds above 0 and at most {LOOK_SECONDS:g}, found {str(text)[:40]!r}",
            code="budget.bad_look_seconds",
        )
    return seconds
