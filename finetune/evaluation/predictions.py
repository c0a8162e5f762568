"""Judges somebody else's answers to the questions of a config or a run: no model is loaded, and no torch.

For a config:  <training.output_dir>/predictions/<name>/eval.json, rows.jsonl
For a run:     <run>/eval/predictions-<name>.json, predictions-<name>.jsonl; its eval.json stays as it is

Both JSON files have the form of a run's eval.json, with one model, called PREDICTIONS. It is written last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.config.schema import EvaluationSection, RunConfig
from finetune.data.prompts import PromptTemplate, dialects_of
from finetune.data.records import Record
from finetune.errors import UserError, shown
from finetune.evaluation.generators.base import Answer
from finetune.evaluation.judging import judged_rows
from finetune.evaluation.prediction_file import Expected, PredictionFile, read_predictions
from finetune.evaluation.questions import QuestionSet, questions_of
from finetune.evaluation.score import Row, score, write_rows
from finetune.prepared_folder import records_file
from finetune.run_folder import RunFolder
from finetune.run_name import fault_of_name
from finetune.runtime.confined import remove_file
from finetune.runtime.console import say
from finetune.runtime.files import as_text, load_json, sha256_file, write_json

PREDICTIONS = "predictions"
"""The model in a result."""
MODELS_OF_A_RUN = ("base", "tuned", "vote", "retry")
"""What else `finetune compare RUN:NAME` may mean."""


@dataclass(frozen=True)
class Place:
    """Where a result is written. folder: eval.json names its rows relative to it."""

    folder: Path
    result: Path
    rows: Path


def evaluate_predictions(
    target: Path, config: RunConfig, file: Path, name: str | None = None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Judge the answers in `file` to the questions of a config, and write the result, which is returned.

    target: the config's file, or the folder of the run that it is the config of. name: of the result, None for the file's.
    overrides: KEY=VALUE pairs that `config` contains, for the command that repeats this. Raises UserError, before anything is
    written, for a file that does not answer every question once, for a name that is no folder name or belongs to the answers of
    another file, and for missing data.
    """
    name = _name(file, name)
    place = place_of(target, config, name)
    questions = questions_of(config, PromptTemplate(config.data.schema_format), of_run=target.is_dir())
    given = read_predictions(file, expected_of(questions))
    identity = sha256_file(file)
    _check_free(place, name, identity)
    if given.ignored:
        say(f"{file}: {given.ignored} of its answers are to questions that are not asked, and are left out")
    rows = _rows(questions, given)
    result = {
        "split": config.evaluation.split,
        "questions": len(rows),
        "without_database": questions.without_database,
        "data_manifest_sha256": questions.data.manifest_hash,
        "prompt_version": None,  # not known of somebody else's answers
        "dialects": list(dialects_of(questions.records)),
        "rule": config.evaluation.rule,
        "timeout_seconds": config.evaluation.timeout_seconds,
        "judging": questions.judging_settings(),
        PREDICTIONS: {
            "name": name,
            "target": as_text(target),
            "overrides": list(overrides),
            "file": as_text(file),
            "sha256": identity,
            "format": given.format,
            "left_out": given.ignored,
        },
        "models": {
            PREDICTIONS: score(rows) | {"new_tokens": None, "rows": str(place.rows.relative_to(place.folder))},
        },
    }
    if place.result.is_file():  # a kill between the two writes must not leave old scores beside new rows
        remove_file(place.result, inside=place.folder)
    write_rows(place.rows, rows)
    write_json(place.result, result)
    say(f"the verdicts are in {place.result} and {place.rows}")
    return result


def place_of(target: Path, config: RunConfig, name: str) -> Place:
    """The place of the result of this name, for a run's folder or a config's file."""
    if target.is_dir():
        run = RunFolder(target)
        return Place(run.path, run.eval_predictions(name), run.eval_rows(f"{PREDICTIONS}-{name}"))
    folder = Path(config.training.output_dir) / PREDICTIONS / name
    return Place(folder, folder / "eval.json", folder / "rows.jsonl")


def expected_of(questions: QuestionSet) -> Expected:
    """What a file of predictions has to answer."""
    evaluation, data = questions.config.evaluation, questions.data
    split = data.records(evaluation.split)
    sampled = len(questions.records) if len(questions.records) + questions.without_database < len(split) else None
    asked = frozenset(record.id for record in questions.records)
    return Expected(evaluation.split, split, asked, data.folder / records_file(evaluation.split), sampled)


@dataclass(frozen=True)
class _Asked:
    """What judging reads. prompts: empty, because those of the answers are not known."""

    records: Sequence[Record]
    databases: Sequence[Path]
    prompts: Sequence[str]
    evaluation: EvaluationSection


def _rows(questions: QuestionSet, given: PredictionFile) -> list[Row]:
    records = questions.records
    asked = _Asked(records, questions.databases, [""] * len(records), questions.config.evaluation)
    rows = judged_rows(asked, [Answer(given.answers[record.id], 0) for record in records])
    return [replace(row, prompt_sha256="") for row in rows]


def _name(file: Path, name: str | None) -> str:
    wanted = file.stem if name is None else name
    fault = fault_of_name(wanted)
    if fault is None and wanted.casefold() in MODELS_OF_A_RUN:
        fault = f"expected another name: {shown(wanted)} is a model of a run"
    if fault:
        where = "--name" if name is not None else f"{as_text(file)}: a result cannot be named after it, so give --name"
        raise UserError(f"{where}: {fault}", code="predictions.bad_name")
    return wanted


def _check_free(place: Place, name: str, identity: str) -> None:
    """Raises UserError if the name belongs to the answers of another file."""
    try:
        known = load_json(place.result)[PREDICTIONS]["sha256"]
    except (OSError, ValueError, LookupError, TypeError):  # nothing there, or nothing that could be used
        return
    if known != identity:
        raise UserError(
            f"{place.result}: holds the verdicts on another file, or on this one before it was changed; give these answers "
            f"another name with --name (now {shown(name)}), or delete it",
            code="predictions.name_taken",
        )
