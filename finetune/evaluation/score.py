"""Scores predictions: runs each one, compares its rows with those of the gold SQL, and computes accuracy with its interval."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.data.answers import read_answer
from finetune.data.records import Record
from finetune.evaluation.generators.base import Answer
from finetune.evaluation.statistics import bootstrap_by_database, wilson_interval
from finetune.runtime.files import atomic_file
from finetune.sql.compare import RULES, Rule, as_rule_runs_it, gold_is_ordered, result_hash, results_equal
from finetune.sql.difficulty import difficulty
from finetune.sql.engines.base import QueryResult, Session
from finetune.sql.gold import ARBITRARY, SOUND, VOLATILE, WITHOUT_RESULT, Gold, GoldExaminer

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


@dataclass(frozen=True)
class _Verdict:
    name: str
    error: str | None = None
    seconds: float = 0.0
    double_quoted_text: bool = False
    result_sha256: str | None = None


class Judge:
    """Executes gold and predictions and compares their rows under every rule.

    A gold query is executed once per database as long as its questions come one after the other, so that its rows need not be
    kept; one that depends on the clock or on chance is executed again beside each prediction.
    """

    def __init__(self, session: Callable[[str], Session], *, rule: Rule, timeout_seconds: float) -> None:
        """session: the session of a dialect. rule: of `Row.verdict`."""
        self._session, self._rule, self._timeout = session, rule, timeout_seconds
        self._examiner = GoldExaminer(session, timeout_seconds)
        self._golds: tuple[object, dict[str, Gold]] = (None, {})

    def row(self, record: Record, database: Path, prompt: str, answer: Answer) -> Row:
        found = read_answer(answer.text, record.dialect)
        golds = self._golds_of(record, database)
        verdicts = self._verdicts(record, database, golds, found.sql, answer.problem)
        chosen = verdicts[self._rule]
        return Row(
            id=record.id,
            db_id=record.db_id,
            question=record.question,
            difficulty=difficulty(record.sql, record.dialect),
            gold=record.sql,
            prediction=found.sql,
            answer=answer.text,
            verdict=chosen.name,
            error=chosen.error,
            seconds=round(chosen.seconds, 4),
            new_tokens=answer.new_tokens,
            double_quoted_text=chosen.double_quoted_text,
            prompt_sha256=sha256(prompt),
            gold_sha256=sha256(record.sql),
            gold_kind=golds[as_rule_runs_it(record.sql, self._rule)].kind,
            several_statements=found.several,
            prompt_tokens=answer.prompt_tokens,
            verdicts={rule: verdict.name for rule, verdict in verdicts.items()},
            result_sha256=chosen.result_sha256,
        )

    def _golds_of(self, record: Record, database: Path) -> dict[str, Gold]:
        """The gold query as each rule runs it, by its text."""
        key = (record.dialect, database, record.sql)
        if self._golds[0] != key:
            texts = dict.fromkeys(as_rule_runs_it(record.sql, rule) for rule in (self._rule, *RULES))
            self._golds = key, {text: self._examiner.examine(database, text, record.dialect) for text in texts}
        return self._golds[1]

    def _verdicts(
        self, record: Record, database: Path, golds: dict[str, Gold], prediction: str, problem: str | None
    ) -> dict[Rule, _Verdict]:
        ordered = gold_is_ordered(record.sql, record.dialect)
        ran: dict[str, QueryResult] = {}
        beside: dict[str, QueryResult] = {}
        found: dict[Rule, _Verdict] = {}
        for rule in (self._rule, *RULES):
            gold_text, text = as_rule_runs_it(record.sql, rule), as_rule_runs_it(prediction, rule)
            gold = golds[gold_text]
            if gold.kind in WITHOUT_RESULT:
                found[rule] = _Verdict(f"gold_{gold.kind}", gold.detail or str(gold), gold.result.seconds)
                continue
            if problem or not prediction:
                found[rule] = _Verdict(problem or "no_sql")
                continue
            if text not in ran:
                ran[text] = self._session(record.dialect).run(database, text, self._timeout)
            result, expected = ran[text], gold.result
            if gold.kind in VOLATILE:
                if gold_text not in beside:
                    beside[gold_text] = self._examiner.run(database, gold_text, record.dialect)
                expected = beside[gold_text]
            found[rule] = _compared(expected, result, ordered=ordered, rule=rule)
        return found


def _compared(gold: QueryResult, result: QueryResult, *, ordered: bool, rule: Rule) -> _Verdict:
    if gold.rows is None:  # it ran a moment ago
        return _Verdict("gold_failed", gold.error, gold.seconds)
    if result.rows is None:
        return _Verdict(result.error_kind or "sql_error", result.error, result.seconds)
    equal = results_equal(gold.rows, result.rows, ordered=ordered, rule=rule)
    name, found = CORRECT if equal else "wrong_rows", result_hash(result.rows, rule=rule)
    return _Verdict(name, None, result.seconds, result.double_quoted_text, found)


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
    """Execute gold and prediction on the record's database and compare their rows: one answer by itself."""
    judge = Judge(lambda dialect: sandbox, rule=rule, timeout_seconds=timeout_seconds)
    return judge.row(record, database, prompt, Answer(answer, new_tokens))


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
    }


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
