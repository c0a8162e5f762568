"""What the work of a job besides training costs: recorded in a ledger while it runs, and stopped at a ceiling in US dollars.

Training keeps its own ledger (budget/run_budget.py). A program that knows nothing of money, such as `finetune evaluate`, is
metered by the job that starts it, with the same meter and watchdog.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from finetune.budget.ledger import Ledger
from finetune.budget.meter import MAX_RUN_USD, Meter
from finetune.budget.price_watch import PriceWatch
from finetune.budget.watchdog import Watchdog
from finetune.errors import UserError
from finetune.job.programs import say, signals_later
from finetune.machine.billed_time import MachineTime
from finetune.machine.price import Ceilings, MachinePrice, dearest_usd_per_hour, facts, machine_price, provisioned

AS_TYPED = {MAX_RUN_USD: "MAX_RUN_USD"}
"""Config keys -> what sets them in a job."""


class Metering:
    """The meter of one attempt, and whether it has to end. It is a Limit for `run_limited`.

    Without a price (a machine that no launch of ours has started) it records nothing and never ends anything.
    """

    def __init__(
        self, ledger: Ledger, ceilings: Ceilings, *, usd_key: str = MAX_RUN_USD, restarts: bool = True
    ) -> None:
        """restarts: whether a spot machine's job is continued elsewhere after a preemption, for which money is then reserved.
        Raises UserError if the ledger cannot be read."""
        self._over, self._overdue, self._ended = "", False, ""
        self._meter: Meter | None = None
        price = _price()
        if price is None or not provisioned():
            return
        machine = facts()
        self._meter = Meter(
            ledger.account(),
            MachineTime(provisioned=True),
            price,
            ceilings,
            restart_usd_per_hour=dearest_usd_per_hour() if restarts and machine.get("spot") else None,
            usd_key=usd_key,
        )
        self._watchdog = Watchdog(
            self._meter,
            ledger.new_attempt(ledger.next_attempt(), machine=machine, price=price, resumed_step=None),
            say=say,
            time_to_save=lambda: 0.0,
            ask_stop=self._ask,
            hard_stop=self._end_now,
            last_resort=False,
        )
        self._prices = PriceWatch(self._meter, note=self._watchdog.note, ask_stop=self._ask, say=say)

    @property
    def over(self) -> str:
        return self._over

    @property
    def too_dear(self) -> bool:
        """Whether it is over because the machine is above `max_hourly_cost` by now, so that another one may go on."""
        return self._meter is not None and self._prices.too_dear

    @property
    def overdue(self) -> bool:
        return self._overdue

    def seconds_left(self) -> float:
        """Until it will be asked to stop, less what is reserved; inf without a ceiling."""
        return self._meter.room().seconds if self._meter else math.inf

    def spent(self) -> str:
        """What has been spent, as text; "" if it is not known."""
        return self._meter.usage().text if self._meter else ""

    def ends(self, reason: str) -> None:
        """Why the attempt ends, for the ledger's last line."""
        self._ended = reason

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Records the attempt while the block runs; it has failed, or was interrupted by a signal, if nobody says why it ends.
        Raises UserError if the ledger cannot be written."""
        if self._meter is None:
            yield
            return
        self._watchdog.start()
        self._prices.start()
        reason = "failed"
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            reason = "interrupted"
            raise
        finally:
            self._prices.close()
            with signals_later():  # a shutdown sends another one, which must not cost the ledger's last line
                self._watchdog.close(self._ended or reason)

    def _ask(self, reason: str) -> None:
        for key, name in AS_TYPED.items():
            reason = reason.replace(key, name)
        self._over = reason

    def _end_now(self, _: str) -> None:
        self._overdue = True


def _price() -> MachinePrice | None:
    try:
        return machine_price()
    except UserError as error:
        say(f"{error}; what this costs is not recorded")
        return None
