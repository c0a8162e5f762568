"""From a command line to a sweep: checked as a whole before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune.budget.run_budget import MIN_MINUTES
from finetune.config.schema import RunConfig
from finetune.errors import UserError
from finetune.machine.price import MachinePrice, dearest_usd_per_hour, facts, machine_price, provisioned
from finetune.sweep.folder import Sweep, SweepFolder, new_sweep
from finetune.sweep.rungs import check_compared, check_validated, rungs_of, steps_of
from finetune.sweep.search import check_installed, chooser
from finetune.sweep.space import MOST_TRIALS, Space, check_trials, parse_space
from finetune.sweep.turn import Machine


@dataclass(frozen=True)
class Wanted:
    """A sweep as it was typed. words: KEY=VALUE,VALUE. name: None for one after the config file."""

    config_file: Path
    words: list[str]
    name: str | None = None
    search: str = "grid"
    trials: int | None = None
    seed: int = 0
    eta: int = 2
    rungs: int = 2


@dataclass(frozen=True)
class Opened:
    """steps: of the whole training of the shortest trial."""

    sweep: Sweep
    folder: SweepFolder
    base: RunConfig
    steps: int
    settings_of: Callable[[int], tuple[str, ...]]

    def create(self) -> None:
        """Raises UserError if another sweep has that name."""
        self.folder.create(self.sweep)


@dataclass(frozen=True)
class Choice:
    """What a sweep chooses from. configs: of the trials, as far as they are known."""

    space: Space
    trials: int
    configs: list[RunConfig]


def choice_of(wanted: Wanted, *, elsewhere: bool = False) -> Choice:
    """Checks the space alone, without data. elsewhere: the sweep runs on another machine, which has what a search needs. Raises
    UserError."""
    space = parse_space(wanted.config_file, wanted.words)
    check_compared(space.base)
    if wanted.search == "grid":
        grid = space.grid()
        return Choice(space, len(grid), check_trials(wanted.config_file, space.fixed, grid))
    trials = wanted.trials or 0
    if not 0 < trials <= MOST_TRIALS:
        raise UserError(f"--trials: expected from 1 to {MOST_TRIALS}, found {trials:,}", code="sweep.too_many_trials")
    if not elsewhere:
        check_installed()
    return Choice(space, trials, [space.base])


def open_sweep(wanted: Wanted) -> Opened:
    """Raises UserError."""
    choice = choice_of(wanted)
    base, trials = choice.space.base, choice.trials
    check_validated(base)
    rungs = rungs_of(choice.configs, wanted.eta, most_rungs(trials, wanted))
    name = wanted.name or f"{wanted.config_file.stem}-sweep"
    sweep = new_sweep(
        name, choice.space, search=wanted.search, trials=trials, seed=wanted.seed, eta=wanted.eta, rungs=rungs
    )
    folder = SweepFolder(Path(base.training.output_dir), name)
    return Opened(sweep, folder, base, min(map(steps_of, choice.configs)), chooser(sweep, folder, choice.space.axes))


def most_rungs(trials: int, wanted: Wanted) -> int:
    """As many comparisons as are wanted; more than it takes to one trial would compare it with itself."""
    rungs = 0
    while trials > 1 and rungs < wanted.rungs:
        trials, rungs = -(-trials // wanted.eta), rungs + 1
    return rungs


def machine_of(config: RunConfig, usd: float | None) -> Machine:
    """This machine, for the budget. Raises UserError if it costs money and there is no budget, and if there is one and no
    price."""
    price = machine_price()
    if price is None and config.budget.usd_per_hour is not None:
        price = MachinePrice(config.budget.usd_per_hour, "budget.usd_per_hour of the config")
    if price is None and usd is not None:
        raise UserError(
            "--max-sweep-usd: the price of this machine is unknown (no launch policy started it); set budget.usd_per_hour",
            code="price.unknown",
        )
    if price is not None and usd is None:
        raise UserError(
            f"--max-sweep-usd: expected, because this machine costs ${price.usd_per_hour:g} an hour ({price.basis})",
            code="sweep.no_budget",
        )
    spot = provisioned() and bool(facts().get("spot"))
    minutes = config.checkpoint.every_minutes or MIN_MINUTES
    return Machine(price, provisioned(), dearest_usd_per_hour() if spot else None, 60 * minutes)
