"""Scores a model: answers every held-out question, executes the SQL, and compares its rows with those of the gold SQL.

Base and tuned model use the same code, prompts and weights (the tuned model is the base model plus the adapter), so any
gain is due to the adapter. Answers are kept as they come (answers.py): an evaluation that was killed goes on where it was, and
one with another rule or time limit only judges again. The base model's answers and score do not depend on a run: they are in
base/ beside the runs and are used as long as weights, prompts and settings stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.config.schema import EvaluationSection, RunConfig
from finetune.data.limits import limits_of
from finetune.data.prompts import PromptTemplate, dialects_of, load_template
from finetune.data.records import read_lines
from finetune.errors import Interrupted, UserError
from finetune.evaluation.answers import AnswerFile, prompts_hash
from finetune.evaluation.generators.base import LoadedModel
from finetune.evaluation.generators.registry import generator_for
from finetune.evaluation.paired import gains
from finetune.evaluation.questions import EvaluationSet, evaluation_set, short_hash
from finetune.evaluation.score import Judge, Row, score, write_rows
from finetune.models.load import require_adapter
from finetune.run_folder import RunFolder
from finetune.runtime.console import say
from finetune.runtime.files import load_json, write_json
from finetune.sql.engines.registry import open_sessions

ROWS = "rows.jsonl"
SCORE = "score.json"
ANSWERS = "answers.jsonl"


@dataclass
class Model:
    """The base or the tuned model in an evaluation: its answers, and its rows and score once they are known."""

    name: str
    tuned: bool
    answers: AnswerFile
    rows: list[Row] | None = None
    score: dict[str, Any] | None = None

    @property
    def result(self) -> tuple[dict[str, Any], list[Row]]:
        assert self.score is not None and self.rows is not None
        return self.score, self.rows


def evaluate_base(
    config: RunConfig,
    *,
    loaded: LoadedModel | None = None,
    generator: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Score the base model of a config, or read the cached score if there is one. Returns the score (see score.score).

    loaded: the model, with or without an adapter, if it is in memory already. generator: name of the answer generator,
    in place of evaluation.generator. Raises Interrupted on Ctrl-C.
    """
    questions = evaluation_set(config, generator_for(config, generator), PromptTemplate(config.data.schema_format))
    base = _base(questions, Path(config.training.output_dir))
    _complete(questions, [base], lambda: loaded or questions.generator.load(config, None), progress)
    return base.result[0]


def evaluate_run(
    run: RunFolder,
    *,
    base: bool = True,
    generator: str | None = None,
    evaluation: EvaluationSection | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Score a run's adapter and, unless `base` is False, its base model; write eval.json and eval/*.jsonl into the run
    folder. Returns the content of eval.json. Raises UserError if the adapter, the data or a database is missing.
    evaluation: replaces the section of the run's config. The others as in `evaluate_base`."""
    config = run.config()
    config.evaluation = evaluation or config.evaluation
    require_adapter(run.adapter)
    questions = evaluation_set(config, generator_for(config, generator), load_template(run.adapter))
    trained_on = run.record().data if run.run_json.is_file() else None
    if trained_on and trained_on.manifest_sha256 != questions.data.manifest_hash:
        say(
            f"{questions.data.folder}: not the data that {run.path} was trained on, which may have contained these questions"
        )
    models = [*([_base(questions, run.path.parent)] if base else []), _tuned(questions, run)]
    _complete(questions, models, lambda: questions.generator.load(config, run.adapter), progress)
    scores: dict[str, dict[str, Any]] = {}
    for model in models:
        result, rows = model.result
        write_rows(run.eval_rows(model.name), rows)
        scores[model.name] = result | {"rows": str(run.eval_rows(model.name).relative_to(run.path))}
    scores["tuned"]["adapter"] = str(run.adapter)
    no_gain = {"gain": None, "gain_by_rule": None, "gain_without_hollow": None}
    result = {
        "split": config.evaluation.split,
        "questions": len(questions.records),
        "without_database": questions.without_database,
        "data_manifest_sha256": questions.data.manifest_hash,
        "prompt_version": questions.template.identity(),
        "dialects": list(dialects_of(questions.records)),
        "rule": config.evaluation.rule,
        "timeout_seconds": config.evaluation.timeout_seconds,
        "judging": questions.judging_settings(),
        "models": scores,
        **(gains(models[0].result[1], models[1].result[1]) if base else no_gain),
    }
    write_json(run.eval_json, result)
    return result


def _base(questions: EvaluationSet, runs: Path) -> Model:
    """The base model, with its cached rows and score if they are there. runs: the folder of the run, which need not be the
    output_dir of its config, since a run may be copied from a bucket."""
    folder = _base_folder(questions, runs)
    model = Model("base", False, _answer_file(questions, folder / ANSWERS, "base model", None))
    try:
        cached = load_json(folder / SCORE)
        if model.answers.complete and cached.pop("judged") == questions.judging():
            rows = [Row(**line.value) for line in read_lines(folder / ROWS)]
            if [row.id for row in rows] == [record.id for record in questions.records]:
                model.rows, model.score = rows, cached
    except (OSError, ValueError, TypeError, LookupError, AttributeError, UserError):
        pass  # missing, corrupt, or of another version of Row
    return model


def _tuned(questions: EvaluationSet, run: RunFolder) -> Model:
    settings = questions.generation(run.adapter)
    path = run.path / "eval" / "answers" / f"tuned-{_key(questions, settings)}.jsonl"
    return Model("tuned", True, _answer_file(questions, path, "tuned model", run.adapter))


def _answer_file(questions: EvaluationSet, path: Path, name: str, adapter: Path | None) -> AnswerFile:
    size = questions.config.evaluation.batch_size
    answers = AnswerFile(path, name, questions.generation(adapter), questions.prompts, size)
    answers.read()
    return answers


def _base_folder(questions: EvaluationSet, runs: Path) -> Path:
    """The folder of the base model's answers and score, named by a hash of everything that the answers depend on."""
    name = Path(questions.config.model.name).name or "model"
    key = _key(questions, questions.generation(None))
    return runs / "base" / f"{name}-{key}"


def _key(questions: EvaluationSet, settings: dict[str, Any]) -> str:
    return short_hash([settings, prompts_hash(questions.prompts)])


def _complete(
    questions: EvaluationSet, models: Sequence[Model], load: Callable[[], LoadedModel], progress: bool
) -> None:
    """Generate the missing answers, judge those without verdicts, and write the base model's score into its folder."""
    unjudged = [model for model in models if model.rows is None]
    load_once = cache(load)
    with _what_is_kept([model.answers for model in unjudged]):
        for model in unjudged:
            if model.answers.answers:
                todo = "judging them" if model.answers.complete else "going on there"
                say(f"{model.answers.kept()} are there already; {todo}")
            model.answers.generate(
                load_once,
                tuned=model.tuned,
                max_new_tokens=questions.config.evaluation.max_new_tokens,
                progress=progress,
            )
            _require_memory(model)
        for model, rows in zip(unjudged, _judged(questions, unjudged, progress), strict=True):
            model.rows, model.score = rows, _facts(questions, model) | score(rows)
            if not model.tuned:
                folder = model.answers.path.parent
                write_rows(folder / ROWS, rows)
                write_json(folder / SCORE, model.score | {"judged": questions.judging()})


def _require_memory(model: Model) -> None:
    """One prompt that does not fit into memory is a verdict. Where none fits, it is the machine."""
    answers = model.answers.in_order()
    if all(answer.problem == "out_of_memory" for answer in answers):
        shortest = min(answer.prompt_tokens or 0 for answer in answers)
        raise UserError(
            f"out of memory with every prompt, also with one of {shortest} tokens alone; end other programs on this machine, or "
            "use one with more memory",
            code="gpu.out_of_memory",
        )


@contextmanager
def _what_is_kept(files: Sequence[AnswerFile]) -> Iterator[None]:
    """Turns Ctrl-C into `Interrupted`, which says which answers an evaluation goes on from."""
    try:
        yield
    except KeyboardInterrupt:
        kept = [file.kept() for file in files if file.answers]
        if kept:
            what = f"kept are {' and '.join(kept)}; the same command goes on from there"
            raise Interrupted(what, resumable=True) from None
        raise Interrupted("no answer was complete, so nothing is kept", resumable=False) from None


def _judged(questions: EvaluationSet, models: Sequence[Model], progress: bool) -> list[list[Row]]:
    """The rows of each model. Questions with the same gold query come one after the other, so that it is executed once."""
    evaluation = questions.config.evaluation
    pairs = list(zip(questions.records, questions.databases, strict=True))
    groups: dict[tuple[str, Path, str], list[int]] = {}
    for number, (record, database) in enumerate(pairs):
        groups.setdefault((record.dialect, database, record.sql), []).append(number)
    found: list[dict[int, Row]] = [{} for _ in models]
    answers = [model.answers.in_order() for model in models]
    with open_sessions(limits_of(evaluation)) as session, tqdm(
        total=len(pairs) * len(models), desc="judging answers", unit="answer", delay=2, disable=not progress
    ) as bar:  # fmt: skip
        judge = Judge(session, rule=evaluation.rule, timeout_seconds=evaluation.timeout_seconds)
        for number in (number for group in groups.values() for number in group):
            for rows, given in zip(found, answers, strict=True):
                answer = given[number]
                rows[number] = judge.row(*pairs[number], questions.prompts[number], answer)
                bar.update()
    return [[rows[number] for number in range(len(pairs))] for rows in found]


def _facts(questions: EvaluationSet, model: Model) -> dict[str, Any]:
    return {
        "model": questions.config.model.name,
        "adapter": None,
        "seconds": round(model.answers.seconds, 3),
        "dtype": model.answers.dtype,
    }
