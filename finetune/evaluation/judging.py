"""Judges answers while others are generated, in a pool of processes (judge_pool.py).

    with judging(questions) as judged:
        judged.submit("tuned", 17, answer)      # returns at once
        ...
        rows = judged.rows("tuned")             # waits for what was submitted

A key holds one answer to each question at most; samples and retries are keys of their own. A query is executed once for all keys
(judge.py). Equal results of several answers are found with `Row.result_sha256`.

A time limit that a query hits beside others is not the last word, since a busy machine is slower: such an answer is judged once
more when everything else is done. The same holds for a query that ended its process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

from finetune.config.schema import EvaluationSection
from finetune.data.limits import limits_of
from finetune.data.records import Record
from finetune.evaluation.generators.base import Answer
from finetune.evaluation.judge import Judge, Outcome
from finetune.evaluation.judge_pool import ENDED_TWICE, JudgePool, Key, NotStarted
from finetune.evaluation.judge_process import Asked
from finetune.evaluation.score import Row
from finetune.machine.hardware import usable_cores
from finetune.runtime.console import say
from finetune.sql.engines.registry import open_sessions

FEW = 64
"""Up to so many questions are judged by this process, at the end: starting others would take longer."""
MOST_WORKERS = 16
NICE = 10
"""Of a process that judges beside a model that computes on the CPU."""
LOAD_MATTERS = {"timeout", "crashed", "gold_limit"}
"""Verdicts that a busy machine may cause."""


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


class Speed(NamedTuple):
    """How many answers were judged, and the seconds in which at least one of them was being judged."""

    answers: int
    seconds: float

    @property
    def per_second(self) -> float | None:
        return self.answers / self.seconds if self.seconds else None


class Judging:
    """The answers that were submitted, and their verdicts. Made by `judging`."""

    def __init__(self, questions: Questions, alone: Judge, pool: JudgePool | None) -> None:
        self._questions, self._alone, self._pool = questions, alone, pool
        self._answers: dict[Key, dict[int, Answer]] = {}
        self._outcomes: dict[Key, dict[int, Outcome]] = {}
        self._seconds_alone: dict[Key, float] = {}

    def submit(self, key: Key, number: int, answer: Answer) -> None:
        """Judge the answer to the question of this number; returns at once. Raises ValueError if the key holds another answer to
        the question."""
        answers = self._answers.setdefault(key, {})
        known = answers.get(number)
        if known is None:
            answers[number] = answer
            if self._pool is not None:
                self._pool.submit(key, number, answer)
        elif known != answer:
            raise ValueError(f"{key}: two answers to question {number}")

    def nothing_else_runs(self) -> None:
        """No model computes on the CPU any more: judge on all cores."""
        if self._pool is not None:
            self._pool.add_workers(max(0, min(MOST_WORKERS, usable_cores()) - self._pool.workers))

    def rows(self, key: Key, *, progress: bool = False) -> list[Row]:
        """The verdicts on all answers that were submitted under the key, in the order of the questions. progress: show a bar if
        it takes long. Raises UserError if a database cannot be read, or if the processes that judge keep ending."""
        answers, outcomes = self._answers.get(key, {}), self._outcomes.setdefault(key, {})
        todo = [number for number in sorted(answers) if number not in outcomes]
        with tqdm(total=len(todo), desc="judging answers", unit="answer", delay=2, disable=not progress) as bar:
            if todo:
                self._wait(bar)
            bar.n = 0  # `reset` would show the bar at once, and leave it
            for number in todo:
                outcomes[number] = self._outcome(key, number)
                bar.update()
        records, prompts = self._questions.records, self._questions.prompts
        return [
            outcome.row(records[number], prompts[number], answers[number])
            for number, outcome in sorted(outcomes.items())
        ]

    def speed(self, key: Key) -> Speed:
        """Of what `rows` has given for the key."""
        seconds = self._seconds_alone.get(key, 0.0) + (self._pool.seconds(key) if self._pool else 0.0)
        return Speed(len(self._outcomes.get(key, {})), seconds)

    def _wait(self, bar: Any) -> None:
        if self._pool is None:
            return
        try:
            self._pool.wait(lambda left: bar.update(max(0, bar.total - left - bar.n)))
        except NotStarted as error:
            say(f"answers are judged one after the other, because a process for it does not start: {error}")
            self._pool.close(at_once=True)
            self._pool = None

    def _outcome(self, key: Key, number: int) -> Outcome:
        found = self._pool.outcome(key, number) if self._pool else None
        if found is not None and not _may_be_load(found):
            return found
        began = time.monotonic()
        questions = self._questions
        outcome = self._alone.outcome(
            questions.records[number], questions.databases[number], self._answers[key][number]
        )
        self._seconds_alone[key] = self._seconds_alone.get(key, 0.0) + time.monotonic() - began
        return outcome


def _may_be_load(outcome: Outcome) -> bool:
    if outcome.error and outcome.error.startswith(ENDED_TWICE):
        return False  # it would end this process, too
    return not LOAD_MATTERS.isdisjoint(outcome.verdicts.values())


@contextmanager
def judging(
    questions: Questions, workers: int | None = None, *, beside_cpu: bool = False, few: int = FEW
) -> Iterator[Judging]:
    """Judges answers to the questions until the end of the block.

    workers: processes; None for as many as there are cores, or none for up to `few` questions; 0 for none: the answers are then
    judged by this process when `rows` is called. beside_cpu: a model computes on the CPU meanwhile; one process judges, with
    lower priority, until `nothing_else_runs`.
    """
    evaluation = questions.evaluation
    if workers is None and len(questions.records) > few:
        workers = 1 if beside_cpu else min(MOST_WORKERS, usable_cores())
    limits = limits_of(evaluation)
    with open_sessions(limits) as session:
        alone = Judge(session, rule=evaluation.rule, timeout_seconds=evaluation.timeout_seconds)
        if not workers:
            yield Judging(questions, alone, None)
            return
        asked = [Asked(*pair) for pair in zip(questions.records, questions.databases, strict=True)]
        pool = JudgePool(
            asked,
            workers,
            rule=evaluation.rule,
            timeout_seconds=evaluation.timeout_seconds,
            limits=limits,
            nice=NICE if beside_cpu else 0,
        )
        whole = False
        try:
            yield Judging(questions, alone, pool)
            whole = True
        finally:
            pool.close(at_once=not whole)


def judged_rows(questions: Questions, answers: Sequence[Answer], workers: int | None = None) -> list[Row]:
    """The verdict on one answer to each question. Raises UserError if a database cannot be read."""
    with judging(questions, workers) as judged:
        for number, answer in enumerate(answers):
            judged.submit("answers", number, answer)
        return judged.rows("answers")
