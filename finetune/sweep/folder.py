"""A sweep's folder: what it is, which trials it has, and what has been decided, in files that are written once.

<runs>/sweeps/<name>/sweep.json          what the sweep is; the same command with anything else is refused
                     config.yaml         the config without the keys that differ: every trial is trained from it
                     trials/tNN.json     the run and the settings of a trial
                     results/tNN-rK.json its validation loss at a rung, or why it has none
                     grants/             dollars that a trial may use (grants.py)
                     lease/, workers/    who decides now, and who works on the sweep
                     ledger/             what its machines have cost besides the trials
                     sweep.html, sweep.json of the report: report/

A trial is an ordinary run in <runs>/<name>-tNN. A file that is there is complete; what a kill has left out is done again, with
the same outcome.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from finetune.config.load import config_hash, from_dict, to_dict, to_yaml
from finetune.config.resume_rules import decide
from finetune.errors import UserError, shown
from finetune.run_folder import RunFolder
from finetune.run_name import SWEEPS, fault_of_name
from finetune.runtime.files import names_in, read_json, remove_unfinished, write_json, write_text
from finetune.runtime.typed_json import Mismatch, decode, encode
from finetune.sweep.halving import Results
from finetune.sweep.space import Space

MADE_BY = "finetune sweep CONFIG ..."
MOST_NAME = 90
"""Characters of a sweep's name: those of its trials are longer."""
_RESULT = re.compile(r"t([0-9]{2,3})-r([0-9]{1,2})\.json")
_TRIAL = re.compile(r"t([0-9]{2,3})\.json")
Kind = TypeVar("Kind")


@dataclass
class Sweep:
    """sweep.json. space: key -> its values as typed. trials: how many. eta: of the trials at a rung, one of so many goes on.
    rungs: the optimizer steps of the comparisons. grid: the overrides of each trial; empty where a search chooses them."""

    name: str
    config: Mapping[str, Any]
    config_hash: str
    space: Mapping[str, str]
    search: str
    trials: int
    seed: int
    eta: int
    rungs: Sequence[int]
    grid: Sequence[Sequence[str]]


@dataclass
class Trial:
    """trials/tNN.json. run: the name of its folder."""

    trial: int
    run: str
    settings: Sequence[str]


@dataclass
class Result:
    """results/tNN-rK.json. step: the optimizer step of the loss. loss: None if there is none; why: then, for people."""

    trial: int
    rung: int
    step: int | None
    loss: float | None
    why: str


class SweepFolder:
    """runs: the folder of the runs, training.output_dir."""

    def __init__(self, runs: Path, name: str) -> None:
        self.runs, self.path = runs, runs / SWEEPS / name

    @property
    def as_run(self) -> RunFolder:
        """For what a sweep has in common with a run: a lease and a ledger."""
        return RunFolder(self.path)

    @property
    def config_yaml(self) -> Path:
        return self.path / "config.yaml"

    @property
    def sweep_json(self) -> Path:
        return self.path / "sweep.json"

    @property
    def report(self) -> Path:
        return self.path / "report"

    def read(self) -> Sweep:
        """Raises UserError if it is missing, or not what a sweep writes."""
        sweep = _read(Sweep, self.sweep_json)
        from_dict(dict(sweep.config), str(self.sweep_json))
        if not (0 < sweep.trials < 1000 and sweep.eta >= 2 and sorted(set(sweep.rungs)) == list(sweep.rungs)):
            raise UserError(f"{self.sweep_json}: trials, eta and rungs contradict each other", code="sweep.bad_record")
        return sweep

    def create(self, sweep: Sweep) -> None:
        """Writes the sweep, unless it is there already. Raises UserError if another one is there."""
        if self.sweep_json.exists():
            _check_same(self.sweep_json, self.read(), sweep)
        else:
            write_json(self.sweep_json, encode(sweep))
        if not self.config_yaml.exists():
            config = from_dict(dict(self.read().config), str(self.sweep_json))
            write_text(self.config_yaml, f"# the trials of the sweep {sweep.name}\n{to_yaml(config)}")

    def run_of(self, sweep: Sweep, trial: int) -> RunFolder:
        return RunFolder(self.runs / f"{sweep.name}-t{trial:02d}")

    def trials(self) -> dict[int, Trial]:
        """Those that have been chosen so far."""
        found = [_read(Trial, path) for path, _ in _numbered(self.path / "trials", _TRIAL)]
        return {trial.trial: trial for trial in found}

    def add_trial(self, trial: Trial) -> None:
        _write_once(self.path / "trials" / f"t{trial.trial:02d}.json", trial)

    def results(self) -> dict[tuple[int, int], Result]:
        found = [_read(Result, path) for path, _ in _numbered(self.path / "results", _RESULT)]
        return {(result.trial, result.rung): result for result in found}

    def add_result(self, result: Result) -> None:
        _write_once(self.path / "results" / f"t{result.trial:02d}-r{result.rung}.json", result)


def _write_once(path: Path, value: Trial | Result) -> None:
    """By the one worker that may, after those before it that were killed while they wrote."""
    remove_unfinished(path.parent, path.name)
    write_json(path, encode(value))


def losses(results: Mapping[tuple[int, int], Result]) -> Results:
    return {place: result.loss for place, result in results.items()}


def new_sweep(name: str, space: Space, *, search: str, trials: int, seed: int, eta: int, rungs: Sequence[int]) -> Sweep:
    """Raises UserError for a name that no folder can have."""
    if (fault := fault_of_name(name)) or len(name) > MOST_NAME:
        raise UserError(f"--name: {fault or f'expected at most {MOST_NAME} characters'}", code="sweep.bad_name")
    return Sweep(
        name=name,
        config=to_dict(space.base),
        config_hash=config_hash(space.base),
        space={axis.key: axis.typed for axis in space.axes},
        search=search,
        trials=trials,
        seed=seed,
        eta=eta,
        rungs=list(rungs),
        grid=[list(settings) for settings in space.grid()] if search == "grid" else [],
    )


def _check_same(path: Path, before: Sweep, now: Sweep) -> None:
    """Raises UserError that says what differs. Keys of the config that change nothing that is learned may differ: the trials keep
    those that the sweep began with."""
    differences = [
        f"{name}: {shown(getattr(before, name))} -> {shown(getattr(now, name))}"
        for name in ("search", "trials", "seed", "eta", "rungs")
        if encode(getattr(before, name)) != encode(getattr(now, name))
    ]
    for key in dict.fromkeys([*before.space, *now.space]):
        if before.space.get(key) != now.space.get(key):
            differences.append(f"{key}: {before.space.get(key, 'not swept')} -> {now.space.get(key, 'not swept')}")
    changes = decide(dict(before.config), dict(now.config)).refused
    differences += [
        f"{change.key}: {shown(change.before)} -> {shown(change.now)}"
        for change in changes
        if change.key not in now.space
    ]
    if differences:
        raise UserError(
            f"{path}: is another sweep: {'; '.join(differences)}; choose another --name for a new one",
            code="sweep.other",
        )


def _numbered(folder: Path, pattern: re.Pattern[str]) -> Iterator[tuple[Path, re.Match[str]]]:
    for name in names_in(folder):
        if match := pattern.fullmatch(name):
            yield folder / name, match


def _read(kind: type[Kind], path: Path) -> Kind:
    try:
        return decode(kind, read_json(path, MADE_BY))
    except Mismatch as mismatch:
        raise UserError(
            f"{path}: {mismatch}; restore the file, or begin another sweep", code="sweep.bad_record"
        ) from None
