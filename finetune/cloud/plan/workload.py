"""The size of a run and of its evaluation: examples, questions and tokens, counted if the data are prepared, else assumed and
labelled so."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from finetune.config.load import examples_per_step
from finetune.config.schema import EvaluationSection, RunConfig, SourceSection, TrainingSection
from finetune.errors import NotEstimated, UserError, shown
from finetune.prepared_folder import DATABASES, MANIFEST
from finetune.prepared_from import is_prepared_from
from finetune.runtime.files import load_json


@dataclass(frozen=True)
class RunSize:
    """records: training examples of one epoch; mean_tokens: prompt and answer of one; steps: optimizer steps of the run, for the
    number of GPUs that it was made for.

    validation_tokens: of all validation passes together; validation: examples of one. basis: where the figures come from, as text
    for the user.
    """

    records: int
    mean_tokens: float
    steps: int
    tokens: float  # trained on, over all epochs
    validation_tokens: float
    validation: int
    basis: str


RETRIED_SHARE = 0.2
"""Of the questions that are asked again for each of evaluation.retries: those whose SQL does not run. Assumed."""


@dataclass(frozen=True)
class EvaluationSize:
    """questions: of the split, or its sample. answers: that are generated for them, by the base and the tuned model; new_tokens:
    of all answers. basis: where the figures come from, as text for the user."""

    questions: int
    answers: float
    new_tokens: float
    basis: str


def evaluation_size(config: RunConfig) -> EvaluationSize | None:
    """What scoring the run takes: every question once by the base model and once by the tuned one, and what evaluation.samples
    and evaluation.retries add for the tuned one. None if the number of questions is unknown, or if nothing can be scored.

    Raises UserError if the manifest is invalid.
    """
    section = config.evaluation
    found = _prepared_questions(config) or _assumed_questions(config)
    if found is None:
        return None
    questions, answer_tokens, basis = found
    if section.max_questions is not None and section.max_questions < questions:
        questions, basis = section.max_questions, f"evaluation.max_questions, of {questions:,} {basis}"
    if not questions:
        return None
    answers = questions * (2 + _more_answers(section))
    return EvaluationSize(questions, answers, answers * answer_tokens, f"{basis}, {answer_tokens:.0f} tokens an answer")


def _more_answers(section: EvaluationSection) -> float:
    """For a question, besides one of each model."""
    samples, retries = getattr(section, "samples", 1), getattr(section, "retries", 0)
    return (samples if samples > 1 else 0) + RETRIED_SHARE * retries


def _prepared_questions(config: RunConfig) -> tuple[int, float, str] | None:
    """Questions of the split that is scored, tokens of an answer, and their source as text; None if nothing is prepared."""
    folder = Path(config.data.output_dir)
    manifest = folder / MANIFEST
    if not is_prepared_from(folder, config.data):
        return None
    try:
        content = load_json(manifest)
        questions = int(content["counts"][config.evaluation.split])
        files = content.get("files")
        if isinstance(files, dict) and not any(str(name).startswith(f"{DATABASES}/") for name in files):
            questions = 0  # no SQL can be executed
        train = (content["tokens"] or {}).get("train") or {}
        tokens, records = train.get("completion"), int(content["counts"]["train"])
        mean = config.plan.answer_tokens if tokens is None else int(tokens) / records
        if questions < 0 or not mean > 0:
            raise ValueError(f"{questions} questions, {mean} tokens an answer")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise UserError(
            f"{manifest}: not a manifest of prepared data ({error!r}); run `finetune data prepare`",
            code="data.bad_manifest",
        ) from error
    return questions, mean, f"questions counted in {manifest}"


def _assumed_questions(config: RunConfig) -> tuple[int, float, str] | None:
    plan, data = config.plan, config.data
    if plan.questions is not None:
        return plan.questions, plan.answer_tokens, "questions (plan.questions)"
    share = data.test_fraction if config.evaluation.split == "test" else data.val_fraction
    scored = [source for source in data.sources if source.kind == "spider" or source.databases is not None]
    own = [_source_records(source) for source in scored if source.split == config.evaluation.split]
    shared = [_source_records(source) for source in scored if source.split == "auto"] if share else []
    if None in own or None in shared or not own + shared:
        return None
    questions = sum(filter(None, own)) + round(share * sum(filter(None, shared)))
    return questions, plan.answer_tokens, "questions counted in the local sources"


def run_size(config: RunConfig, gpus: int = 1) -> RunSize:
    """The size of a run on so many GPUs, from the prepared data's manifest.json, else from local sources or plan.records.

    Raises UserError if the number of examples is unknown, if the manifest is invalid, and like `examples_per_step`.
    """
    folder = Path(config.data.output_dir)
    manifest = folder / MANIFEST
    if is_prepared_from(folder, config.data):
        records, mean, validation, basis = _counted(manifest, config.plan.mean_tokens, config.model.name)
    else:
        records, validation, basis = _assumed_records(config)
        mean = config.plan.mean_tokens
        why = "was prepared from other files or settings" if manifest.is_file() else "is not prepared"
        basis = f"{basis}, {mean:.0f} tokens each (plan.mean_tokens); not counted, because {folder} {why}"
    return _sized(config.training, records, mean, validation, basis, gpus)


def size_on(size: RunSize, training: TrainingSection, gpus: int) -> RunSize:
    """The same run on another number of GPUs, where a step may take another number of examples."""
    return _sized(training, size.records, size.mean_tokens, size.validation, size.basis, gpus)


def _sized(training: TrainingSection, records: int, mean: float, validation: int, basis: str, gpus: int) -> RunSize:
    per_epoch = -(-records // examples_per_step(training, gpus))
    steps = training.max_steps if training.max_steps > 0 else math.ceil(per_epoch * training.num_train_epochs)
    tokens = records * mean * steps / per_epoch
    passes = -(-steps // training.eval_steps) if training.eval_steps else 0  # the trainer adds one at the end
    return RunSize(records, mean, steps, tokens, passes * validation * mean, validation, basis)


def _counted(manifest: Path, assumed_tokens: float, model: str) -> tuple[int, float, int, str]:
    """Training examples, mean tokens, validation examples, and their source as text, from a prepared folder. model: whose
    tokenizer should have counted."""
    try:
        content = load_json(manifest)
        counts, tokens = content["counts"], content["tokens"]
        records, validation = int(counts["train"]), int(counts["val"])
        train = tokens["train"] if tokens else None
        total = train["total"] if train else None
        if records < 1 or validation < 0:
            raise ValueError("no training examples")
        if total is None:
            basis = (
                f"{records:,} examples of {manifest}, {assumed_tokens:.0f} tokens each (plan.mean_tokens; not counted)"
            )
            return records, assumed_tokens, validation, basis
        if int(total) < records:
            raise ValueError(f"{total} tokens in {records} examples")
        other = content.get("tokenizer")
        whose = f", with the tokenizer of {shown(other)}, not of {model}" if other and other != model else ""
        return records, int(total) / records, validation, f"counted in {manifest}{whose}"
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(
            f"{manifest}: not a manifest of prepared data ({error!r}); run `finetune data prepare`",
            code="data.bad_manifest",
        ) from error


def _assumed_records(config: RunConfig) -> tuple[int, int, str]:
    """Training and validation examples after the split, and the source of these numbers as text."""
    data = config.data
    train_share = 1 - data.val_fraction - data.test_fraction
    found = {"auto": 0, "train": 0}
    unknown = False
    for source in data.sources:
        if source.split in ("auto", "train"):
            records = _source_records(source)
            found[source.split] += records or 0
            unknown = unknown or records is None
    if config.plan.records is not None:
        kept, basis = config.plan.records, "plan.records"
        validation = round(kept / train_share * data.val_fraction)
    elif not unknown and found["auto"] + found["train"]:
        kept = max(1, round(found["auto"] * train_share) + found["train"])
        validation = round(found["auto"] * data.val_fraction)
        basis = "counted in the local sources, less the held-out fractions"
    else:
        raise NotEstimated(
            f"{data.output_dir}: the data are not prepared, so their size is unknown; run `finetune data prepare "
            f"CONFIG`, or set plan.records to the number of training examples",
            code="data.unknown_size",
        )
    if data.max_train_records is not None and data.max_train_records < kept:
        kept, basis = data.max_train_records, f"data.max_train_records, of {kept:,}: {basis}"
    return kept, validation, f"{kept:,} training examples ({basis})"


def _source_records(source: SourceSection) -> int | None:
    """Records of a local source, counted; None for a source that is not on this machine."""
    path = Path(source.path)
    try:
        if source.kind == "jsonl" and path.is_file():
            with path.open("rb") as lines:
                return sum(1 for line in lines if line.strip())
        if source.kind == "spider" and path.is_dir():
            return sum(len(load_json(path / name)) for name in source.files)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error})", code="file.unreadable") from error
    return None
