"""Scores a model: answers every held-out question, executes the SQL, and compares its rows with those of the gold SQL.

Base and tuned model use the same code, prompts and weights (the tuned model is the base model plus the adapter), so any
gain is due to the adapter. Answers are kept as they come (answers.py) and judged while others are generated (judging.py): an
evaluation that was killed goes on where it was, and one with another rule or time limit only judges again. The base model's
answers and score do not depend on a run: they are in base/ beside the runs and are used as long as weights, prompts and settings
stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from finetune.config.schema import EvaluationSection, RunConfig
from finetune.data.prompts import PromptTemplate, dialects_of, load_template
from finetune.data.records import read_lines
from finetune.errors import Interrupted, UserError
from finetune.evaluation.answers import AnswerFile
from finetune.evaluation.asking import Price, answers_key, complete
from finetune.evaluation.beyond_greedy import Beyond, wanted
from finetune.evaluation.cost import Load, cost_of, evaluation_price, training_usd, whole_cost
from finetune.evaluation.generators.base import Generator, LoadedModel
from finetune.evaluation.generators.registry import generator_for
from finetune.evaluation.judging import Judging, Speed, judging
from finetune.evaluation.leaks import leaks
from finetune.evaluation.paired import gains
from finetune.evaluation.prompt_file import write_prompts
from finetune.evaluation.questions import EvaluationSet, evaluation_set
from finetune.evaluation.result_sample import SAMPLE_VERSION
from finetune.evaluation.score import Row, score, write_rows
from finetune.models.load import require_adapter
from finetune.run_folder import RunFolder
from finetune.runtime.console import say
from finetune.runtime.files import load_json, write_json

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
    template = PromptTemplate(config.data.schema_format)
    questions = evaluation_set(config, _chosen(config, generator), template, of_run=False)
    base = _base(questions, Path(config.training.output_dir))
    load, price = cache(lambda: loaded or questions.generator.load(config, None)), _price(questions)
    with _judging(questions, [base]) as judged:
        _complete(questions, [base], load, price, judged, progress)
    return base.result[0] | {"cost": cost_of([base.answers]).as_dict()}


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
    questions = evaluation_set(config, _chosen(config, generator), load_template(run.adapter))
    trained_on = run.record().data if run.run_json.is_file() else None
    if trained_on and trained_on.manifest_sha256 != questions.data.manifest_hash:
        say(
            f"{questions.data.folder}: not the data that {run.path} was trained on, which may have contained these questions"
        )
    models = [*([_base(questions, run.path.parent)] if base else []), _tuned(questions, run)]
    load, price = cache(lambda: questions.generator.load(config, run.adapter)), _price(questions)
    with _judging(questions, models) as judged:
        _complete(questions, models, load, price, judged, progress)
        beyond: dict[str, Any] = {}
        if wanted(config.evaluation):
            more = Beyond(questions, run, load, price, judged, progress)
            with _what_is_kept(more.files):
                beyond = more.scores(models[-1].result[1])
    write_prompts(run.path / "eval", questions.records, questions.prompts)
    scores: dict[str, dict[str, Any]] = {}
    for model in models:
        result, rows = model.result
        write_rows(run.eval_rows(model.name), rows)
        rows_file = str(run.eval_rows(model.name).relative_to(run.path))
        scores[model.name] = result | {"rows": rows_file, "cost": cost_of([model.answers]).as_dict()}
    scores["tuned"] |= {"adapter": str(run.adapter), **beyond}
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
        "max_new_tokens": config.evaluation.max_new_tokens,
        "leaks": leaks(questions.data, config.evaluation.split, trained_on.manifest_sha256 if trained_on else None),
        "cost": whole_cost([model.answers for model in models], scores, training_usd(run.ledger)),
        "judging": questions.judging_settings(),
        "models": scores,
        **(gains(models[0].result[1], models[1].result[1]) if base else no_gain),
    }
    write_json(run.eval_json, result)
    return result


@contextmanager
def _judging(questions: EvaluationSet, models: Sequence[Model]) -> Iterator[Judging]:
    """Judging that leaves the CPU to the model, if one has to answer there."""
    more = wanted(questions.evaluation)
    nothing = not more and all(model.rows is not None for model in models)
    generates = more or not all(model.answers.complete for model in models)
    on_cpu = questions.generator.settings(questions.config).get("device") == "cpu"
    with judging(questions, 0 if nothing else None, beside_cpu=generates and on_cpu) as judged:
        yield judged


def _chosen(config: RunConfig, name: str | None) -> Callable[[int], Generator]:
    return lambda questions: generator_for(config, name, questions=questions)


def _price(questions: EvaluationSet) -> Price:
    return cache(lambda: evaluation_price(questions.config.budget))


def _base(questions: EvaluationSet, runs: Path) -> Model:
    """The base model, with its cached rows and score if they are there. runs: the folder of the run, which need not be the
    output_dir of its config, since a run may be copied from a bucket."""
    folder = _base_folder(questions, runs)
    model = Model("base", False, _answer_file(questions, folder / ANSWERS, "base model", None))
    try:
        cached = load_json(folder / SCORE)
        same = cached.pop("judged") == questions.judging() and cached.pop("sampled", None) == SAMPLE_VERSION
        if model.answers.complete and same:
            rows = [Row(**line.value) for line in read_lines(folder / ROWS)]
            if [row.id for row in rows] == [record.id for record in questions.records]:
                model.rows, model.score = rows, cached
    except (OSError, ValueError, TypeError, LookupError, AttributeError, UserError):
        pass  # missing, corrupt, or of another version of Row
    return model


def _tuned(questions: EvaluationSet, run: RunFolder) -> Model:
    settings = questions.generation(run.adapter)
    path = run.path / "eval" / "answers" / f"tuned-{answers_key(settings, questions.prompts)}.jsonl"
    return Model("tuned", True, _answer_file(questions, path, "tuned model", run.adapter))


def _answer_file(questions: EvaluationSet, path: Path, name: str, adapter: Path | None) -> AnswerFile:
    size = questions.config.evaluation.batch_size
    answers = AnswerFile(path, name, questions.generation(adapter), questions.prompts, size)
    answers.read()
    return answers


def _base_folder(questions: EvaluationSet, runs: Path) -> Path:
    """The folder of the base model's answers and score, named by a hash of everything that the answers depend on."""
    name = Path(questions.config.model.name).name or "model"
    key = answers_key(questions.generation(None), questions.prompts)
    return runs / "base" / f"{name}-{key}"


def _complete(
    questions: EvaluationSet, models: Sequence[Model], load: Load, price: Price, judged: Judging, progress: bool
) -> None:
    """Generate the missing answers, judge those without verdicts beside it, and write the base model's score into its folder."""
    unjudged = [model for model in models if model.rows is None]
    with _what_is_kept([model.answers for model in unjudged]):
        for model in unjudged:
            complete(
                model.answers,
                load,
                price,
                tuned=model.tuned,
                max_new_tokens=questions.config.evaluation.max_new_tokens,
                progress=progress,
                told=partial(judged.submit, model.name),
            )
            _require_memory(model)
        if not wanted(questions.evaluation):
            judged.nothing_else_runs()
        for model in unjudged:
            rows = judged.rows(model.name, progress=progress)
            model.rows, model.score = rows, _facts(questions, model, judged.speed(model.name)) | score(rows)
            if not model.tuned:
                folder = model.answers.path.parent
                write_rows(folder / ROWS, rows)
                write_json(folder / SCORE, model.score | {"judged": questions.judging(), "sampled": SAMPLE_VERSION})


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


def _facts(questions: EvaluationSet, model: Model, judging: Speed) -> dict[str, Any]:
    """seconds: of generating, without loading (cost.py has that). judging: the seconds in which an answer was being judged."""
    per_second = judging.per_second
    return {
        "model": questions.config.model.name,
        "adapter": None,
        "seconds": round(model.answers.seconds, 3),
        "dtype": model.answers.dtype,
        "generator": model.answers.settings["generator"],
        "judging": {
            "answers": judging.answers,
            "seconds": round(judging.seconds, 3),
            "answers_per_second": None if per_second is None else round(per_second, 1),
        },
    }
