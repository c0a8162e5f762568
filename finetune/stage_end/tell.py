"""The lines with which a stage ends:

    train: $0.42 (measured hours, price: catalog of 2026-11-29) for 0.4 h in 2 attempts (measured)
    next: finetune evaluate runs/demo   (its score before and after)
      or: finetune train --resume runs/demo --max-run-usd 3   (the rest of it)

They go to stderr: stdout is for results, which other programs read. What stands behind three blanks and a bracket is no part of a
command, as in the help. Dollars are those of the ledger, or of this command's seconds where it keeps none; without a price there
are seconds only.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.budget.attempts import Account
from finetune.errors import UserError
from finetune.machine.billed_time import process_age
from finetune.machine.price import MachinePrice, machine_price
from finetune.runtime.commands import as_command
from finetune.runtime.console import say, visible
from finetune.runtime.quantities import duration, usd_text

WITHIN = "FINETUNE_WITHIN_JOB"
"""Set for the programs of a job, which says itself what all of them cost and what is next."""


BESIDE = ("finetune", "sky")
"""Programs that are installed beside our Python."""


@dataclass(frozen=True)
class Next:
    """A command to type. why: what it is for, in a few words."""

    words: tuple[str, ...]
    why: str

    def __str__(self) -> str:
        return f"{as_command(*self.words)}   ({self.why})"

    def here(self) -> Next:
        """The same with the path of the program where PATH does not have it."""
        return Next((program(self.words[0]), *self.words[1:]), self.why)


def program(name: str, folder: Path = Path()) -> str:
    """By the path that works from the folder where PATH does not have it, such as with a .venv that is not activated."""
    beside = Path(sys.executable).parent / name
    if name not in BESIDE or shutil.which(name) or not os.access(beside, os.X_OK):
        return name
    here = folder.resolve()
    if not beside.is_relative_to(here):
        return str(beside)
    found = str(beside.relative_to(here))
    return found if os.sep in found else f".{os.sep}{found}"


def finetune(*words: object, why: str) -> Next:
    return Next(("finetune", *map(str, words)), why)


def tell(
    stage: str, cost: str, following: Sequence[Next] = (), say: Callable[[str], None] = say, *, within: bool = False
) -> None:
    """Say what the stage cost, and what to type next. within: say it also in a program of a job."""
    if os.environ.get(WITHIN) and not within:
        return
    sys.stdout.flush()  # the result first, where both streams go to one file
    say(f"{stage}: {cost}")
    for number, command in enumerate(following):
        typed = command if within else command.here()  # those of a job are typed where it was launched
        say(visible(f"{'  or' if number else 'next'}: {typed}", one_line=True))


def cost_of_command(usd_per_hour: float | None = None) -> str:
    """What this process has cost. usd_per_hour: of the config, for a machine that no launch of ours has started."""
    seconds = process_age()
    text, price = f"{duration(seconds)} (measured)", _price(usd_per_hour)
    if price is None:
        return text
    usd = usd_text(price.usd_per_hour * seconds / 3600)
    return f"{usd} (estimated: measured seconds x ${price.usd_per_hour:g}/h, {price.basis}) for {text}"


def cost_of_account(account: Account) -> str:
    """What the attempts have cost together, by the ledger."""
    attempts = account.attempts
    time = f"{duration(3600 * account.hours)} in {counted(len(attempts), 'attempt')} (measured)"
    if account.usd is None:
        return time
    bases = dict.fromkeys(attempt.price.basis for attempt in attempts if attempt.price)
    unpriced = sum(attempt.price is None for attempt in attempts)
    without = f", without {counted(unpriced, 'attempt')} of unknown price" if unpriced else ""
    return f"{usd_text(account.usd)} (measured hours, price: {' and '.join(bases)}{without}) for {time}"


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _price(usd_per_hour: float | None) -> MachinePrice | None:
    try:
        price = machine_price()
    except UserError:  # a damaged price table, which the stages that need it name
        return None
    if price is None and usd_per_hour is not None:
        price = MachinePrice(usd_per_hour, "budget.usd_per_hour of the config")
    return price
