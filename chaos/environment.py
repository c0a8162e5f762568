"""The test environment of the chaos runs: a model with random weights, a small generated data set, and the configurations."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune.config.schema import DataSection, SourceSection
from finetune.data.prepare import prepare
from finetune.data.records import Record, Split, write_records
from finetune.runtime.files import write_text

SCHEMA = "CREATE TABLE train (id INTEGER PRIMARY KEY, name TEXT, leaves REAL);"
QUESTIONS: tuple[tuple[str, str], ...] = (
    ("What is the train with number {n} called?", "SELECT name FROM train WHERE id = {n}"),
    ("How many trains leave after {n}?", "SELECT COUNT(*) FROM train WHERE leaves > {n}"),
    ("Name the trains that leave before {n}, the first of them first.",
     "SELECT name FROM train WHERE leaves < {n} ORDER BY leaves"),
)  # fmt: skip
SPLITS: tuple[Split, ...] = ("train",) * 120 + ("val",) * 6 + ("test",) * 6
BATCH_SIZE = 3
USD_PER_HOUR = 3600.0
"""A dollar a second, so that cents are milliseconds."""


@dataclass(frozen=True)
class Kind:
    """A configuration whose runs are killed. steps: optimizer steps of the whole run; interval: steps between two checkpoints."""

    name: str
    steps: int
    interval: int
    sections: dict[str, dict[str, Any]]


_EPOCH = SPLITS.count("train") // BATCH_SIZE

KINDS = (
    Kind("float32", 2 * _EPOCH, 8, {"quantization": {"load_in_4bit": False}, "training": {"max_steps": 2 * _EPOCH}}),
    Kind(
        "dropout",
        2 * _EPOCH,
        10,
        {
            "quantization": {"load_in_4bit": False},
            "lora": {"lora_dropout": 0.2},
            "training": {"num_train_epochs": 2, "eval_steps": 7, "gradient_checkpointing": True},
            "checkpoint": {"keep_every": 3},
        },
    ),
    Kind("fused", 2 * _EPOCH, 6, {"training": {"max_steps": 2 * _EPOCH, "kernels": "fused"}}),  # with NF4 weights
)


def kind_of(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)


@dataclass(frozen=True)
class ChaosEnvironment:
    """The folder that holds model, data, configs and runs."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def data(self) -> Path:
        return self.folder / "prepared"

    def config(self, kind: Kind, run_name: str, runs: Path) -> Path:
        """Write the YAML config of one run, whose folder will be runs/run_name. Returns its path."""
        values: dict[str, dict[str, Any]] = {
            "model": {"name": str(self.model), "max_seq_length": 256},
            "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0},
            "data": asdict(data_section(self.folder)),
            "training": {
                "output_dir": str(runs),
                "run_name": run_name,
                "effective_batch_size": BATCH_SIZE,
                "learning_rate": 1e-2,
                "optim": "adamw_torch",
                "logging_steps": 1,
                "eval_steps": 0,
            },
            "checkpoint": {"save_steps": kind.interval, "every_minutes": None},
            "budget": {"usd_per_hour": USD_PER_HOUR},
            "tracking": {"wandb": "disabled"},
        }
        for section, changes in kind.sections.items():
            values[section] = values.get(section, {}) | changes
        path = self.folder / "configs" / f"{run_name}.yaml"
        write_text(path, yaml.safe_dump(values))
        return path


def make_environment(folder: Path) -> ChaosEnvironment:
    """Write model, tokenizer, database, records and prepared data into an empty folder."""
    from benchmarks.random_model import make

    records = _records()
    make("tiny", folder / "model", (f"{each.schema}\n{each.question}\n{each.sql}" for each in records))
    _database(folder / "databases" / "station" / "station.sqlite")
    write_records(folder / "records.jsonl", records)
    prepare(data_section(folder), max_seq_length=256, timeout_seconds=10, progress=False)
    return ChaosEnvironment(folder)


def data_section(folder: Path) -> DataSection:
    source = SourceSection(kind="jsonl", path=str(folder / "records.jsonl"), databases=str(folder / "databases"))
    return DataSection([source], str(folder / "prepared"), val_fraction=0.1, test_fraction=0.1)


def _records() -> list[Record]:
    """Three question templates in turn, each with its own number, so that all questions differ."""
    records = []
    for number, split in enumerate(SPLITS):
        question, sql = (text.format(n=number) for text in QUESTIONS[number % len(QUESTIONS)])
        records.append(Record(f"c{number}", "station", question, sql, SCHEMA, split=split))
    return records


def _database(path: Path) -> None:
    draws = random.Random(0)
    path.parent.mkdir(parents=True)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(SCHEMA)
        rows = [(number, f"train {number}", round(draws.uniform(0, 72), 2)) for number in range(len(SPLITS))]
        connection.executemany("INSERT INTO train VALUES (?, ?, ?)", rows)
