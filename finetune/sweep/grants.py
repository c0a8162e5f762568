"""One budget over all trials, also where several machines work on a sweep: dollars are granted before they are spent.

grants/grant-NUMBER-TOKEN.json    NUMBER is that of the lease under which it was written, and orders the grants

A grant names a trial, the rung that it trains up to, and the ceiling in US dollars of the trial's run, with all that it has spent
before: the run's own meter and watchdog enforce that one (budget/), with every attempt, preemption and restart included. A grant
is open until its worker has closed it, or until a later one for the same trial replaces it. So at any time

    sum over trials of (the ceiling of an open grant, else what its ledger says) + the sweep's own ledger  <=  --max-sweep-usd

and what is spent is below the left side. A new grant is written only under the sweep's lease (turn.py), so two workers never
grant the same dollars. A worker that died leaves its grant open: its dollars stay reserved until its trial is taken over.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.budget.attempts import Account
from finetune.budget.ledger import Ledger
from finetune.errors import UserError
from finetune.run_folder import RunFolder
from finetune.runtime.confined import remove_file
from finetune.runtime.files import names_in, read_json, write_json
from finetune.runtime.typed_json import Mismatch, decode, encode

_NAME = re.compile(r"grant-([0-9]{6,9})-([0-9a-f]{16})\.json")


@dataclass(frozen=True)
class Grant:
    """ceiling_usd: of the trial's run, all attempts; None for a sweep without a budget. worker: token of its claim (workers.py).
    settings: the overrides of the trial. is_open: whether the dollars are reserved."""

    number: int
    trial: int
    rung: int
    ceiling_usd: float | None
    worker: str
    settings: Sequence[str]
    is_open: bool = True


class Grants:
    """folder: that of the sweep's grants."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def newest(self) -> dict[int, Grant]:
        """By trial. Raises UserError for a file that is not a grant: its dollars are not known."""
        found: dict[int, Grant] = {}
        matches = filter(None, map(_NAME.fullmatch, names_in(self._folder)))
        for match in sorted(matches, key=lambda match: (int(match[1]), match[2])):
            grant = _read(self._folder / match[0])
            found[grant.trial] = grant
        return found

    def write(self, grant: Grant) -> None:
        write_json(self._path(grant), encode(grant))

    def close(self, grant: Grant) -> None:
        """The program that could spend it has ended, and its ledger is complete."""
        self.write(replace(grant, is_open=False))

    def withdraw(self, grant: Grant) -> None:
        """Of a grant that nothing was started with."""
        remove_file(self._path(grant), inside=self._folder)

    def _path(self, grant: Grant) -> Path:
        return self._folder / f"grant-{grant.number:06d}-{grant.worker}.json"


@dataclass(frozen=True)
class Purse:
    """The dollars of a sweep now. spent: by trial. reserved: by trial, the ceilings of the open grants. own: on the sweep's own
    ledger. unpriced: whether nothing spent so far has a price."""

    usd: float | None
    spent: Mapping[int, float]
    reserved: Mapping[int, float]
    own: float

    def committed(self, trial: int) -> float:
        return max(self.spent.get(trial, 0.0), self.reserved.get(trial, 0.0))

    @property
    def total_spent(self) -> float:
        return sum(self.spent.values()) + self.own

    def left_for(self, trial: int) -> float:
        """What may still be granted to a trial beyond what it has spent; inf without a budget."""
        if self.usd is None:
            return math.inf
        others = sum(self.committed(other) for other in {*self.spent, *self.reserved} - {trial})
        return max(0.0, self.usd - self.own - others - self.spent.get(trial, 0.0))

    def ceiling(self, trial: int, workers: int, busy: int) -> float | None:
        """A new grant's ceiling: what the trial has spent and its share of what is left. workers: how many are to work on the
        sweep at once; busy: how many others hold an open grant. A grant that is taken over keeps at least its dollars, if they
        are there: the machine that held it may have begun to spend them."""
        if self.usd is None:
            return None
        left, spent = self.left_for(trial), self.spent.get(trial, 0.0)
        share = spent + left / max(1, workers - busy)
        return min(spent + left, max(share, self.reserved.get(trial, 0.0)))


def account_of(run: RunFolder) -> Account:
    return Ledger(run.ledger).account()


def purse(usd: float | None, runs: Mapping[int, RunFolder], own: Path, grants: Mapping[int, Grant]) -> Purse:
    """Reads the ledgers. own: the folder of the sweep's own. Raises UserError for a ledger that cannot be read or counted: under
    a budget, dollars that are not known are not taken for none."""
    accounts = {trial: account_of(run) for trial, run in runs.items()}
    others = Ledger(own, "sweep").account()
    if usd is not None:
        problems = [problem for account in (*accounts.values(), others) for problem in account.problems]
        if problems:
            raise UserError(
                f"ledger: {problems[0]}; repair or remove it to go on with the sweep", code="sweep.bad_ledger"
            )
    reserved = {
        trial: grant.ceiling_usd for trial, grant in grants.items() if grant.is_open and grant.ceiling_usd is not None
    }
    return Purse(usd, {trial: _usd(account) for trial, account in accounts.items()}, reserved, _usd(others))


def _usd(account: Account) -> float:
    return account.usd or 0.0


def _read(path: Path) -> Grant:
    try:
        grant = decode(Grant, read_json(path, "finetune sweep CONFIG ..."))
    except Mismatch as mismatch:
        raise UserError(
            f"{path}: {mismatch}; restore the file, or remove it if nothing runs", code="sweep.bad_record"
        ) from None
    usd = grant.ceiling_usd
    if usd is not None and not 0 <= usd < math.inf:
        raise UserError(f"{path}: ceiling_usd: expected a number from 0, found {usd}", code="sweep.bad_record")
    return grant
