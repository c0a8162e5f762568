"""Reads and checks the input of a report: run.json, eval.json and the recorded answers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.records import read_lines
from finetune.errors import UserError
from finetune.run_record import AttemptRecord, MemoryRecord, RunRecord, UsageRecord, read_record
from finetune.runtime.commands import evaluate_command
from finetune.runtime.confined import within
from finetune.runtime.files import kind_of, read_json
from finetune.runtime.quantities import hours_text, usd_text
from finetune.runtime.typed_json import LARGEST

Json = dict[str, Any]

UNKNOWN = "–"
OUTCOMES = ("won", "lost", "both", "neither")


@dataclass(frozen=True)
class Source:
    """The input of the report; `evaluation` and `rows` are empty if nothing was evaluated."""

    folder: Path
    run: RunRecord
    evaluation: Json
    rows: dict[str, list[Json]]

    @property
    def base(self) -> Json:
        """The scores of the base model; empty if it was not evaluated."""
        return dig(self.evaluation, "models.base") or {}

    @property
    def tuned(self) -> Json:
        return dig(self.evaluation, "models.tuned") or {}

    @property
    def other_data(self) -> bool:
        """Whether the questions come from data other than the training run's prepared data."""
        trained_on = self.run.data.manifest_sha256 if self.run.data else None
        return bool(self.evaluation.get("data_manifest_sha256") != trained_on)

    @property
    def which_questions(self) -> str:
        """A phrase for the questions. Only those of the test split prepared together with the training data count as unseen."""
        split = self.evaluation.get("split")
        unseen = split == "test" and not self.other_data
        return "questions that training has not seen" if unseen else f"questions of the {split} split"


def read_run(run_dir: Path) -> Source:
    """Read what training and evaluation wrote into a run folder.

    Raises UserError if run.json is missing, or if a file is broken or not in the expected format.
    """
    run, command = read_record(run_dir / "run.json"), evaluate_command(run_dir)
    evaluation = read_evaluation(run_dir)
    rows = {
        name: _read_rows(file, command)
        for name, model in (evaluation.get("models") or {}).items()
        if model and (file := rows_file(run_dir, name, model.get("rows"), command)) and kind_of(file) == "a file"
    }
    return Source(run_dir, run, evaluation, rows)


def read_evaluation(run_dir: Path) -> Json:
    """eval.json, checked; {} if there is none. Raises UserError if it is broken or not in the expected format."""
    path, command = run_dir / "eval.json", evaluate_command(run_dir)
    evaluation = read_json(path, command) if path.exists() else {}
    if problem := evaluation_problem(evaluation):
        raise UserError(f"{path}: {problem}; run `{command}` again", code="report.bad_input")
    return evaluation


def evaluation_problem(evaluation: Json) -> str | None:
    """The first place in eval.json that is not in the format of `evaluate`, as an error text; None if there is none."""
    models, gain = evaluation.get("models") or {}, evaluation.get("gain")
    if not isinstance(models, dict):
        return "models: expected an object"
    if not isinstance(evaluation.get("rule"), str | None):
        return "rule: expected a text"
    for name, scores in models.items():
        if scores is not None and (problem := scores_problem(scores)):
            return f"models.{name} {problem}"
    if gain is not None and (problem := _counts_problem(gain, OUTCOMES)):
        return f"gain {problem}"
    of_databases = dig(evaluation, "gain_interval95.databases")
    return (
        None
        if of_databases is None or _is_interval(of_databases)
        else "gain_interval95.databases is not a pair of numbers"
    )


def _is_interval(value: Any) -> bool:
    return _is_list_of(value, int | float) and len(value) == 2 and all(math.isfinite(bound) for bound in value)


def scores_problem(scores: Any) -> str | None:
    if problem := _counts_problem(scores, ("correct", "questions")):
        return problem
    if number(scores, "execution_accuracy") is None:
        return "lacks the number execution_accuracy"
    interval = scores.get("execution_accuracy_interval95")
    if interval is not None and not _is_interval(interval):
        return "has an execution_accuracy_interval95 that is not a pair of numbers"
    for key in ("by_difficulty", "by_database", "by_gold"):
        groups = scores.get(key) or {}
        if not isinstance(groups, dict):
            return f"has a {key} that is not an object"
        for name, group in groups.items():
            if problem := _counts_problem(group, ("correct", "questions")):
                return f"has a {key} object in which {name} {problem}"
    for key in ("verdicts", "error_classes"):
        counts = scores.get(key) or {}
        if not isinstance(counts, dict):
            return f"has {key} that are not an object"
        if problem := _counts_problem(counts, tuple(counts)):
            return f"has a {key} object that {problem}"
    return _beyond_problem(scores)


def _beyond_problem(scores: Json) -> str | None:
    """The first problem in what was measured beside the greedy answers."""
    for key in ("samples.vote", "samples.pass_at", "retry.score"):
        found = dig(scores, key)
        if found is not None and (problem := scores_problem(found)):
            return f"has a {key} that {problem}"
    for key in ("samples.gain.vote", "samples.gain.pass_at", "retry.gain"):
        counts = dig(scores, f"{key}.gain")
        if counts is not None and (problem := _counts_problem(counts, OUTCOMES)):
            return f"has a {key}.gain that {problem}"
        for what in ("questions", "databases"):
            bounds = dig(scores, f"{key}.gain_interval95.{what}")
            if bounds is not None and not _is_interval(bounds):
                return f"has a {key}.gain_interval95.{what} that is not a pair of numbers"
    return None


def _counts_problem(record: Any, keys: Sequence[str]) -> str | None:
    if not isinstance(record, dict):
        return "is not an object"
    absent = [key for key in keys if type(record.get(key)) is not int or not 0 <= record[key] < LARGEST]
    return f"lacks the count {absent[0]}" if absent else None


def _is_list_of(value: Any, kind: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def dig(record: Any, path: str) -> Any:
    """The value at a dotted path of nested dicts; None if any part of the path is absent."""
    for key in path.split("."):
        record = record.get(key) if isinstance(record, dict) else None
    return record


def not_finite(value: Any) -> str | None:
    """The dotted path of the first number that is NaN or infinite, which JSON cannot say; None if there is none."""
    if isinstance(value, float):
        return None if math.isfinite(value) else ""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        if (place := not_finite(item)) is not None:
            return f"{key}.{place}".rstrip(".")
    return None


def number(record: Json, path: str) -> float | None:
    """The finite number at a dotted path, else None."""
    value = dig(record, path)
    return finite(value) if isinstance(value, int | float) else None


def finite(value: float | None) -> float | None:
    """The value, or None if it is unknown, infinite or NaN."""
    return value if value is not None and math.isfinite(value) else None


def memory_lines(run: RunRecord) -> list[tuple[str, str]]:
    """(label, predicted and measured value) for GPU memory, where run.json has both; empty for a run on a CPU."""
    lines = []
    memory = run.memory or MemoryRecord()
    for label, predicted, measured in (
        ("Peak allocated", finite(memory.predicted_peak_gib), finite(memory.measured_peak_gib)),
        ("Peak reserved by torch", finite(memory.predicted_reserved_gib), finite(memory.measured_reserved_gib)),
    ):
        if predicted and measured:
            off = predicted / measured - 1
            lines.append((label, f"{predicted:.2f} GiB estimated, {measured:.2f} GiB measured ({off:+.1%})"))
    return lines


def budget_lines(run: RunRecord) -> list[tuple[str, str]]:
    """(label, amount spent and its ceiling) for the dollars and hours of all attempts, and the projected cost of the whole run;
    empty if the run did not record them."""
    lines = []
    spending = run.spending or UsageRecord()
    for label, spent, ceiling, form in (
        ("Dollars", finite(spending.usd), finite(spending.ceiling_usd), usd_text),
        ("Hours", finite(spending.hours), finite(spending.ceiling_hours), hours_text),
    ):
        if spent is not None:
            of = f"of {form(ceiling)} ({spent / ceiling:.0%})" if ceiling else "no ceiling"
            lines.append((label, f"{form(spent)} spent, {of}"))
    projected = finite(spending.projected_usd)
    if projected is not None:
        lines.append(("Projected", f"{usd_text(projected)} for the whole run (estimated)"))
    return [*lines, ("Basis", spending.basis)] if lines and spending.basis else lines


@dataclass(frozen=True)
class AttemptRow:
    """One attempt of the run as table cells, "–" if unknown: its machine, first and last step, hours, price, cost in US dollars,
    and how it ended."""

    number: str
    started: str
    machine: str
    zone: str
    steps: str
    hours: str
    price: str
    usd: str
    end: str


def attempt_rows(run: RunRecord) -> list[AttemptRow]:
    """The rows of the run's attempt_log; empty if it has none."""
    return [_attempt(entry) for entry in run.attempt_log or []]


def _attempt(entry: AttemptRecord) -> AttemptRow:
    kind = None if entry.spot is None else "spot" if entry.spot else "on-demand"
    machine = ", ".join(part for part in (entry.gpu, entry.machine, kind) if part)
    steps = [entry.from_step, entry.to_step]
    return AttemptRow(
        number=_or_dash(entry.attempt),
        started=re.sub(r"T(\d\d:\d\d).*(\+00:00|Z)$", r" \1", _or_dash(entry.started_at)),
        machine=machine or UNKNOWN,
        zone=_or_dash(entry.zone),
        steps=" to ".join(_or_dash(step) for step in steps) if any(step is not None for step in steps) else UNKNOWN,
        hours=figure(entry.hours, "{:,.2f}"),
        price=dollars(entry.usd_per_hour),
        usd=dollars(entry.usd),
        end=_or_dash(entry.reason),
    )


def _or_dash(value: Any) -> str:
    return UNKNOWN if value is None else str(value)


def figure(value: float | None, form: str) -> str:
    return UNKNOWN if finite(value) is None else form.format(value)


def dollars(usd: float | None) -> str:
    return UNKNOWN if usd is None or finite(usd) is None else usd_text(usd)


def rows_file(run_dir: Path, name: str, rows: Any, command: str) -> Path | None:
    """The file of a model's answers, which eval.json names; None if it names none."""
    if rows is None:
        return None
    if path := within(run_dir, rows):
        return path
    raise UserError(
        f"{run_dir / 'eval.json'}: models.{name}.rows: expected a file in the run's folder, found {str(rows)[:100]!r}; "
        f"run `{command}` again",
        code="report.bad_input",
    )


def _read_rows(path: Path, command: str) -> list[Json]:
    rows = []
    for line in read_lines(path):
        if line.problem or not isinstance(line.value, dict) or not {"id", "verdict"} <= set(line.value):
            problem = line.problem or "not an answer with id and verdict"
            raise UserError(f"{path}:{line.number}: {problem}; run `{command}` again", code="report.bad_input")
        rows.append(line.value)
    return rows
