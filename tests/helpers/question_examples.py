"""Runs whose answers have results and prompts, as evaluation writes them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from finetune.data.records import Record
from finetune.evaluation.prompt_file import write_prompts
from finetune.evaluation.result_sample import samples
from finetune.evaluation.score import sha256
from finetune.sql.engines.base import QueryResult, SqlValue
from tests.helpers.report_fixtures import build_run, rows, write, write_evaluation

SCHEMA = "### sqlite schema\nCREATE TABLE member (name TEXT, joined TEXT)\n"
CLASSES = {"no such table": "no_such_table", "no such column": "no_such_column"}


def result(*found: tuple[SqlValue, ...], columns: tuple[str, ...] = ("name", "amount")) -> QueryResult:
    return QueryResult(list(found), columns, None, None, 0.0)


def prompt_of(row: dict[str, Any]) -> str:
    return f"{SCHEMA}### Question\n{row['question']}\n### SQL\n"


def run_with_results(folder: Path, *, questions: int, change: Any = lambda number, row: None) -> Path:
    """A finished run. change: called with the number and each row, before results and hashes are added."""
    run = build_run(folder, questions=questions)
    base, tuned = rows(questions)
    for answers in (base, tuned):
        for number, row in enumerate(answers):
            change(number, row)
            _add(number, row)
    write_evaluation(run, base=base, tuned=tuned)
    evaluation = json.loads((run / "eval.json").read_text())
    for name, answers in (("base", base), ("tuned", tuned)):
        classes = Counter(row["error_class"] for row in answers if row["error_class"])
        evaluation["models"][name]["error_classes"] = dict(classes.most_common())
    write(run / "eval.json", evaluation)
    records = [Record(row["id"], row["db_id"], row["question"], row["gold"], SCHEMA) for row in tuned]
    write_prompts(run / "eval", records, [prompt_of(row) for row in tuned])
    return run


def _add(number: int, row: dict[str, Any]) -> None:
    right = row["verdict"] == "correct"
    gold = result(*[(f"name {number}-{line}", line) for line in range(number % 15)])
    found = gold if right else result(("other", None)) if row["verdict"] == "wrong_rows" else None
    row["gold_sample"], row["result_sample"] = samples(gold, found)
    row["prompt_sha256"] = sha256(prompt_of(row))
    error = str(row["error"] or "").partition(":")[0]
    row["error_class"] = None if right else CLASSES.get(error, row["verdict"])


def changed_rows(run: Path, model: str, change: Any) -> None:
    """Change every row of a model's answers in place."""
    path = run / "eval" / f"{model}.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(lines):
        change(number, row)
    path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
