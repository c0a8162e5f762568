"""How a run is doing right now: what `finetune watch` shows, from run.json, eval.json and the ledger."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from finetune.budget.attempts import Account, Attempt
from finetune.budget.ledger import Ledger
from finetune.errors import UserError
from finetune.report.source import Json, dig, finite, number, read_evaluation
from finetune.run_folder import RunFolder
from finetune.run_record import RunRecord, UsageRecord
from finetune.runtime.console import visible
from finetune.runtime.quantities import duration, hours_text, usd_text

BARS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 40
MOST_ATTEMPTS = 6
QUIET_SECONDS = 600.0
"""A run that says it is running and has written nothing for so long may be gone: training writes at every log, and every attempt
a heartbeat each 30 s."""


@dataclass(frozen=True)
class Watched:
    """A look at a run. seconds_ago: since run.json was last written, as far as this computer knows. live: the attempts that are
    still at it. problems: what could not be read or counted, one line each."""

    run: RunRecord
    account: Account
    evaluation: Json
    seconds_ago: float | None
    live: tuple[Attempt, ...]
    problems: tuple[str, ...]


def look(folder: Path, now: float) -> Watched:
    """now: seconds since the epoch. Raises UserError if run.json is missing or damaged."""
    run = RunFolder(folder)
    record, account = run.record(), Ledger(run.ledger).account()
    problems = account.problems
    try:
        evaluation = read_evaluation(folder)
    except UserError as error:
        evaluation, problems = {}, (*problems, str(error))
    written = run.run_json.stat().st_mtime
    return Watched(record, account, evaluation, max(0.0, now - written), _live(record, account, now), problems)


def _live(run: RunRecord, account: Account, now: float) -> tuple[Attempt, ...]:
    """Of each work the last attempt, if it is still at it. Of training run.json says that; of a score, which it knows nothing of,
    the heartbeats do, by the time inside the file: a copy of the folder may have lost the file's own."""
    last = {attempt.work: attempt for attempt in account.attempts}.values()
    return tuple(
        attempt
        for attempt in last
        if attempt.reason is None
        and (run.status == "running" if attempt.work == "train" else _is_heard_of(attempt, now))
    )


def _is_heard_of(attempt: Attempt, now: float) -> bool:
    return attempt.heard_at is not None and now - attempt.heard_at < QUIET_SECONDS


def lines(seen: Watched, most: int = MOST_ATTEMPTS) -> list[tuple[str, str]]:
    """(label, text) for everything that is known, in the order in which it is shown. most: attempts that are listed, the last."""
    run, parts = seen.run, _Parts()
    parts.add("status", _status(seen))
    parts.add("steps", _steps(run))
    parts.add("loss", _curve(run, "loss"))
    parts.add("validation", _curve(run, "eval_loss"))
    parts.add("speed", _speed(run))
    parts.add("memory", _memory(run))
    parts.add("dollars", _of_ceiling(seen, "usd"))
    parts.add("hours", _of_ceiling(seen, "hours"))
    parts.add("score", _score(seen.evaluation))
    parts.add("attempts", _attempts(seen, most))
    begun = sorted(seen.account.attempts, key=lambda attempt: attempt.began_at or "unknown")
    for attempt in begun[-most:]:
        parts.add(attempt.name, _attempt(attempt, live=attempt in seen.live))
    for problem in seen.problems:
        parts.add("problem", problem)
    return parts.found


def as_json(seen: Watched) -> dict[str, Any]:
    """One look, for other programs. Money, time and memory say where they come from; None where something is unknown."""
    run, spending = seen.run, seen.run.spending or UsageRecord()
    left = _seconds_left(run) if run.status == "running" else None
    peak = finite(run.memory.measured_peak_gib) if run.memory else None
    if peak is None and run.peak_memory_gib is not None:
        peak = finite(run.peak_memory_gib.value)
    return {
        "status": run.status,
        "seconds_since_written": seen.seconds_ago,
        "steps": run.steps.done if run.steps else None,
        "steps_planned": run.steps.planned if run.steps else None,
        "epochs": run.epochs,
        "history": list(run.history or []),
        "tokens_per_second": finite(run.tokens_per_second),
        "peak_memory_gib": peak,
        "usd": seen.account.usd if seen.account.attempts else finite(spending.usd),
        "ceiling_usd": finite(spending.ceiling_usd),
        "projected_usd": finite(spending.projected_usd) if run.status == "running" else None,
        "hours": seen.account.hours if seen.account.attempts else finite(spending.hours),
        "ceiling_hours": finite(spending.ceiling_hours),
        "seconds_left": left,
        "preemptions": sum(attempt.preempted for attempt in seen.account.attempts),
        "ended_without_notice": len(_without_notice(seen)),
        "attempts": [_attempt_json(attempt) for attempt in seen.account.attempts],
        "accuracy": number(seen.evaluation, "models.tuned.execution_accuracy"),
        "base_accuracy": number(seen.evaluation, "models.base.execution_accuracy"),
        "problems": list(seen.problems),
        "basis": {
            "tokens_per_second": "measured", "peak_memory_gib": "measured", "hours": "measured", "seconds_left": "estimated",
            "usd": "measured seconds x the machine's price", "projected_usd": "estimated",
        },
    }  # fmt: skip


def _attempt_json(attempt: Attempt) -> dict[str, Any]:
    names = ("name", "gpu", "spot", "zone", "usd_per_hour", "usd", "seconds", "step", "preempted")
    return {name: getattr(attempt, name) for name in names} | {"end": attempt.reason}


class _Parts:
    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []

    def add(self, label: str, text: str) -> None:
        if text:
            self.found.append((label, visible(text, one_line=True)))


def _status(seen: Watched) -> str:
    status, ago = seen.run.status or "unknown", seen.seconds_ago
    if status != "running" or ago is None:
        return status
    said = f"running, last heard of {duration(ago)} ago"
    return said if ago < QUIET_SECONDS else f"{said}: it may be gone; a managed job starts another attempt by itself"


def _steps(run: RunRecord) -> str:
    if run.steps is None:
        return ""
    done, planned = run.steps.done, run.steps.planned
    if not planned:
        return f"{done}"
    text = f"{bar(done / planned)} {done} of {planned}"
    if run.epochs is not None:
        text += f", epoch {run.epochs:.2f}"
    left = _seconds_left(run)
    return text if left is None or run.status != "running" else f"{text}, {duration(left)} left (estimated)"


def _seconds_left(run: RunRecord) -> float | None:
    """At the tokens a second of the last log, if a step has as many tokens as those so far."""
    trained = run.tokens.trained if run.tokens else None
    rate, steps = finite(run.tokens_per_second), run.steps
    if not (trained and rate and steps and steps.done and steps.planned):
        return None
    return max(0, steps.planned - steps.done) * (trained / steps.done) / rate


def _curve(run: RunRecord, key: str) -> str:
    values = [float(row[key]) for row in run.history or [] if finite(row.get(key)) is not None]  # type: ignore[arg-type]
    if not values:
        return ""
    return f"{curve(values)} {values[-1]:.3f}, from {values[0]:.3f}"


def _speed(run: RunRecord) -> str:
    rate = finite(run.tokens_per_second)
    return "" if rate is None else f"{rate:,.0f} tokens/s (measured)"


def _memory(run: RunRecord) -> str:
    peak = finite(run.memory.measured_peak_gib) if run.memory else None
    gpu = run.hardware.gpu if run.hardware else None
    if peak is not None:
        size = f" of {gpu.memory_gib:.1f}" if gpu and gpu.memory_gib else ""
        return f"{peak:.1f}{size} GiB at the peak{f', {gpu.name}' if gpu and gpu.name else ''} (measured)"
    if run.peak_memory_gib is None:
        return ""
    return f"{run.peak_memory_gib.value:.1f} GiB at the peak, {run.peak_memory_gib.kind} (measured)"


def _of_ceiling(seen: Watched, what: str) -> str:
    spending = seen.run.spending or UsageRecord()
    spent = getattr(seen.account, what) if seen.account.attempts else getattr(spending, what)
    if finite(spent) is None:
        return ""
    form = usd_text if what == "usd" else hours_text
    text = form(spent)
    ceiling = finite(getattr(spending, f"ceiling_{what}"))
    if ceiling:
        text = f"{bar(spent / ceiling)} {text} of {form(ceiling)}"
    projected = finite(spending.projected_usd) if what == "usd" else None
    if projected is not None and seen.run.status == "running":
        text += f", {usd_text(projected)} at the end (estimated)"
        if ceiling and projected > ceiling:
            text += ": it will stop at the ceiling"
    return f"{text}{' (measured seconds x price of the machine)' if what == 'usd' else ' (measured)'}"


def _score(evaluation: Json) -> str:
    tuned, base = (number(evaluation, f"models.{name}.execution_accuracy") for name in ("tuned", "base"))
    if tuned is None:
        return ""
    interval = dig(evaluation, "models.tuned.execution_accuracy_interval95")
    text = f"{tuned:.1%}"
    if interval:
        text += f" (95% interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f} over questions)"
    return text if base is None else f"{text}, {base:.1%} before training"


def _without_notice(seen: Watched) -> list[Attempt]:
    return [attempt for attempt in seen.account.attempts if attempt.reason is None and attempt not in seen.live]


def _attempts(seen: Watched, most: int) -> str:
    """How many, and how many of them a preemption has ended: announced by Google, or without notice, as most are."""
    attempts = seen.account.attempts
    if len(attempts) < 2:
        return ""
    preempted, gone = sum(attempt.preempted for attempt in attempts), len(_without_notice(seen))
    parts = [
        f"{len(attempts)}",
        f"{preempted} preempted" if preempted else "",
        f"{gone} ended without notice" if gone else "",
        "none preempted" if not preempted and not gone else "",
        f"the last {most} are shown" if len(attempts) > most > 1 else "",
    ]
    return ", ".join(part for part in parts if part)


def _attempt(attempt: Attempt, *, live: bool) -> str:
    kind = {True: "spot", False: "on-demand", None: ""}[attempt.spot]
    where = " ".join(part for part in (attempt.gpu, kind, attempt.zone) if part)
    price = "" if attempt.usd_per_hour is None else f", ${attempt.usd_per_hour:.3f}/h"
    step = "" if attempt.step is None else f", to step {attempt.step}"
    end = attempt.reason or ("running" if live else "ended without notice")
    preempted = "preempted, " if attempt.preempted and end != "preempted" else ""
    return f"{where or 'this machine'}{price}, {duration(attempt.seconds)}{step}: {preempted}{end}"


def bar(share: float, width: int = 20) -> str:
    full = round(width * min(1.0, max(0.0, share if math.isfinite(share) else 0.0)))
    return "█" * full + "░" * (width - full)


def curve(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """The values from left to right as blocks of eight heights; of more than `width`, the mean of each part."""
    parts = min(width, len(values))
    edges = [round(place * len(values) / parts) for place in range(parts + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    top = len(BARS) - 1
    return "".join(BARS[round(top * (mean - low) / (high - low)) if high > low else 0] for mean in means)
