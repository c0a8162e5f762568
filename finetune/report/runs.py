"""All runs of a folder side by side: what `finetune runs` shows.

From run.json, eval.json and the ledger, each of which may be missing or damaged: such a run has a row all the same, which says
what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from finetune.budget.ledger import Ledger
from finetune.errors import UserError
from finetune.report.source import UNKNOWN, Json, dig, dollars, figure, number, read_evaluation
from finetune.run_folder import RunFolder
from finetune.run_record import RunRecord, read_record
from finetune.runtime.console import visible
from finetune.runtime.files import names_in
from finetune.runtime.table import aligned

SortKey = Literal["started", "name", "score", "usd", "point"]
HEAD = ("run", "status", "model", "steps", "right", "95% interval", "hours", "$", "$ a point", "started")
NAME_CHARACTERS = 40
"""Of names and models in the table; --json has them whole."""


@dataclass(frozen=True)
class RunRow:
    """One run. Everything but the name is None where it is unknown.

    accuracy, base_accuracy: shares of the questions. interval: 95%, over questions. hours, usd: of all attempts and of scores by
    a job, from the ledger: measured seconds times the price of the machine. usd_per_point: US dollars a point (1% of the
    questions) gained. problem: what could not be read, or is not in the hours and dollars.
    """

    name: str
    status: str | None = None
    model: str | None = None
    started_at: str | None = None
    steps: int | None = None
    steps_planned: int | None = None
    questions: int | None = None
    accuracy: float | None = None
    interval: tuple[float, float] | None = None
    base_accuracy: float | None = None
    hours: float | None = None
    usd: float | None = None
    usd_per_point: float | None = None
    problem: str | None = None

    def as_dict(self) -> dict[str, Any]:
        basis = {"hours": "measured", "usd": "measured seconds x the machine's price", "score": "measured"}
        return asdict(self) | {"basis": basis}


def rows_of(folder: Path) -> list[RunRow]:
    """A row for every run in the folder, by name. Raises UserError if that is no folder, or cannot be listed."""
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise UserError(
            f"{folder}: expected a folder of runs, found {found}; `finetune train CONFIG` makes the first one",
            code="run.not_found",
        )
    runs = [RunFolder(folder / name) for name in sorted(names_in(folder)) if not name.startswith(".")]
    return [_row(run) for run in runs if run.config_yaml.is_file() or run.run_json.is_file()]


def in_order(rows: Sequence[RunRow], key: SortKey) -> list[RunRow]:
    """By this key, the newest, best or cheapest first; what is unknown comes last, and equals are in the order of their names."""
    by_name = sorted(rows, key=lambda row: row.name)
    if key == "name":
        return by_name
    value: Callable[[RunRow], float | str | None] = {
        "started": lambda row: row.started_at,
        "score": lambda row: row.accuracy,
        "usd": lambda row: row.usd,
        "point": lambda row: row.usd_per_point,
    }[key]
    known = [row for row in by_name if value(row) is not None]
    return [
        *sorted(known, key=value, reverse=key in ("started", "score")),  # type: ignore[arg-type]
        *(row for row in by_name if value(row) is None),
    ]


def table(rows: Sequence[RunRow]) -> list[str]:
    """The rows as aligned lines, and below them what is wrong with them and what the columns are."""
    if not rows:
        return ["no runs"]
    lines = aligned([HEAD, *(_cells(row) for row in rows)], "llllrrrrrl")
    lines += [f"{_short(row.name)}: {visible(row.problem, one_line=True)}" for row in rows if row.problem]
    return [
        *lines,
        "right: of the questions of each run's evaluation; 95% interval over questions. hours and $: training, and scores in the "
        "cloud, measured seconds times the machine's price; a score by hand is not in them.",
        "$ a point: dollars for each point (1% of the questions) gained over the base model.",
    ]


def _row(run: RunFolder) -> RunRow:
    row, problems = RunRow(run.path.name), list[str]()
    for part in (_of_record, _of_evaluation, _of_ledger):
        try:
            found = part(run)
        except UserError as error:
            problems.append(str(error))
        else:
            problems += found.pop("problems", ())
            row = replace(row, **found)
    return replace(row, problem="; ".join(problems) or None)


def _of_record(run: RunFolder) -> dict[str, Any]:
    if not run.run_json.is_file():
        return {"status": "not started"}
    record: RunRecord = read_record(run.run_json)
    return {
        "status": record.status,
        "model": record.model.name if record.model else None,
        "started_at": record.started_at,
        "steps": record.steps.done if record.steps else None,
        "steps_planned": record.steps.planned if record.steps else None,
    }


def _of_evaluation(run: RunFolder) -> dict[str, Any]:
    found = read_evaluation(run.path)
    tuned: Json = dig(found, "models.tuned") or {}
    interval = tuned.get("execution_accuracy_interval95")
    return {
        "questions": tuned.get("questions"),
        "accuracy": number(tuned, "execution_accuracy"),
        "interval": (float(interval[0]), float(interval[1])) if interval else None,
        "base_accuracy": number(found, "models.base.execution_accuracy"),
        "usd_per_point": number(found, "cost.usd_per_point"),
    }


def _of_ledger(run: RunFolder) -> dict[str, Any]:
    account = Ledger(run.ledger).account()
    return {"hours": account.hours if account.attempts else None, "usd": account.usd, "problems": account.problems}


def _cells(row: RunRow) -> tuple[str, ...]:
    planned = "" if row.steps_planned is None else f" of {row.steps_planned}"
    return (
        _short(row.name),
        _short(row.status),
        _short(row.model),
        UNKNOWN if row.steps is None else f"{row.steps}{planned}",
        UNKNOWN if row.accuracy is None else f"{row.accuracy:.1%}",
        UNKNOWN if row.interval is None else f"{100 * row.interval[0]:.1f} to {100 * row.interval[1]:.1f}",
        figure(row.hours, "{:,.2f}"),
        dollars(row.usd).removeprefix("$"),
        dollars(row.usd_per_point).removeprefix("$"),
        _short((row.started_at or UNKNOWN)[:16].replace("T", " ")),
    )


def _short(text: str | None) -> str:
    shown = visible(text or UNKNOWN, one_line=True)
    return shown if len(shown) <= NAME_CHARACTERS else f"{shown[: NAME_CHARACTERS - 1]}…"
