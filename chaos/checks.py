"""The checks after all runs have ended. Each returns the violations that it finds, one line each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chaos.attempt import HEARTBEAT_SECONDS
from chaos.soak import Life, Run

TOLERANCE = 0.01
"""Largest relative error of the ledger against the clock."""


@dataclass(frozen=True)
class Loss:
    """Steps that the run had to repeat because of one kill. in_copy: those of them made while a checkpoint was being copied."""

    steps: int
    interval: int
    in_copy: int
    corrupt: bool

    @property
    def too_large(self) -> bool:
        return not self.corrupt and self.steps > self.interval + self.in_copy


@dataclass(frozen=True)
class Spend:
    """Seconds of the attempts in the ledger, by the harness's clock (real) and as booked. unbooked: seconds of attempts that died
    before their first ledger line; on a provisioned machine the next attempt books them. teardown: seconds of processes after
    their last line, while Python shut down."""

    real: float
    booked: float
    unbooked: float
    teardown: float
    kills: int

    @property
    def error(self) -> float:
        return self.booked / self.real - 1 if self.real else 0.0

    @property
    def allowance(self) -> float:
        """The largest fraction that kills between two heartbeats can lose from the ledger."""
        return self.kills * HEARTBEAT_SECONDS / self.real if self.real else 0.0


def losses(run: Run) -> list[Loss]:
    """For every attempt that died after completing steps: its last step minus the step that the run resumed from."""
    found = []
    for index, life in enumerate(run.lives[:-1]):
        later = run.lives[index + 1 :]
        end = next((number for number, each in enumerate(later) if each.attempt.resumed is not None), None)
        if life.attempt.done is None or end is None:
            continue
        between = [life, *later[:end]]
        resumed = later[end].attempt.resumed
        assert resumed is not None
        steps = max(0, life.attempt.done - resumed)
        in_copy = max(0, life.attempt.done - min(life.in_flight)) if life.in_flight else 0
        found.append(Loss(steps, run.kind.interval, in_copy, any(each.damage or each.full_disk for each in between)))
    return found


def check_end(run: Run) -> list[str]:
    """The run finished, and no attempt printed a traceback."""
    found = [f"{run.name}: did not finish: {run.fault}"] if run.fault else []
    return found + [
        f"{run.name}: attempt {number} ended in a traceback"
        for number, life in enumerate(run.lives, 1)
        if "Traceback (most recent call last)" in life.attempt.output
    ]


def check_weights(run: Run, whole: Run) -> list[str]:
    if run.adapter is not None and run.adapter == whole.adapter:
        return []
    return [f"{run.name}: the adapter is {_short(run.adapter)}, that of the uninterrupted run {_short(whole.adapter)}"]


def check_losses(run: Run) -> list[str]:
    found = [
        f"{run.name}: a kill cost {loss.steps} steps; the save interval is {loss.interval}, {loss.in_copy} made during a copy"
        for loss in losses(run)
        if loss.too_large
    ]
    for before, life in zip(run.lives, run.lives[1:], strict=False):
        resumed = life.attempt.resumed
        if resumed is not None and resumed != before.left:
            found.append(
                f"{run.name}: resumed from step {resumed}, but the newest intact save was of step {before.left}"
            )
    return found


def check_curves(run: Run, whole: Run) -> list[str]:
    """Every step occurs once, with the loss of the uninterrupted run, in run.json and in TensorBoard."""
    if run.fault:
        return []
    found = []
    for name, mine, other in (
        ("run.json", run.losses, whole.losses),
        ("TensorBoard", run.tensorboard, whole.tensorboard),
    ):
        steps, expected = [step for step, _ in mine], list(range(1, run.kind.steps + 1))
        if steps != expected:
            lost = sorted(set(expected) - set(steps))
            doubled = sorted({step for step in steps if steps.count(step) > 1})
            found.append(
                f"{run.name}: steps in {name}: missing {lost or 'none'}, repeated {doubled or 'none'}, {len(steps)} in all"
            )
        elif mine != other:
            first = next(
                step for (step, loss), (_, expected_loss) in zip(mine, other, strict=True) if loss != expected_loss
            )
            found.append(f"{run.name}: losses in {name} differ from the uninterrupted run's from step {first} on")
    return found


def check_orphans(run: Run) -> list[str]:
    partial_files = [name for name in run.orphans if not name.endswith(".tmp")]
    return [f"{run.name}: left a partial save behind: {', '.join(partial_files)}"] if partial_files else []


def spend(runs: Sequence[Run]) -> Spend:
    """Attempts on a full disk are left out: their ledger could not be written."""
    lives = [life for run in runs for life in run.lives if not life.full_disk]
    known = [life for life in lives if life.booked is not None]
    return Spend(
        real=sum(life.attempt.seconds for life in known),
        booked=sum(life.booked or 0.0 for life in known),
        unbooked=sum(life.attempt.seconds for life in lives if life.booked is None),
        teardown=sum(life.attempt.teardown for life in known),
        kills=sum(life.attempt.killed for life in known),
    )


def check_spend(runs: Sequence[Run], usd_per_hour: float) -> list[str]:
    found = []
    total = spend(runs)
    if not total.booked or abs(total.error) > TOLERANCE:
        found.append(f"spend: the ledger has {total.booked:.2f} s of {total.real:.2f} s ({total.error:+.2%})")
    for run in runs:
        lines = sum(life.booked or 0.0 for life in run.lives)
        if not run.fault and abs(run.spent_usd - lines / 3600 * usd_per_hour) > 0.01:
            found.append(
                f"{run.name}: the account says ${run.spent_usd:.2f}, its attempts come to ${lines / 3600 * usd_per_hour:.2f}"
            )
        found += [
            f"{run.name}: attempt {number} is booked with {life.booked:.2f} s and lived {life.attempt.lived:.2f} s"
            for number, life in enumerate(run.lives, 1)
            if _too_long(life)
        ]
    return found


def check_provisioned(name: str, total: Spend) -> list[str]:
    """Idle time and attempts that died early are in the ledger exactly once."""
    if abs(total.error) <= TOLERANCE:
        return []
    return [
        f"{name}: the ledger has {total.booked:.2f} s of {total.real:.2f} s that the machine was billed for ({total.error:+.2%})"
    ]


def _too_long(life: Life) -> bool:
    """Booked for longer than it lived: it may write to the ledger after its last write to run.json, with which `seconds` ends."""
    return life.booked is not None and life.booked > life.attempt.lived + 0.05


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "missing"
