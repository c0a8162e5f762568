"""Questions to judge without a model: golds, databases and answers from the shared data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import EvaluationSection
from finetune.data.records import Record
from finetune.evaluation.generators.base import Answer
from finetune.evaluation.score import Row, as_dict
from finetune.sql.engines.sqlite import ddl_of_database
from tests.helpers.data_examples import row

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@dataclass
class Questions:
    """As `judging.Questions`."""

    records: list[Record]
    databases: list[Path]
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)

    @property
    def prompts(self) -> list[str]:
        return [record.question for record in self.records]


def of_shop(database: Path, golds: Sequence[str], **settings: Any) -> Questions:
    """Questions about the shop of data_examples. settings: keys of the section evaluation."""
    records = [Record(**row(number, sql=sql)) for number, sql in enumerate(golds)]
    return Questions(records, [database] * len(records), EvaluationSection(**settings))


def answers(texts: Sequence[str]) -> list[Answer]:
    return [Answer(text, 3) for text in texts]


def official_cases() -> tuple[Questions, list[Answer], list[dict[str, Any]]]:
    """The 800 predictions with the verdicts of the public evaluators."""
    path = SHARED / "evaluator_cases.jsonl"
    if not path.is_file():
        pytest.skip("the shared data are not here")
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    schemas: dict[Path, str] = {}
    records, databases = [], []
    for case in cases:
        name = case["db_id"]
        database = SHARED / "evaluator_databases" / name / f"{name}.sqlite"
        if database not in schemas:
            schemas[database] = ddl_of_database(database)
        records.append(Record(case["id"], name, case["question"], case["gold"], schemas[database]))
        databases.append(database)
    return Questions(records, databases), answers([case["pred"] for case in cases]), cases


def timeless(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows without what differs from run to run."""
    return [{key: value for key, value in as_dict(row).items() if key != "seconds"} for row in rows]
