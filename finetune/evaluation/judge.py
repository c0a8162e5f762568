"""Judges one answer: takes its SQL, runs it and the gold query, and compares their rows under every rule.

A query is executed once per database as long as its result is kept: for all questions with the same gold query, for base and
tuned model and all samples, and under all rules that run the same text. One that depends on the clock or on chance is executed
anew for each answer. Results are kept up to a size in memory, the latest used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from finetune.data.answers import read_answer
from finetune.data.records import Record
from finetune.evaluation.error_classes import class_of_rows, error_class
from finetune.evaluation.generators.base import Answer
from finetune.evaluation.result_sample import Sample, samples
from finetune.evaluation.score import CORRECT, Row, sha256
from finetune.sql.compare import RULES, Rule, as_rule_runs_it, gold_is_ordered, result_hash, results_equal
from finetune.sql.difficulty import difficulty
from finetune.sql.engines.base import QueryResult, Session
from finetune.sql.gold import VOLATILE, WITHOUT_RESULT, Gold, GoldExaminer

KEPT_BYTES = 128 << 20
"""Memory for kept results, estimated; the latest one is kept whatever its size."""
KEPT_OUTCOMES = 8192
CELL_BYTES = 56
"""Of one value in a row, besides the bytes of its text: a reference and the object's head (CPython on 64 bits)."""


@dataclass(frozen=True)
class Outcome:
    """What judging finds out about an answer: the part of a Row (score.py) that neither the record nor the answer holds."""

    difficulty: str
    prediction: str
    verdict: str
    error: str | None
    seconds: float
    double_quoted_text: bool
    gold_kind: str
    several_statements: bool
    verdicts: dict[str, str]
    result_sha256: str | None
    error_class: str | None
    gold_sample: Sample | None = None
    result_sample: Sample | None = None

    def row(self, record: Record, prompt: str, answer: Answer) -> Row:
        return Row(
            id=record.id,
            db_id=record.db_id,
            question=record.question,
            gold=record.sql,
            answer=answer.text,
            new_tokens=answer.new_tokens,
            prompt_tokens=answer.prompt_tokens,
            prompt_sha256=sha256(prompt),
            gold_sha256=sha256(record.sql),
            **vars(self),
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Verdict:
    name: str
    error: str | None = None
    seconds: float = 0.0
    double_quoted_text: bool = False


@dataclass(frozen=True)
class _Golds:
    """A gold query as each rule runs it, by its text, and what is read off it."""

    by_text: dict[str, Gold]
    ordered: bool
    difficulty: str

    @property
    def volatile(self) -> bool:
        return any(gold.kind in VOLATILE for gold in self.by_text.values())


Value = TypeVar("Value")


class _Kept(Generic[Value]):
    """The values used last, up to a total size."""

    def __init__(self, most: int) -> None:
        self._most, self._total = most, 0
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()

    @property
    def is_full(self) -> bool:
        """Whether little more can be kept without losing what is."""
        return self._total > 0.9 * self._most

    def get(self, key: Hashable) -> Value | None:
        found = self._values.get(key)
        if found is None:
            return None
        self._values.move_to_end(key)
        return found[0]

    def put(self, key: Hashable, value: Value, size: int = 1) -> None:
        if key in self._values:
            return
        self._values[key] = value, size
        self._total += size
        while self._total > self._most and len(self._values) > 1:
            _, (_, freed) = self._values.popitem(last=False)
            self._total -= freed


class Judge:
    """Executes gold and predictions and compares their rows under every rule. For one thread."""

    def __init__(
        self,
        session: Callable[[str], Session],
        *,
        rule: Rule,
        timeout_seconds: float,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        """session: the session of a dialect. rule: of `Row.verdict`."""
        self._session, self._rule, self._timeout = session, rule, timeout_seconds
        self._examiner = GoldExaminer(session, timeout_seconds)
        self._golds: _Kept[_Golds] = _Kept(kept_bytes // 2)
        self._results: _Kept[QueryResult] = _Kept(kept_bytes // 2)
        self._outcomes: _Kept[Outcome] = _Kept(KEPT_OUTCOMES)

    def row(self, record: Record, database: Path, prompt: str, answer: Answer) -> Row:
        """Raises UserError if the database cannot be read."""
        return self.outcome(record, database, answer).row(record, prompt, answer)

    def outcome(self, record: Record, database: Path, answer: Answer) -> Outcome:
        """Raises UserError if the database cannot be read."""
        found = read_answer(answer.text, record.dialect)
        key = record.dialect, database, record.sql, record.schema, found.sql, answer.problem
        outcome = self._outcomes.get(key)
        if outcome is None:
            golds = self._golds_of(record, database)
            outcome = self._judged(record, database, golds, found.sql, answer.problem)
            if not golds.volatile and not self._examiner.volatile(database, found.sql, record.dialect):
                self._outcomes.put(key, outcome)
        return replace(outcome, several_statements=found.several)

    def prepare(self, record: Record, database: Path) -> None:
        """Execute the record's gold query before there are answers, as long as the results of such queries can be kept. Raises
        UserError if the database cannot be read."""
        if not self._golds.is_full:
            self._golds_of(record, database)

    def _golds_of(self, record: Record, database: Path) -> _Golds:
        key = (record.dialect, database, record.sql)
        golds = self._golds.get(key)
        if golds is None:
            texts = dict.fromkeys(as_rule_runs_it(record.sql, rule) for rule in (self._rule, *RULES))
            golds = _Golds(
                {text: self._examiner.examine(database, text, record.dialect) for text in texts},
                gold_is_ordered(record.sql, record.dialect),
                difficulty(record.sql, record.dialect),
            )
            self._golds.put(key, golds, sum(_memory(gold.result) for gold in golds.by_text.values()))
        return golds

    def _judged(self, record: Record, database: Path, golds: _Golds, prediction: str, problem: str | None) -> Outcome:
        results: dict[Rule, QueryResult] = {}
        verdicts: dict[Rule, _Verdict] = {}
        beside: dict[str, QueryResult] = {}
        for rule in dict.fromkeys((self._rule, *RULES)):
            gold_text = as_rule_runs_it(record.sql, rule)
            gold = golds.by_text[gold_text]
            if gold.kind in WITHOUT_RESULT:
                verdicts[rule] = _Verdict(f"gold_{gold.kind}", gold.detail or str(gold), gold.result.seconds)
                continue
            if problem or not prediction:
                verdicts[rule] = _Verdict(problem or "no_sql")
                continue
            results[rule] = self._ran(record.dialect, database, as_rule_runs_it(prediction, rule), golds)
            expected = gold.result
            if gold.kind in VOLATILE:
                if gold_text not in beside:
                    beside[gold_text] = self._examiner.run(database, gold_text, record.dialect)
                expected = beside[gold_text]
            verdicts[rule] = _compared(expected, results[rule], ordered=golds.ordered, rule=rule)
        gold_text = as_rule_runs_it(record.sql, self._rule)
        gold, result = golds.by_text[gold_text], results.get(self._rule)
        chosen, expected = verdicts[self._rule], beside.get(gold_text, gold.result)
        gold_sample, result_sample = samples(expected, result)
        return Outcome(
            difficulty=golds.difficulty,
            prediction=prediction,
            verdict=chosen.name,
            error=chosen.error,
            seconds=round(chosen.seconds, 4),
            double_quoted_text=chosen.double_quoted_text,
            gold_kind=gold.kind,
            several_statements=False,
            verdicts={rule: verdicts[rule].name for rule in (self._rule, *RULES)},
            result_sha256=None if result is None or result.rows is None else result_hash(result.rows, rule=self._rule),
            error_class=self._class(record, prediction, chosen, expected, result, golds.ordered),
            gold_sample=gold_sample,
            result_sample=result_sample,
        )

    def _class(
        self,
        record: Record,
        prediction: str,
        verdict: _Verdict,
        gold: QueryResult,
        result: QueryResult | None,
        ordered: bool,
    ) -> str | None:
        if verdict.name == "wrong_rows" and result is not None:
            return class_of_rows(gold.rows or [], result.rows or [], ordered=ordered, rule=self._rule)
        return error_class(verdict.name, verdict.error, prediction, record.schema, record.dialect)

    def _ran(self, dialect: str, database: Path, text: str, golds: _Golds) -> QueryResult:
        """The result of a prediction, executed unless it is known."""
        gold = golds.by_text.get(text)
        if gold is not None and gold.kind not in VOLATILE:
            return gold.result
        key = (dialect, database, text)
        result = self._results.get(key)
        if result is None:
            result = self._session(dialect).run(database, text, self._timeout)
            if not self._examiner.volatile(database, text, dialect):
                self._results.put(key, result, _memory(result))
        return result


def _memory(result: QueryResult) -> int:
    """Bytes that a kept result occupies, estimated from its first rows."""
    rows = result.rows or []
    first = rows[:20]
    texts = sum(len(value) for row in first for value in row if isinstance(value, str | bytes))
    return 1024 + len(rows) * (CELL_BYTES * (1 + len(result.columns)) + texts // max(1, len(first)))


def _compared(gold: QueryResult, result: QueryResult, *, ordered: bool, rule: Rule) -> _Verdict:
    if gold.rows is None:  # it ran a moment ago
        return _Verdict("gold_failed", gold.error, gold.seconds)
    if result.rows is None:
        return _Verdict(result.error_kind or "sql_error", result.error, result.seconds)
    equal = results_equal(gold.rows, result.rows, ordered=ordered, rule=rule)
    return _Verdict(CORRECT if equal else "wrong_rows", None, result.seconds, result.double_quoted_text)


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
