"""How a trial's settings are chosen: from the grid, or by optuna's TPE sampler from the losses of the trials before it.

A search sees the losses at the first comparison, which every trial has at equal steps. It begins anew for each trial, from the
files alone and a seed of its own, so a sweep that goes on after a kill chooses what it would have chosen.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.errors import UserError
from finetune.runtime.installed import install_command
from finetune.sweep.folder import Sweep, SweepFolder, losses
from finetune.sweep.space import Axis, number

MOST_TRIES = 50
"""How often the search is asked for settings that no trial has yet; then it may repeat some."""
Settings = tuple[str, ...]


@dataclass(frozen=True)
class Seen:
    """A trial that has been chosen. loss: at the first comparison; None while it is not known, or if there is none."""

    settings: Settings
    loss: float | None
    ended: bool


def chooser(sweep: Sweep, folder: SweepFolder, axes: Sequence[Axis]) -> Callable[[int], Settings]:
    """The settings of a trial that has none yet."""
    if sweep.search == "grid":
        return lambda trial: tuple(sweep.grid[trial])

    def chosen(trial: int) -> Settings:
        results, earlier = losses(folder.results()), folder.trials()
        seen = [
            Seen(tuple(one.settings), results.get((number, 0)), (number, 0) in results)
            for number, one in sorted(earlier.items())
        ]
        return suggest(axes, seen, sweep.seed + trial)

    return chosen


def check_installed() -> None:
    if importlib.util.find_spec("optuna") is None:
        raise UserError(
            f"--search optuna: optuna is not installed in this environment; run `{install_command('train')}`",
            code="sweep.no_optuna",
        )


def suggest(axes: Sequence[Axis], seen: Sequence[Seen], seed: int) -> Settings:
    """Settings for the next trial."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spaces = {axis.key: _distribution(axis) for axis in axes}
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    for one in seen:
        values = {axis.key: _value(axis, word) for axis, word in zip(axes, one.settings, strict=True)}
        state = optuna.trial.TrialState
        if one.loss is not None:
            known = optuna.trial.create_trial(params=values, distributions=spaces, value=one.loss)
        elif one.ended:
            known = optuna.trial.create_trial(params=values, distributions=spaces, state=state.FAIL)
        else:
            known = optuna.trial.create_trial(params=values, distributions=spaces, state=state.RUNNING)
        study.add_trial(known)
    taken = {one.settings for one in seen}
    settings: Settings = ()
    for _ in range(MOST_TRIES):
        asked: Mapping[str, Any] = study.ask(fixed_distributions=spaces).params
        settings = tuple(f"{axis.key}={_word(axis, asked[axis.key])}" for axis in axes)
        if settings not in taken:
            break
    return settings


def _distribution(axis: Axis) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    span = axis.range
    if span is None:
        return CategoricalDistribution(axis.values)
    if span.whole:
        return IntDistribution(int(span.low), int(span.high), log=span.is_log)
    return FloatDistribution(span.low, span.high, log=span.is_log)


def _value(axis: Axis, word: str) -> Any:
    text = word.partition("=")[2]
    if axis.range is None:
        return text
    return int(text) if axis.range.whole else float(text)


def _word(axis: Axis, value: Any) -> str:
    """A number with four digits: a trial's settings are read by people."""
    if axis.range is None:
        return str(value)
    if axis.range.whole:
        return number(value, True)
    return repr(min(max(float(f"{value:.4g}"), axis.range.low), axis.range.high))
