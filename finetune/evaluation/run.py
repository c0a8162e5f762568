"""Scores a model: answers every held-out question, executes the SQL, and compares its rows with those of the gold SQL.

Base and tuned model use the same code, prompts and weights (the tuned model is the base model plus the adapter), so any
gain is due to the adapter. The base model's score does not depend on a run: it is cached under <output_dir>/base/ and reused
as long as weights, prompts, databases and settings stay the same.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.config.schema import EvaluationSection, RunConfig
from finetune.data.limits import LIMIT_KEYS, limits_of
from finetune.data.prepared import Prepared, load_prepared
from finetune.data.prompts import PromptTemplate, load_template
from finetune.data.records import Record, read_lines
from finetune.data.split import unit_hash
from finetune.errors import UserError
from finetune.evaluation.generators.base import Generator, LoadedModel
from finetune.evaluation.generators.registry import DEFAULT, generator_named
from finetune.evaluation.score import Row, as_dict, gain, score, score_answer
from finetune.models.device import choose_device
from finetune.models.load import require_adapter, weights_identity
from finetune.run_folder import RunFolder
from finetune.runtime.console import say
from finetune.runtime.files import atomic_file, write_json
from finetune.sql.engines.registry import open_sessions

ROWS = "rows.jsonl"
SCORE = "score.json"


@dataclass(frozen=True)
class EvaluationSet:
    """The questions of one evaluation, each with the database that its answer is executed on, and the generation settings."""

    config: RunConfig
    generator: Generator
    data: Prepared
    template: PromptTemplate
    records: list[Record]
    databases: list[Path]
    without_database: int  # records of the split left out because nothing can be executed for them

    def prompts(self) -> list[str]:
        return [self.template.render_record(record) for record in self.records]


def evaluate_base(
    config: RunConfig, *, loaded: LoadedModel | None = None, generator: str = DEFAULT, progress: bool = True
) -> dict[str, Any]:
    """Score the base model of a config, or read the cached score if there is one. Returns the score (see score.score).

    loaded: the model, with or without an adapter, if it is in memory already. generator: name of the answer generator in
    evaluation/generators/registry.py.
    """
    evaluation_set = _evaluation_set(config, generator_named(generator), PromptTemplate(config.data.schema_format))
    result = _cached_base(evaluation_set) or _score_base(
        evaluation_set, loaded or evaluation_set.generator.load(config, None), progress
    )
    return result[0]


def evaluate_run(
    run: RunFolder, *, base: bool = True, generator: str = DEFAULT, progress: bool = True
) -> dict[str, Any]:
    """Score a run's adapter and, unless `base` is False, its base model; write eval.json and eval/*.jsonl into the run
    folder. Returns the content of eval.json. Raises UserError if the adapter, the data or a database is missing.
    generator: as in `evaluate_base`."""
    config = run.config()
    require_adapter(run.adapter)
    evaluation_set = _evaluation_set(config, generator_named(generator), load_template(run.adapter))
    trained_on = run.record().data if run.run_json.is_file() else None
    if trained_on and trained_on.manifest_sha256 != evaluation_set.data.manifest_hash:
        say(
            f"{evaluation_set.data.folder}: not the data that {run.path} was trained on, which may have contained these questions"
        )
    model = evaluation_set.generator.load(config, run.adapter)
    scores: dict[str, dict[str, Any]] = {}
    rows: dict[str, list[Row]] = {}
    if base:
        scores["base"], rows["base"] = _cached_base(evaluation_set) or _score_base(evaluation_set, model, progress)
    scores["tuned"], rows["tuned"] = _ask(evaluation_set, model, progress, tuned=True)
    scores["tuned"]["adapter"] = str(run.adapter)
    for name in rows:
        _write_rows(run.eval_rows(name), rows[name])
        scores[name]["rows"] = str(run.eval_rows(name).relative_to(run.path))
    result = {
        "split": config.evaluation.split,
        "questions": len(evaluation_set.records),
        "without_database": evaluation_set.without_database,
        "data_manifest_sha256": evaluation_set.data.manifest_hash,
        "prompt_version": evaluation_set.template.identity(),
        "rule": config.evaluation.rule,
        "models": scores,
        "gain": gain(rows["base"], rows["tuned"]) if base else None,
    }
    write_json(run.eval_json, result)
    return result


def _evaluation_set(config: RunConfig, generator: Generator, template: PromptTemplate) -> EvaluationSet:
    data = load_prepared(Path(config.data.output_dir))
    records = data.records(config.evaluation.split)
    asked = [(r, database) for r in records if (database := data.database(r))]
    without_database = len(records) - len(asked)
    if not asked:
        raise UserError(
            f"{data.folder}: no record of the split {config.evaluation.split} comes with a database, so nothing can be executed; "
            "give data.sources[..].databases and run `finetune data prepare CONFIG` again",
            code="data.no_database",
        )
    if without_database:
        say(f"{data.folder}: {without_database} of {len(records)} {config.evaluation.split} records come without a "
             "database and are left out")  # fmt: skip
    limit = config.evaluation.max_questions
    if limit is not None and limit < len(asked):
        chosen = sorted(asked, key=lambda pair: unit_hash(config.data.seed, pair[0].id))[:limit]
        asked = [pair for pair in asked if pair in chosen]
    return EvaluationSet(
        config, generator, data, template, [r for r, _ in asked], [d for _, d in asked], without_database
    )


def _ask(
    evaluation_set: EvaluationSet, model: LoadedModel, progress: bool, *, tuned: bool
) -> tuple[dict[str, Any], list[Row]]:
    """Generate and score all answers of the tuned or of the base model."""
    evaluation = evaluation_set.config.evaluation
    prompts, name = evaluation_set.prompts(), "tuned model" if tuned else "base model"
    started = time.monotonic()
    answers = model.answers(
        prompts,
        tuned=tuned,
        batch_size=evaluation.batch_size,
        max_new_tokens=evaluation.max_new_tokens,
        description=f"{name} answers",
        progress=progress,
    )
    seconds = time.monotonic() - started
    questions = zip(evaluation_set.records, evaluation_set.databases, prompts, answers, strict=True)
    with open_sessions(limits_of(evaluation)) as session:
        rows = [
            score_answer(
                record,
                database,
                prompt,
                answer,
                new_tokens,
                sandbox=session(record.dialect),
                rule=evaluation.rule,
                timeout_seconds=evaluation.timeout_seconds,
            )
            for record, database, prompt, (answer, new_tokens) in tqdm(
                questions, total=len(prompts), desc=f"{name} rows", unit="question", delay=2, disable=not progress
            )
        ]
    result = {
        "model": evaluation_set.config.model.name,
        "adapter": None,
        "seconds": round(seconds, 3),
        "dtype": model.dtype_name,
    }
    return result | score(rows), rows


def _score_base(evaluation_set: EvaluationSet, model: LoadedModel, progress: bool) -> tuple[dict[str, Any], list[Row]]:
    """Score the base model, with any adapter disabled, and cache the result for later runs."""
    result, rows = _ask(evaluation_set, model, progress, tuned=False)
    folder = _base_folder(evaluation_set)
    _write_rows(folder / ROWS, rows)
    write_json(folder / SCORE, result)
    return result, rows


def _cached_base(evaluation_set: EvaluationSet) -> tuple[dict[str, Any], list[Row]] | None:
    """The base model's cached score; None if there is none that can be read."""
    folder = _base_folder(evaluation_set)
    try:
        cached = json.loads((folder / SCORE).read_text(encoding="utf-8"))
        return cached, [Row(**line.value) for line in read_lines(folder / ROWS)]
    except (OSError, ValueError, TypeError, UserError):  # missing, corrupt, or of another version of Row
        return None


def _base_folder(evaluation_set: EvaluationSet) -> Path:
    """The cache folder, named by a hash of everything that the base model's score depends on."""
    model, evaluation = asdict(evaluation_set.config.model), asdict(evaluation_set.config.evaluation)
    del model["max_seq_length"], evaluation["batch_size"]  # the first concerns training, the second speed
    for key in LIMIT_KEYS:  # not named at their defaults: scores cached before these keys existed stay valid
        if evaluation[key] == getattr(EvaluationSection(), key):
            del evaluation[key]
    files = evaluation_set.data.manifest["files"]
    depends = {
        "model": model,
        "weights": weights_identity(evaluation_set.config.model),
        "quantization": asdict(evaluation_set.config.quantization),
        "dtype": choose_device(evaluation_set.config.model.torch_dtype).dtype_name,
        "evaluation": evaluation,
        "questions": [
            [
                record.id,
                prompt,
                record.sql,
                record.dialect,
                files[str(database.relative_to(evaluation_set.data.folder))],
            ]
            for record, prompt, database in zip(
                evaluation_set.records, evaluation_set.prompts(), evaluation_set.databases, strict=True
            )
        ],
    }
    if evaluation_set.generator is not generator_named(
        DEFAULT
    ):  # not named: scores cached before this key existed stay valid
        depends["generator"] = [evaluation_set.generator.name, evaluation_set.generator.version]
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:12]
    name = Path(evaluation_set.config.model.name).name or "model"
    return Path(evaluation_set.config.training.output_dir) / "base" / f"{name}-{key}"


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    with atomic_file(path) as file:
        file.writelines(json.dumps(as_dict(row), ensure_ascii=False) + "\n" for row in rows)
