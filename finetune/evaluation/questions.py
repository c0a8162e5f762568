"""The questions of an evaluation, each with its database, and what their answers and verdicts depend on."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import sqlglot

from finetune.config.schema import EvaluationSection, RunConfig
from finetune.data.prepared import Prepared, load_prepared
from finetune.data.prompts import PromptTemplate
from finetune.data.records import Record
from finetune.data.split import unit_hash
from finetune.errors import UserError
from finetune.evaluation.generators.base import Generator
from finetune.prepared_from import check_prepared_from
from finetune.runtime.console import say
from finetune.runtime.files import sha256_file

STOPPING_VERSION = 4
"""Raise it when generation stops at other places of an answer (data/answers.py): answers generated before are then not reused."""
JUDGING_VERSION = 4
"""Raise it when other SQL is taken out of an answer, or when a rule changes: cached verdicts are then computed again."""
GENERATION_KEYS = (
    *("generator", "adapter", "batch_size", "max_new_tokens", "dequantize", "dtype"),
    *("samples", "temperature", "seed", "retries"),
)
"""Of the section `evaluation`: they concern the answers. `split` and `max_questions` choose the questions, and every other key
concerns the verdicts."""
CHOICE_KEYS = ("split", "max_questions")


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one evaluation, each with the database that its answer is executed on."""

    config: RunConfig
    data: Prepared
    template: PromptTemplate
    records: list[Record]
    databases: list[Path]
    without_database: int  # records of the split left out because nothing can be executed for them

    @property
    def evaluation(self) -> EvaluationSection:
        return self.config.evaluation

    @cached_property
    def prompts(self) -> list[str]:
        return [self.template.render_record(record) for record in self.records]

    def judging_settings(self) -> dict[str, Any]:
        """What the verdicts depend on apart from answers, golds and databases: part of eval.json."""
        evaluation = asdict(self.config.evaluation)
        return {
            **{key: value for key, value in evaluation.items() if key not in GENERATION_KEYS + CHOICE_KEYS},
            "versions": [JUDGING_VERSION, sqlite3.sqlite_version, sqlglot.__version__],
        }

    def judging(self) -> str:
        """A hash of what the verdicts on given answers depend on."""
        files = self.data.manifest["files"]
        depends = {
            "settings": self.judging_settings(),
            "golds": [
                [record.id, record.sql, record.dialect, files[str(database.relative_to(self.data.folder))]]
                for record, database in zip(self.records, self.databases, strict=True)
            ],
        }
        return short_hash(depends)


@dataclass(frozen=True)
class EvaluationSet(QuestionSet):
    """The questions of a model, and how it answers them."""

    generator: Generator

    def generation(self, adapter: Path | None) -> dict[str, Any]:
        """What the answers depend on, apart from the prompts. The batch size is left out: it changes rounding only, and an
        incomplete file of answers is checked for it."""
        from finetune.models.source import weights_identity  # here, because it needs torch, and judging does not

        config, model = self.config, asdict(self.config.model)
        del model["max_seq_length"]  # of training
        return {
            "model": model,
            "weights": weights_identity(config.model),
            "quantization": asdict(config.quantization),
            "adapter": None if adapter is None else adapter_identity(adapter),
            "max_new_tokens": config.evaluation.max_new_tokens,
            "generator": {
                "name": self.generator.name,
                "version": self.generator.version,
                **self.generator.settings(config),
            },
            "stopping": STOPPING_VERSION,
        }


def evaluation_set(
    config: RunConfig, generator: Callable[[int], Generator], template: PromptTemplate, *, of_run: bool = True
) -> EvaluationSet:
    """The questions of a config for a model. generator: chosen once it is known how many questions there are. of_run, and what is
    raised: as in `questions_of`."""
    asked = questions_of(config, template, of_run=of_run)
    return EvaluationSet(**vars(asked), generator=generator(len(asked.records)))


def questions_of(config: RunConfig, template: PromptTemplate, *, of_run: bool = True) -> QuestionSet:
    """of_run: the config is that of a run, whose data are known by their hash, so that they need not be compared with it. Raises
    UserError if the data are missing, have changed, or are not those of the config, or if no record comes with a database."""
    data = load_prepared(Path(config.data.output_dir))
    if not of_run:
        check_prepared_from(data.folder, data.manifest, config.data)
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
        chosen = {r.id for r, _ in sorted(asked, key=lambda pair: unit_hash(config.data.seed, pair[0].id))[:limit]}
        asked = [pair for pair in asked if pair[0].id in chosen]
    return QuestionSet(config, data, template, [r for r, _ in asked], [d for _, d in asked], without_database)


def adapter_identity(folder: Path) -> dict[str, str]:
    """The SHA-256 of the adapter's weights and settings; not of the README beside them."""
    return {path.name: sha256_file(path) for path in sorted(folder.glob("adapter_*")) if path.is_file()}


def short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
