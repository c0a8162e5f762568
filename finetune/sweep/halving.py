"""Successive halving: which trials go on, from their validation losses at equal steps.

A sweep has comparisons ("rungs") 0, 1, ... at fixed optimizer steps, and then the end of training. All trials train up to the
first rung; of those that reach rung k, the best 1/eta go on, at least one: `quotas`. A lower validation loss is better, and of
equal ones the trial with the lower number. A trial without a loss (training diverged or failed) does not go on.

A trial goes on as soon as it is certain to be among the best, whatever the missing losses will be, and is stopped as soon as it
is certain not to be. So the decisions do not depend on the order in which the losses arrive, or on how many machines work on it
(Jamieson and Talwalkar, 2016, "Non-stochastic best arm identification and hyperparameter optimization"; the asynchronous variant
of Li et al., 2020, promotes earlier, and its decisions depend on the order).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Results = Mapping[tuple[int, int], float | None]
"""(trial, rung) -> its validation loss there; None if it has none and never will."""
Standing = Literal["next", "waits", "stopped", "done"]


@dataclass(frozen=True)
class Place:
    """Where a trial stands. next: it may train to `rung`. waits: whether it goes on to `rung` depends on others. stopped: dropped
    at `rung`, for its loss or for having none. done: trained to the end, which is the last rung."""

    standing: Standing
    rung: int


def quotas(trials: int, eta: int, rungs: int) -> tuple[int, ...]:
    """How many trials may train up to each rung, and to the end."""
    found = [trials]
    for _ in range(rungs):
        found.append(max(1, math.ceil(found[-1] / eta)))
    return tuple(found)


def rung_steps(steps: int, eta: int, rungs: int) -> tuple[int, ...]:
    """The steps of the rungs of a training of so many: the last at 1/eta of it, the one before at 1/eta^2. Those that would not
    be at least one step apart are left out."""
    found = {max(1, round(steps / eta ** (rungs - rung))) for rung in range(rungs)}
    return tuple(sorted(step for step in found if step < steps))


def places(trials: int, allowed: tuple[int, ...], results: Results) -> list[Place]:
    """Of every trial. allowed: `quotas`, of which the last is for the end of training."""
    arriving = _arriving(trials, allowed, results)
    return [_place(trial, allowed, arriving, results) for trial in range(trials)]


def _arriving(trials: int, allowed: tuple[int, ...], results: Results) -> list[int]:
    """How many trials train up to each rung: exactly if all losses before it are known, else at most. Fewer than allowed if too
    many have no loss."""
    counts = [trials]
    for rung, most in enumerate(allowed[1:]):
        known = _known(results, rung)
        finite = sum(results[trial, rung] is not None for trial in known)
        counts.append(min(most, finite + counts[-1] - len(known)))
    return counts


def _place(trial: int, allowed: tuple[int, ...], arriving: list[int], results: Results) -> Place:
    last = len(allowed) - 1
    for rung in range(last + 1):
        if (trial, rung) not in results:
            return Place("next", rung)
        if results[trial, rung] is None:
            return Place("stopped", rung)
        if rung == last:
            break
        better = sum(key(results, other, rung) < key(results, trial, rung) for other in _known(results, rung))
        missing = arriving[rung] - len(_known(results, rung))
        if better >= allowed[rung + 1]:
            return Place("stopped", rung)
        if better + missing >= allowed[rung + 1]:
            return Place("waits", rung + 1)
    return Place("done", last)


def best(results: Results) -> tuple[int, int] | None:
    """(trial, rung) of the best loss at the highest rung that has one: losses at different steps are not compared."""
    finite = [place for place, loss in results.items() if loss is not None]
    highest = max((rung for _, rung in finite), default=0)
    return min((place for place in finite if place[1] == highest), key=lambda place: key(results, *place), default=None)


def key(results: Results, trial: int, rung: int) -> tuple[float, int]:
    """The order of the trials at a rung, the best first."""
    loss = results[trial, rung]
    return math.inf if loss is None else loss, trial


def _known(results: Results, rung: int) -> list[int]:
    return [trial for trial, at in results if at == rung]
