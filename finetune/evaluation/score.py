"""From verdicts to scores: accuracy with its intervals, counts, and what a tuned model gains."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.evaluation.error_classes import ERROR_CLASSES, as_error_class
from finetune.evaluation.result_sample import Sample
from finetune.evaluation.statistics import bootstrap_by_database, wilson_interval
from finetune.runtime.files import atomic_file
from finetune.sql.compare import RULES
from finetune.sql.gold import ARBITRARY, SOUND

CORRECT = "correct"
RAN = (CORRECT, "wrong_rows")
"""The verdicts of predictions that were valid SQL for their database and returned a result."""
CAN_TELL = (SOUND, ARBITRARY)
"""Kinds of gold (sql/gold.py) that a constant answer does not satisfy and that have one result."""


@dataclass(frozen=True)
class Row:
    """One question with the model's answer and its verdict; a line of eval/<model>.jsonl.

    verdict: correct, wrong_rows, no_sql, too_long or out_of_memory (no whole answer: generators/base.py), gold_failed, gold_limit
    (gold hit a limit), gold_unstable, or the sandbox's error kind (sql_error, timeout, ...). verdicts: the same under every rule.
    gold_kind: see sql/gold.py.
    double_quoted_text: whether the prediction used a "name" that is not a column, which SQLite reads as a text constant.
    several_statements: whether the answer holds more than the statement that was run. prompt_tokens: None if unknown.
    result_sha256: of the prediction's rows, whatever their order (result_hash in sql/compare.py); None if it gave none.
    error_class: what is wrong, more precisely than the verdict (error_classes.py); None if it is correct.
    gold_sample, result_sample: some rows of gold and of the prediction (result_sample.py); None if there are none.
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
    gold_kind: str = SOUND
    several_statements: bool = False
    prompt_tokens: int | None = None
    verdicts: dict[str, str] = field(default_factory=dict)
    result_sha256: str | None = None
    error_class: str | None = None
    gold_sample: Sample | None = None
    result_sample: Sample | None = None


def score(rows: Sequence[Row]) -> dict[str, Any]:
    """Execution accuracy, valid-SQL rate and counts: over all rows, by difficulty, by database and by kind of gold; over the
    rows whose gold can tell a right answer from a constant; and under each rule."""
    telling = [row.verdict for row in rows if row.gold_kind in CAN_TELL]
    by_database = _tally(rows, "db_id")
    return {
        **_accuracy([row.verdict for row in rows]),
        "valid_sql_rate": sum(row.verdict in RAN for row in rows) / len(rows),
        "new_tokens": sum(row.new_tokens for row in rows),
        "several_statements": sum(row.several_statements for row in rows),
        "longest_prompt": max((row.prompt_tokens for row in rows if row.prompt_tokens is not None), default=None),
        "by_difficulty": _tally(rows, "difficulty"),
        "by_database": by_database,
        "execution_accuracy_interval95_by_database": bootstrap_by_database(
            [(group["correct"], group["questions"]) for group in by_database.values()]
        ),
        "by_gold": _tally(rows, "gold_kind"),
        "without_hollow": _accuracy(telling),
        "rules": {rule: _accuracy([row.verdicts.get(rule, "") for row in rows]) for rule in rules_of(rows)},
        "verdicts": dict(sorted(Counter(row.verdict for row in rows).items())),
        "error_classes": error_counts(rows),
    }


def error_counts(rows: Iterable[Row]) -> dict[str, int]:
    """How many answers are in each error class, the most frequent first; classes of another version last of equally many."""
    counts = Counter(as_error_class(row.verdict, row.error_class) for row in rows)
    order = {name: place for place, name in enumerate(ERROR_CLASSES)}
    found = [name for name in counts if name is not None]
    return {name: counts[name] for name in sorted(found, key=lambda name: (-counts[name], order.get(name, len(order))))}


def _accuracy(verdicts: Sequence[str]) -> dict[str, Any]:
    """execution_accuracy is None without questions."""
    correct = sum(verdict == CORRECT for verdict in verdicts)
    return {
        "execution_accuracy": correct / len(verdicts) if verdicts else None,
        "execution_accuracy_interval95": list(wilson_interval(correct, len(verdicts))),
        "correct": correct,
        "questions": len(verdicts),
    }


def rules_of(rows: Iterable[Row]) -> list[str]:
    """The rules under which all of the rows were judged."""
    rows = list(rows)
    return [rule for rule in RULES if all(rule in row.verdicts for row in rows)]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSONL, atomically."""
    with atomic_file(path) as file:
        file.writelines(json.dumps(as_dict(row), ensure_ascii=False) + "\n" for row in rows)


def as_dict(row: Row) -> dict[str, Any]:
    return asdict(row)


def _tally(rows: Sequence[Row], field: str) -> dict[str, dict[str, int]]:
    groups: dict[str, dict[str, int]] = {}
    for row in rows:
        group = groups.setdefault(getattr(row, field), {"correct": 0, "questions": 0})
        group["questions"] += 1
        group["correct"] += row.verdict == CORRECT
    return dict(sorted(groups.items()))


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
