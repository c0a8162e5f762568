"""Judges answers while others are generated, in a pool of processes (judge_pool.py).

    with judging(questions) as judged:
        judged.submit("tuned", 17, answer)      # returns at once
        ...
        rows = judged.rows("tuned")             # waits for what was submitted under this key

A key holds one answer to each question at most; samples and retries are keys of their own. Gold queries, and predictions with
the same text, are executed once for all keys. The chosen result of a vote is found with `Row.result_sha256`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from finetune.config.schema import EvaluationSection
from finetune.data.limits import limits_of
from finetune.data.records import Record
from finetune.evaluation.generators.base import Answer
from finetune.evaluation.score import Judge, Row
from finetune.sql.engines.registry import open_sessions

Key = Hashable


class Questions(Protocol):
    """What judging needs of an EvaluationSet (questions.py)."""

    @property
    def records(self) -> Sequence[Record]: ...

    @property
    def databases(self) -> Sequence[Path]:
        """The database of each record."""
        ...

    @property
    def prompts(self) -> Sequence[str]:
        """Of each record; only their hash is kept."""
        ...

    @property
    def evaluation(self) -> EvaluationSection:
        """The rule and the limits."""
        ...


class Judging:
    """The answers that were submitted, and their verdicts."""

    def __init__(self, questions: Questions, judge: Judge) -> None:
        self._questions, self._judge = questions, judge
        self._answers: dict[Key, dict[int, Answer]] = {}
        self._rows: dict[Key, dict[int, Row]] = {}

    def submit(self, key: Key, number: int, answer: Answer) -> None:
        """Judge the answer to the question of this number; returns at once. Raises ValueError if the key holds another answer to
        the question."""
        known = self._answers.setdefault(key, {}).setdefault(number, answer)
        if known != answer:
            raise ValueError(f"{key}: two answers to question {number}")

    def rows(self, key: Key) -> list[Row]:
        """The verdicts on all answers that were submitted under the key, in the order of the questions. Raises UserError if a
        database cannot be read."""
        questions, rows = self._questions, self._rows.setdefault(key, {})
        for number, answer in self._answers.get(key, {}).items():
            if number not in rows:
                rows[number] = self._judge.row(
                    questions.records[number], questions.databases[number], questions.prompts[number], answer
                )
        return [rows[number] for number in sorted(rows)]


@contextmanager
def judging(questions: Questions, workers: int | None = None) -> Iterator[Judging]:
    """Judges answers to the questions until the end of the block. workers: processes; None for as many as pay, 0 for none: the
    answers are then judged by this process when `rows` is called."""
    evaluation = questions.evaluation
    with open_sessions(limits_of(evaluation)) as session:
        judge = Judge(session, rule=evaluation.rule, timeout_seconds=evaluation.timeout_seconds)
        yield Judging(questions, judge)


def judged_rows(questions: Questions, answers: Sequence[Answer], workers: int | None = None) -> list[Row]:
    """The verdict on one answer to each question. Raises UserError if a database cannot be read."""
    with judging(questions, workers) as judged:
        for number, answer in enumerate(answers):
            judged.submit("answers", number, answer)
        return judged.rows("answers")
