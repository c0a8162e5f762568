"""The report of a sweep: report/sweep.html and sweep.json in its folder, with every trial's losses, standing and dollars."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.budget.attempts import Account
from finetune.budget.ledger import Ledger
from finetune.errors import UserError
from finetune.report.pages import pages
from finetune.report.plots import Curve, Series, draw_curves
from finetune.report.source import number, read_evaluation
from finetune.run_folder import RunFolder
from finetune.run_name import SWEEPS
from finetune.run_record import RunRecord
from finetune.runtime.files import write_json, write_text
from finetune.runtime.table import aligned
from finetune.sweep.folder import Result, Sweep, SweepFolder, losses
from finetune.sweep.grants import account_of
from finetune.sweep.halving import best, places, quotas
from finetune.sweep.space import label

STANDINGS = {"done": "done", "next": "not trained further", "waits": "waits for others", "stopped": "stopped"}


@dataclass(frozen=True)
class TrialRow:
    """losses: at each comparison and at the end; None where it was not. usd, hours: measured. accuracy: of its score, if it has
    one."""

    trial: int
    run: str
    settings: str
    losses: list[float | None]
    standing: str
    steps: int | None
    usd: float | None
    hours: float
    accuracy: float | None
    is_best: bool


@dataclass(frozen=True)
class SweepReport:
    """trials: the attempts of all trials; own: those that the sweep's machines cost besides them. lines: the table for the
    console. problems: what could not be read or counted, one line each."""

    sweep: Sweep
    rows: list[TrialRow]
    curves: list[Curve]
    trials: Account
    own: Account
    page: Path
    problems: list[str]

    @property
    def lines(self) -> list[str]:
        return [
            *aligned([self.header, *map(self.cells, self.rows)], "l" * 2 + "r" * (len(self.header) - 3) + "l"),
            self.cost,
            *(f"problem: {problem}" for problem in self.problems),
        ]

    @property
    def every(self) -> Account:
        return Account(self.trials.attempts + self.own.attempts)

    @property
    def header(self) -> tuple[str, ...]:
        steps = [f"loss at {step}" for step in self.sweep.rungs]
        accuracy = ("accuracy",) if any(row.accuracy is not None for row in self.rows) else ()
        return ("run", "settings", *steps, "at the end", *accuracy, "$", "hours", "")

    def cells(self, row: TrialRow) -> tuple[str, ...]:
        found = ["" if loss is None else f"{loss:.4f}" for loss in row.losses]
        accuracy = [] if "accuracy" not in self.header else ["" if row.accuracy is None else f"{row.accuracy:.1%}"]
        usd = "" if row.usd is None else f"{row.usd:.4f}"
        standing = f"{row.standing}{', best so far' if row.is_best else ''}"
        return (row.run, row.settings, *found, *accuracy, usd, f"{row.hours:.3f}", standing)

    @property
    def cost(self) -> str:
        whole = (
            f"{self.every.hours:.3f} h on the meters (measured), no price"
            if self.every.usd is None
            else f"{_amount(self.every)} (measured hours x the price of each machine)"
        )
        return f"{whole}; of that {_amount(self.own)} besides the trials" if self.own.attempts else whole

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.sweep.name,
            "space": dict(self.sweep.space),
            "search": self.sweep.search,
            "eta": self.sweep.eta,
            "rungs": list(self.sweep.rungs),
            "usd": self.every.usd,
            "own_usd": self.own.usd if self.own.attempts else 0.0,
            "hours": self.every.hours,
            "own_hours": self.own.hours,
            "attempts": len(self.trials.attempts),
            "own_attempts": len(self.own.attempts),
            "problems": self.problems,
            "basis": "measured hours x the price of each machine",
            "best": next((row.run for row in self.rows if row.is_best), None),
            "trials": [asdict(row) for row in self.rows],
        }


def is_sweep(folder: Path) -> bool:
    return folder.resolve().parent.name == SWEEPS and (folder / "sweep.json").is_file()


def write_sweep(path: Path) -> SweepReport:
    """path: a sweep's folder. Raises UserError if it is none, or if a file in it is broken."""
    path = path.resolve()
    if not is_sweep(path):
        raise UserError(f"{path}: not the folder of a sweep (no sweep.json in it)", code="sweep.not_found")
    folder = SweepFolder(path.parent.parent, path.name)
    report = _read(folder)
    folder.report.mkdir(exist_ok=True)
    write_json(folder.report / "sweep.json", report.as_json())
    plot = draw_curves("Validation loss of the trials", report.curves, report.sweep.rungs)
    content = {"report": report, "rows": [(row, report.cells(row)) for row in report.rows], "plot": plot}
    write_text(report.page, pages().get_template("sweep.html.j2").render(content))
    return report


def _read(folder: SweepFolder) -> SweepReport:
    sweep, results, trials = folder.read(), folder.results(), folder.trials()
    allowed = quotas(sweep.trials, sweep.eta, len(sweep.rungs))
    leader = best(losses(results))
    rows, curves, accounts, problems = [], [], list[Account](), list[str]()
    for trial, place in enumerate(places(sweep.trials, allowed, losses(results))):
        run = folder.run_of(sweep, trial)
        record, account = _record(run), account_of(run)
        accounts.append(account)
        at = [results.get((trial, rung)) for rung in range(len(allowed))]
        settings = trials[trial].settings if trial in trials else (sweep.grid[trial] if sweep.grid else ())
        is_best = leader is not None and leader[0] == trial
        rows.append(
            TrialRow(
                trial=trial,
                run=run.path.name,
                settings=label(settings) or "not chosen yet",
                losses=[result.loss if result else None for result in at],
                standing=_standing(place.standing, at),
                steps=record.steps.done if record.steps else None,
                usd=account.usd,
                hours=account.hours,
                accuracy=_accuracy(run, problems),
                is_best=is_best,
            )
        )
        kind = "best" if is_best else "done" if place.standing == "done" else "stopped"
        curves.append(Curve(f"t{trial:02d}", _validation(record), kind))
    own = Ledger(folder.path / "ledger", "sweep").account()
    of_trials = Account(tuple(attempt for account in accounts for attempt in account.attempts))
    ledgers = {row.run: account for row, account in zip(rows, accounts, strict=True)} | {"the sweep itself": own}
    problems += _not_counted(ledgers)
    return SweepReport(sweep, rows, curves, of_trials, own, folder.report / "sweep.html", problems)


def _not_counted(ledgers: Mapping[str, Account]) -> list[str]:
    """What is not in the hours and dollars. ledgers: by what they are of."""
    problems = [problem for account in ledgers.values() for problem in account.problems]
    unpriced = [name for name, account in ledgers.items() if account.attempts and account.usd is None]
    if unpriced and any(account.usd is not None for account in ledgers.values()):
        problems.append(f"no price for any attempt of {', '.join(unpriced)}; not in the dollars")
    return problems


def _amount(account: Account) -> str:
    number_of = len(account.attempts)
    usd = "" if account.usd is None else f"${account.usd:.4f} and "
    return f"{usd}{account.hours:.3f} h in {number_of} attempt{'' if number_of == 1 else 's'}"


def _standing(standing: str, at: list[Result | None]) -> str:
    known = [result for result in at if result]
    if not known:
        return "not compared yet"
    if standing == "stopped":
        last = known[-1]
        return f"stopped: {last.why}" if last.loss is None else f"stopped after step {last.step}"
    return STANDINGS[standing]


def _record(run: RunFolder) -> RunRecord:
    return run.record() if run.run_json.exists() else RunRecord()


def _validation(record: RunRecord) -> Series:
    found = {row["step"]: row.get("eval_loss") for row in record.history or () if row.get("eval_loss") is not None}
    return [(float(step), float(loss)) for step, loss in sorted(found.items()) if step is not None and loss is not None]


def _accuracy(run: RunFolder, problems: list[str]) -> float | None:
    """problems: where a score that cannot be read is added."""
    try:
        return number(read_evaluation(run.path), "models.tuned.execution_accuracy")
    except UserError as error:
        problems.append(str(error))
        return None
