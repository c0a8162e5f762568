"""Scores an export on questions that the run has answered, and compares it with the run's own verdicts on the same questions.

Users of other tools report that merged or quantised models got worse; so nothing leaves here unscored unless the user says so.
The comparison is paired (McNemar's exact test), which notices a small loss that two intervals would hide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.config.schema import RunConfig
from finetune.data.prompts import PromptTemplate
from finetune.data.records import read_lines
from finetune.data.split import unit_hash
from finetune.errors import UserError, first_line
from finetune.evaluation.answers import AnswerFile
from finetune.evaluation.generators.base import LoadedModel
from finetune.evaluation.judging import judged_rows
from finetune.evaluation.paired import difference, paired
from finetune.evaluation.questions import QuestionSet, questions_of
from finetune.evaluation.score import CORRECT, Row, sha256
from finetune.evaluation.statistics import wilson_interval
from finetune.run_folder import RunFolder
from finetune.runtime.commands import evaluate_command
from finetune.runtime.files import read_json

SIGNIFICANT = 0.05
SAMPLE = 200
"""Questions of a score, where the run has answered more. A loss of 5 of 100 answers without one gained is found in 200 with
certainty (10 lost, 0 won: p = 0.002); one of 1 of 100 is not."""


@dataclass(frozen=True)
class Reference:
    """The questions of an export's score, with the run's own verdicts on them."""

    questions: QuestionSet
    rows: list[Row]

    @property
    def correct(self) -> int:
        return sum(row.verdict == CORRECT for row in self.rows)


@dataclass(frozen=True)
class Score:
    """The score of one exported model against the run's. counts: won, lost, both, neither. p: McNemar's exact test. same_sql:
    questions with the same SQL as the run's. seconds: of generating."""

    name: str
    questions: int
    correct: int
    run_correct: int
    counts: dict[str, int]
    p: float
    same_sql: int
    generator: dict[str, Any]
    seconds: float
    settings: dict[str, Any]

    @property
    def lost_significantly(self) -> bool:
        return self.p < SIGNIFICANT and self.counts["lost"] > self.counts["won"]

    def as_dict(self) -> dict[str, Any]:
        return {
            "questions": self.questions,
            "correct": self.correct,
            "execution_accuracy": self.correct / self.questions,
            "execution_accuracy_interval95": list(wilson_interval(self.correct, self.questions)),
            "run_correct": self.run_correct,
            "run_execution_accuracy": self.run_correct / self.questions,
            **self.counts,
            "p": self.p,
            "significant_loss": self.lost_significantly,
            "same_sql": self.same_sql,
            "generator": self.generator,
            "seconds": round(self.seconds, 1),
            **self.settings,
        }

    def __str__(self) -> str:
        won, lost = self.counts["won"], self.counts["lost"]
        verdict = "a significant loss" if self.lost_significantly else "no significant loss"
        return (
            f"{self.name}: {self.correct} of {self.questions} right ({self.correct / self.questions:.1%}), the run itself "
            f"{self.run_correct} ({self.run_correct / self.questions:.1%}); won {won}, lost {lost}, p = {self.p:.2g}: {verdict}; "
            f"the same SQL for {self.same_sql}"
        )


def reference(run: RunFolder, config: RunConfig, template: PromptTemplate, sample: int) -> Reference:
    """A seeded sample of the questions that the run has answered, judged as it was.

    Raises UserError if the run was not scored, or if the data have changed since.
    """
    path = run.eval_rows("tuned")
    if not run.eval_json.is_file() or not path.is_file():
        raise UserError(
            f"{run.path}: not scored, so an export has nothing to be compared with; run `{evaluate_command(run.path)}` first, or "
            "export with --no-score",
            code="export.not_scored",
        )
    scored = read_json(run.eval_json, evaluate_command(run.path))
    config = replace(config, evaluation=replace(config.evaluation, max_questions=None, **_as_scored(run, scored)))
    questions = questions_of(config, template)
    rows = _rows(run, path)
    if scored.get("data_manifest_sha256") != questions.data.manifest_hash or not _same(questions, rows):
        raise UserError(
            f"{questions.data.folder}: not the data that {run.path} was scored on; run `{evaluate_command(run.path)}` again",
            code="export.data_changed",
        )
    chosen = sorted(rows, key=lambda name: unit_hash(config.data.seed, name))[:sample]
    numbers = [number for number, record in enumerate(questions.records) if record.id in set(chosen)]
    records = [questions.records[number] for number in numbers]
    kept = replace(questions, records=records, databases=[questions.databases[number] for number in numbers])
    return Reference(kept, [rows[record.id] for record in records])


def score_of(
    name: str,
    wanted: Reference,
    answers: Path,
    load: Callable[[], LoadedModel],
    generator: dict[str, Any],
    *,
    settings: dict[str, Any],
    tuned: bool,
    progress: bool,
) -> Score:
    """Ask an exported model and judge its answers. answers: a file that keeps them, for an export that was killed. settings:
    what identifies the model. tuned: whether it has an adapter apart. Raises UserError if memory is too small."""
    questions, evaluation = wanted.questions, wanted.questions.evaluation
    file = AnswerFile(
        answers,
        f"{name} export",
        {"generator": generator, "max_new_tokens": evaluation.max_new_tokens, **settings},
        questions.prompts,
        evaluation.batch_size,
    )
    file.read()
    file.generate(load, tuned=tuned, max_new_tokens=evaluation.max_new_tokens, progress=progress)
    rows = judged_rows(questions, file.in_order())
    found = difference(paired(wanted.rows, rows))
    return Score(
        name=name,
        questions=len(rows),
        correct=sum(row.verdict == CORRECT for row in rows),
        run_correct=wanted.correct,
        counts=found.counts,
        p=found.p,
        same_sql=sum(before.prediction == after.prediction for before, after in zip(wanted.rows, rows, strict=True)),
        generator=generator,
        seconds=file.seconds,
        settings={"split": evaluation.split, "rule": evaluation.rule},
    )


def refuse_loss(scores: Iterable[Score], part: Path) -> None:
    """Raises UserError for the scores with a significant loss."""
    lost = [score for score in scores if score.lost_significantly]
    if lost:
        raise UserError(
            f"the export answers significantly worse than the run ({'; '.join(map(str, lost))}); nothing was exported. "
            f"--accept-loss exports it all the same, from what is in {part}",
            code="export.loss",
            longest=1000,
        )


def _as_scored(run: RunFolder, scored: dict[str, Any]) -> dict[str, Any]:
    """The keys of the section evaluation that the run was scored with, which may have been overridden."""
    found = {key: scored.get(key) for key in ("split", "rule", "timeout_seconds")}
    if any(value is None for value in found.values()):
        raise UserError(
            f"{run.eval_json}: does not say how the run was scored; run `{evaluate_command(run.path)}` again",
            code="export.not_scored",
        )
    if scored.get("max_new_tokens") is not None:  # not there before 0.2
        found["max_new_tokens"] = scored["max_new_tokens"]
    return found


def _rows(run: RunFolder, path: Path) -> dict[str, Row]:
    try:
        rows = [Row(**line.value) for line in read_lines(path)]
    except (OSError, TypeError, ValueError, UserError) as error:
        raise UserError(
            f"{path}: not readable ({first_line(error)}); run `{evaluate_command(run.path)}` again",
            code="export.not_scored",
        ) from error
    if not rows:
        raise UserError(f"{path}: empty; run `{evaluate_command(run.path)}` again", code="export.not_scored")
    return {row.id: row for row in rows}


def _same(questions: QuestionSet, rows: dict[str, Row]) -> bool:
    """Whether the questions that were answered are there, with the same prompts and gold queries."""
    prompts: Sequence[str] = questions.prompts
    there = {
        record.id: (sha256(prompt), sha256(record.sql))
        for record, prompt in zip(questions.records, prompts, strict=True)
    }
    return all(there.get(row.id) == (row.prompt_sha256, row.gold_sha256) for row in rows.values())
