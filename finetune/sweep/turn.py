"""One decision at a time: what a worker does next, under the lease of the sweep's folder.

The lease is that of a run (budget/lease.py), held for the seconds of a decision. A worker that was paused in its turn may write a
grant after another one has taken over; so a grant counts only if the lease is still held when everyone must have seen it. And a
worker that took over from one that did not say that it ended first waits until it must see what that one had written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from finetune.budget.lease import Lease
from finetune.budget.meter import Meter
from finetune.errors import TakenOver, TransientError, UserError
from finetune.machine.billed_time import MachineTime
from finetune.machine.price import Ceilings, MachinePrice
from finetune.run_folder import RunFolder
from finetune.runtime.quantities import duration
from finetune.sweep.folder import Sweep, SweepFolder, Trial, losses
from finetune.sweep.grants import Grant, Grants, Purse, account_of, purse
from finetune.sweep.halving import Results, best, key, places, quotas
from finetune.sweep.workers import Worker

START_SECONDS = 60.0
"""Until a program has its imports and its meter runs: 10 to 20 s on a busy computer (measured)."""
PATIENCE_SECONDS = 600.0
"""How long the other workers' decisions are waited for."""
Why = Literal["done", "budget", "others"]


@dataclass(frozen=True)
class Nothing:
    """Why there is nothing to do: all is decided, the budget is used up, or other workers do what is left. detail: for people."""

    why: Why
    detail: str


@dataclass(frozen=True)
class Machine:
    """The machine of this worker. restart_usd_per_hour: of the dearest machine that it may continue on after a preemption; None
    if it cannot be preempted. interval_seconds: between two checkpoints. start_seconds: of a program until its meter runs."""

    price: MachinePrice | None
    provisioned: bool
    restart_usd_per_hour: float | None
    interval_seconds: float
    start_seconds: float = START_SECONDS


@dataclass(frozen=True)
class Work:
    """The sweep that a worker works on. usd: the budget, None without one. workers: how many are to share it."""

    sweep: Sweep
    folder: SweepFolder
    worker: Worker
    machine: Machine
    usd: float | None
    workers: int
    settings_of: Callable[[int], tuple[str, ...]]
    say: Callable[[str], None]


def take_turn(work: Work) -> Grant | Nothing:
    """The next thing to train for this worker, written down. Raises UserError, and TransientError if no turn comes."""
    return _decided(work, _next)


def take_score(work: Work, is_scored: Callable[[RunFolder], bool]) -> Grant | Nothing:
    """The best trial of a sweep that is done, to be scored with what is left. is_scored: whether a run has its score."""
    return _decided(work, lambda work, number: _score(work, number, is_scored))


def _decided(work: Work, decide: Callable[[Work, int], Grant | Nothing]) -> Grant | Nothing:
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE_SECONDS:
        with Lease(work.say) as lease:
            try:
                if lease.acquire(work.folder.as_run, lambda: ({}, 0)):
                    time.sleep(work.worker.settle)
                found = decide(work, lease.number)
                if isinstance(found, Nothing):
                    return found
                grants = Grants(work.folder.path / "grants")
                grants.write(found)
                time.sleep(work.worker.settle)
                try:
                    lease.check()
                except TakenOver:
                    grants.withdraw(found)
                    continue
                if found.trial not in work.folder.trials():  # only now: of two choices for a trial one counts
                    name = work.folder.run_of(work.sweep, found.trial).path.name
                    work.folder.add_trial(Trial(found.trial, name, found.settings))
                return found
            except UserError as error:
                if error.code != "run.held":
                    raise
        time.sleep(1.0)
    raise TransientError(
        f"{work.folder.path}: another worker has been deciding for {PATIENCE_SECONDS:.0f} s", code="sweep.held"
    )


def _next(work: Work, number: int) -> Grant | Nothing:
    sweep, folder = work.sweep, work.folder
    results = losses(folder.results())
    standing = places(sweep.trials, quotas(sweep.trials, sweep.eta, len(sweep.rungs)), results)
    wanted = [trial for trial, place in enumerate(standing) if place.standing == "next"]
    held, money = _money(work, results)
    tokens = {grant.worker for grant in held.values()}
    alive = work.worker.alive(tokens)
    if wanted and all(trial in held and held[trial].worker in alive for trial in wanted):
        alive = work.worker.wait_for_signs(tokens)
    busy = {trial: grant for trial, grant in held.items() if grant.worker in alive}
    free = [trial for trial in wanted if trial not in busy]
    if not wanted:
        return Nothing("done", "every trial is stopped or done")
    if not free:
        return Nothing("others", f"{len(busy)} other workers do what is left")
    trial = min(free, key=lambda trial: (standing[trial].rung, _rank(results, trial, standing[trial].rung)))
    ceiling = money.ceiling(trial, work.workers, len(busy))
    if _too_little(work, trial, money, ceiling):
        ceiling = money.ceiling(trial, 1, 0)  # all that is left, where a share is too little
    if why := _too_little(work, trial, money, ceiling):
        return Nothing("budget", why)
    chosen = folder.trials().get(trial)
    settings = chosen.settings if chosen else work.settings_of(trial)
    return Grant(number, trial, standing[trial].rung, ceiling, work.worker.token, list(settings))


def _score(work: Work, number: int, is_scored: Callable[[RunFolder], bool]) -> Grant | Nothing:
    results = losses(work.folder.results())
    leader, end = best(results), len(work.sweep.rungs)
    if leader is None or leader[1] != end:
        return Nothing("done", "no trial is trained to the end, so none is scored")
    trial, (held, money) = leader[0], _money(work, results)
    if is_scored(work.folder.run_of(work.sweep, trial)):
        return Nothing("done", "the best trial is scored")
    if trial in held and held[trial].worker in work.worker.wait_for_signs({held[trial].worker}):
        return Nothing("others", "another worker scores the best trial")
    settings = work.folder.trials()[trial].settings
    return Grant(number, trial, end + 1, money.ceiling(trial, 1, 0), work.worker.token, list(settings))


def _money(work: Work, results: Results) -> tuple[dict[int, Grant], Purse]:
    """The grants that reserve dollars, and the dollars. A grant whose trial is at its rung reserves none any more, though a kill
    has kept its worker from closing it."""
    sweep, folder = work.sweep, work.folder
    grants = Grants(folder.path / "grants").newest()
    held = {trial: grant for trial, grant in grants.items() if grant.is_open and (trial, grant.rung) not in results}
    runs = {trial: folder.run_of(sweep, trial) for trial in range(sweep.trials)}
    return held, purse(work.usd, runs, folder.path / "ledger", held)


def _rank(results: Results, trial: int, rung: int) -> tuple[float, int]:
    """Better trials first, so that a budget that ends leaves the best one done."""
    return key(results, trial, rung - 1) if rung else (0.0, trial)


def _too_little(work: Work, trial: int, money: Purse, ceiling: float | None) -> str:
    """Why nothing is started with that ceiling; "" if something is."""
    machine, run = work.machine, work.folder.run_of(work.sweep, trial)
    if machine.price is None or not exhausted(work, run, ceiling, machine.start_seconds):
        return ""
    reserved = sum(usd for other, usd in money.reserved.items() if other != trial)
    others = f", ${reserved:.4f} are reserved for trials that run" if reserved else ""
    restart = ", and for a restart after a preemption" if machine.restart_usd_per_hour is not None else ""
    return (
        f"${money.total_spent:.4f} of ${work.usd:g} are spent (measured hours x {machine.price.basis}){others}: too little is "
        f"left for {run.path.name}, which takes {duration(machine.start_seconds)} to start and "
        f"{duration(machine.interval_seconds)} to a checkpoint{restart}"
    )


def exhausted(work: Work, run: RunFolder, ceiling: float | None, seconds: float) -> bool:
    """Whether the run's own meter would refuse to begin with that ceiling, so many seconds from now: a program costs money before
    its meter runs."""
    machine = work.machine
    if ceiling is None or machine.price is None:
        return False
    clock = None if machine.provisioned else (lambda: 0.0)
    meter = Meter(
        account_of(run),
        MachineTime(provisioned=machine.provisioned, age=clock),
        machine.price,
        Ceilings(run_usd=ceiling),
        restart_usd_per_hour=machine.restart_usd_per_hour,
    )
    return meter.check_start(machine.interval_seconds + seconds) is not None
