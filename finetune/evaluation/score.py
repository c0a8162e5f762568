"""Scores predictions: runs each one, compares its rows with those of the gold SQL, and computes accuracy with its interval."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.data.prompts import extract_sql
from finetune.data.records import Record
from finetune.evaluation.statistics import wilson_interval
from finetune.sql.compare import Rule, as_test_suite_runs_it, gold_is_ordered, results_equal
from finetune.sql.difficulty import difficulty
from finetune.sql.engines.base import Session

CORRECT = "correct"
RAN = (CORRECT, "wrong_rows")
"""The verdicts of predictions that were valid SQL for their database and returned a result."""


@dataclass(frozen=True)
class Row:
    """One question with the model's answer and its verdict; a line of eval/<model>.jsonl.

    verdict: correct, wrong_rows, no_sql, gold_failed, or the sandbox's error kind (sql_error, timeout, ...).
    double_quoted_text: whether the prediction used a "name" that is not a column, which SQLite reads as a text constant.
    """

    id: str
    db_id: str
    question: str
    difficulty: str
    gold: str
    prediction: str
    answer: str
    verdict: str
    error: str | None
    seconds: float
    new_tokens: int
    double_quoted_text: bool
    prompt_sha256: str
    gold_sha256: str


def score_answer(
    record: Record,
    database: Path,
    prompt: str,
    answer: str,
    new_tokens: int,
    *,
    sandbox: Session,
    rule: Rule,
    timeout_seconds: float,
) -> Row:
    """Execute gold and prediction on the record's database and compare their rows under `rule`."""
    prediction = extract_sql(answer)
    verdict, error, seconds, quoted = _verdict(record, database, prediction, sandbox, rule, timeout_seconds)
    return Row(
        id=record.id,
        db_id=record.db_id,
        question=record.question,
        difficulty=difficulty(record.sql, record.dialect),
        gold=record.sql,
        prediction=prediction,
        answer=answer,
        verdict=verdict,
        error=error,
        seconds=round(seconds, 4),
        new_tokens=new_tokens,
        double_quoted_text=quoted,
        prompt_sha256=_sha256(prompt),
        gold_sha256=_sha256(record.sql),
    )


def _verdict(
    record: Record, database: Path, prediction: str, sandbox: Session, rule: Rule, timeout_seconds: float
) -> tuple[str, str | None, float, bool]:
    if not prediction:
        return "no_sql", None, 0.0, False
    gold = sandbox.run(database, _as_run(record.sql, rule), timeout_seconds)
    if gold.rows is None:
        return "gold_failed", gold.error, gold.seconds, False
    result = sandbox.run(database, _as_run(prediction, rule), timeout_seconds)
    if result.rows is None:
        return result.error_kind or "sql_error", result.error, result.seconds, False
    ordered = gold_is_ordered(record.sql, record.dialect)
    equal = results_equal(gold.rows, result.rows, ordered=ordered, rule=rule)
    return (CORRECT if equal else "wrong_rows"), None, result.seconds, result.double_quoted_text


def _as_run(sql: str, rule: Rule) -> str:
    return as_test_suite_runs_it(sql) if rule == "test_suite" else sql


def score(rows: Sequence[Row]) -> dict[str, Any]:
    """Execution accuracy, valid-SQL rate and counts: over all rows, by difficulty and by database."""
    correct = sum(row.verdict == CORRECT for row in rows)
    low, high = wilson_interval(correct, len(rows))
    return {
        "execution_accuracy": correct / len(rows),
        "execution_accuracy_interval95": [low, high],
        "valid_sql_rate": sum(row.verdict in RAN for row in rows) / len(rows),
        "correct": correct,
        "questions": len(rows),
        "new_tokens": sum(row.new_tokens for row in rows),
        "by_difficulty": _tally(rows, "difficulty"),
        "by_database": _tally(rows, "db_id"),
        "verdicts": dict(sorted(Counter(row.verdict for row in rows).items())),
    }


def gain(base: Iterable[Row], tuned: Iterable[Row]) -> dict[str, int]:
    """How many questions only the tuned model (won), only the base model (lost), both or neither answered correctly, over the
    questions that both were asked."""
    before = {row.id: row.verdict == CORRECT for row in base}
    pairs = Counter((before[row.id], row.verdict == CORRECT) for row in tuned if row.id in before)
    return {
        "won": pairs[False, True],
        "lost": pairs[True, False],
        "both": pairs[True, True],
        "neither": pairs[False, False],
    }


def as_dict(row: Row) -> dict[str, Any]:
    return asdict(row)


def _tally(rows: Sequence[Row], field: str) -> dict[str, dict[str, int]]:
    groups: dict[str, dict[str, int]] = {}
    for row in rows:
        group = groups.setdefault(getattr(row, field), {"correct": 0, "questions": 0})
        group["questions"] += 1
        group["correct"] += row.verdict == CORRECT
    return dict(sorted(groups.items()))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
