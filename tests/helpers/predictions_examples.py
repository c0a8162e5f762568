"""A prepared set of six questions about two databases, a config over it that names no model, files of answers to it, and
verdicts as they are compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from finetune.config.load import load_config
from finetune.data.records import Record, read_records
from finetune.evaluation.score import Row, score, write_rows
from finetune.run_folder import RunFolder, create_run
from finetune.runtime.files import write_json
from tests.helpers.data_examples import described, jsonl_source, make_database, row, run_prepare, write_jsonl

QUESTIONS = 6
SPLITS = ["train", "train", "val", *["test"] * QUESTIONS]


def prepare_two(folder: Path, *, with_database: int = QUESTIONS, **changes: Any) -> Path:
    """folder/prepared, whose test split has questions about `shop`, `port`, `shop`, ... with_database: how many of them have a
    database; the others are about `nowhere`. changes: keys of the data section."""
    databases = folder / "databases"
    rows = [row(number, split=split, db_id=("shop", "port")[number % 2]) for number, split in enumerate(SPLITS)]
    for name in ("shop", "port"):
        make_database(databases, name, items=20)
    found = len(rows) - QUESTIONS + with_database
    sources = [jsonl_source(write_jsonl(folder / "records.jsonl", rows[:found]), databases=str(databases))]
    if rows[found:]:
        nowhere = [one | {"db_id": "nowhere"} for one in rows[found:]]
        sources.append(jsonl_source(write_jsonl(folder / "more.jsonl", nowhere)))
    run_prepare(sources, folder / "prepared", **changes)
    return folder / "prepared"


def write_config(folder: Path, prepared: Path, name: str = "theirs.yaml", **evaluation: Any) -> Path:
    path = folder / name
    sections = {
        "model": {"name": "nobody/nothing", "revision": "0" * 40},
        "data": described(prepared),
        "training": {"output_dir": str(folder / "runs")},
        "evaluation": evaluation,
    }
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


def untrained_run(config: Path) -> RunFolder:
    return create_run(load_config(config), config)


def questions_of(prepared: Path) -> list[Record]:
    return read_records(prepared / "test.jsonl")


def as_jsonl(answers: Mapping[str, str | None]) -> str:
    return "".join(json.dumps({"id": name, "sql": answer}) + "\n" for name, answer in answers.items())


def made(verdict: str, number: int = 0, **changes: Any) -> Row:
    """A judged answer to question q<number> about the database `shop`. changes: fields of the row."""
    row = Row(
        id=f"q{number}", db_id="shop", question=f"question {number}?", difficulty="easy", gold="SELECT 1",
        prediction="SELECT 1" if verdict == "correct" else "SELECT 2", answer="", verdict=verdict, error=None, seconds=0.0,
        new_tokens=5, double_quoted_text=False, prompt_sha256="", gold_sha256="",
    )  # fmt: skip
    return replace(row, **changes)


def write_result(folder: Path, rows: Sequence[Row], **changes: Any) -> Path:
    """folder/eval.json and rows.jsonl, as `evaluate CONFIG --predictions` writes them. changes: keys of eval.json."""
    write_rows(folder / "rows.jsonl", rows)
    result = {
        "split": "test",
        "data_manifest_sha256": "a" * 64,
        "prompt_version": None,
        "rule": "test_suite",
        "timeout_seconds": 10.0,
        "predictions": {"name": folder.name, "target": "theirs.yaml", "overrides": [], "file": "theirs.sql"},
        "models": {"predictions": score(rows) | {"rows": "rows.jsonl"}},
    }
    write_json(folder / "eval.json", result | changes)
    return folder
