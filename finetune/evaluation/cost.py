"""What answers cost: seconds and tokens, measured; US dollars where the price of the machine is known.

Beside each file of answers stands one of the attempts that generated them, a line each, written once the model is loaded:

    {"at": "2026-11-29T12:00:00+00:00", "seconds_before": 12.5, "loading_seconds": 3.1, "usd_per_hour": 3.67, "basis": "..."}

So the dollars are those of the machines that did the work, also where the answers are only judged again, on a laptop. The seconds
of an attempt are those of the answers that it added; an attempt that was killed is counted as far as its answers were written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.budget.ledger import Ledger
from finetune.config.schema import BudgetSection
from finetune.data.records import read_lines
from finetune.errors import UserError
from finetune.evaluation.answers import AnswerFile
from finetune.evaluation.generators.base import LoadedModel
from finetune.machine.price import PLAUSIBLE_USD_PER_HOUR, MachinePrice, machine_price
from finetune.runtime.console import say
from finetune.runtime.files import disk_error

Load = Callable[[], LoadedModel]


@dataclass(frozen=True)
class Cost:
    """seconds: of generating, without loading. usd: of both, and of the judging that was counted; None where a price is unknown.
    basis: of the price."""

    seconds: float
    loading_seconds: float
    new_tokens: int
    usd: float | None
    basis: str | None

    def as_dict(self) -> dict[str, Any]:
        per_second = self.new_tokens / self.seconds if self.seconds > 0 else None
        return {
            "seconds": round(self.seconds, 3),
            "loading_seconds": round(self.loading_seconds, 3),
            "new_tokens": self.new_tokens,
            "new_tokens_per_second": None if per_second is None else round(per_second, 1),
            "usd": None if self.usd is None else round(self.usd, 6),
            "usd_basis": self.basis,
        }


def evaluation_price(budget: BudgetSection) -> MachinePrice | None:
    """The price of this machine, from the launch's price table or else from the config; None if neither has one. A table that
    cannot be read is named, and is no reason to score nothing."""
    try:
        price = machine_price()
    except UserError as error:
        say(f"the dollars of this evaluation are unknown: {error}")
        return None
    if price is None and budget.usd_per_hour is not None:
        price = MachinePrice(budget.usd_per_hour, "budget.usd_per_hour of the config")
    return price


def noting(
    answers: AnswerFile,
    load: Load,
    price: Callable[[], MachinePrice | None],
    clock: Callable[[], float] = time.monotonic,
) -> Load:
    """`load`, which also records the attempt beside the answers. clock: seconds."""

    def load_and_note() -> LoadedModel:
        began = clock()
        model = load()
        _note(answers, clock() - began, price())
        return model

    return load_and_note


def cost_of(answers: Sequence[AnswerFile]) -> Cost:
    """What these answers cost together."""
    known = [(file, _attempts(file)) for file in answers]
    usd = [_usd(file, attempts) for file, attempts in known]
    bases = dict.fromkeys(attempt.basis for _, attempts in known for attempt in attempts if attempt.basis)
    return Cost(
        seconds=sum(file.seconds for file in answers),
        loading_seconds=sum(attempt.loading_seconds for _, attempts in known for attempt in attempts)
        + sum(file.loading_within for file in answers),
        new_tokens=sum(answer.new_tokens for file in answers for answer in file.answers.values()),
        usd=None if None in usd else sum(filter(None, usd)),
        basis=" and ".join(bases) or None,
    )


def training_usd(ledger: Path) -> float | None:
    """What all attempts of the run's training have cost; None if unknown."""
    try:
        account = Ledger(ledger).account().of("train")
    except UserError:
        return None
    unpriced = any(attempt.usd is None for attempt in account.attempts)
    return None if unpriced or not account.attempts else account.usd


def whole_cost(answers: Sequence[AnswerFile], scores: dict[str, Any], training: float | None) -> dict[str, Any]:
    """`cost` of eval.json: of the greedy answers of all models, and of a point gained. scores: `models` of eval.json. training:
    the US dollars of the run's training; None if unknown."""
    cost = cost_of(answers)
    right = [scores[name]["execution_accuracy"] for name in ("base", "tuned") if name in scores]
    points = 100 * (right[1] - right[0]) if len(right) == 2 else None
    per_point = usd_per_point(training, cost.usd, points)
    return cost.as_dict() | {
        "training_usd": None if training is None else round(training, 6),
        "points_gained": None if points is None else round(points, 3),
        "usd_per_point": None if per_point is None else round(per_point, 6),
    }


def usd_per_point(training: float | None, evaluation: float | None, gain_points: float | None) -> float | None:
    """US dollars of training and evaluation for each point (1% of the questions) that the tuned model gained; None where nothing
    was gained, or a price is unknown."""
    if training is None or evaluation is None or gain_points is None or gain_points <= 0:
        return None
    return (training + evaluation) / gain_points


@dataclass(frozen=True)
class _Attempt:
    seconds_before: float
    loading_seconds: float
    usd_per_hour: float | None
    basis: str | None


def attempts_path(answers: Path) -> Path:
    return answers.with_suffix(".attempts.jsonl")


def _note(answers: AnswerFile, loading_seconds: float, price: MachinePrice | None) -> None:
    line = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds_before": round(answers.seconds, 3),
        "loading_seconds": round(loading_seconds, 3),
        "usd_per_hour": price.usd_per_hour if price else None,
        "basis": price.basis if price else None,
    }
    path = attempts_path(answers.path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if answers.answers else "w", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise disk_error(error, path) from error


def _attempts(answers: AnswerFile) -> list[_Attempt]:
    """The attempts, without lines that are damaged."""
    path = attempts_path(answers.path)
    try:
        lines = [line.value for line in read_lines(path) if not line.problem]
    except (UserError, OSError):
        return []
    return [attempt for line in lines if (attempt := _attempt(line))]


def _attempt(line: Any) -> _Attempt | None:
    try:
        before, loading = float(line["seconds_before"]), float(line["loading_seconds"])
        usd, basis = line["usd_per_hour"], line["basis"]
    except (TypeError, ValueError, KeyError):
        return None
    lowest, highest = PLAUSIBLE_USD_PER_HOUR
    usable = isinstance(usd, int | float) and not isinstance(usd, bool) and lowest <= usd <= highest
    if not (0 <= before < float("inf") and 0 <= loading < float("inf")):
        return None
    return _Attempt(before, loading, float(usd) if usable else None, str(basis) if usable and basis else None)


def _usd(answers: AnswerFile, attempts: Sequence[_Attempt]) -> float | None:
    """None if an attempt has no price, or none is known for the first answers."""
    if not attempts or attempts[0].seconds_before > 0:
        return None
    ends = [*(attempt.seconds_before for attempt in attempts[1:]), answers.seconds]
    total = 0.0
    for attempt, end in zip(attempts, ends, strict=True):
        if attempt.usd_per_hour is None:
            return None
        seconds = max(0.0, end - attempt.seconds_before) + attempt.loading_seconds
        total += attempt.usd_per_hour * seconds / 3600
    return total + (attempts[-1].usd_per_hour or 0.0) * answers.loading_within / 3600
