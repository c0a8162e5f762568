"""Every question of a run as data for its page: what was asked, what was answered, and what both queries return."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.evaluation import prompt_file
from finetune.report.examples import clipped, error_class
from finetune.report.samples import sample_table
from finetune.report.source import Json, Source
from finetune.runtime.commands import evaluate_command
from finetune.runtime.files import load_json

PROMPTS = Path("eval", prompt_file.NAME)
MOST_CHARACTERS = 2000
"""Shown of one query, answer or message."""
LONGEST_START, SHORTEST_START, ALL_STARTS = 20_000, 2_000, 4_000_000
"""Characters of what several prompts begin with (the schema): of one, and of all together in a page."""
MEANING = {
    "correct": "returned the right rows",
    "wrong_rows": "ran, but returned other rows",
    "sql_error": "did not run",
    "timeout": "ran too long and was stopped",
    "no_sql": "the answer contained no SQL",
    "too_large": "its result or memory exceeded a limit",
    "forbidden": "tried to do more than read",
    "crashed": "crashed the database engine",
    "too_long": "exceeded the model's positions",
    "out_of_memory": "did not fit into memory, even alone",
    "failed": "was refused by the generator",
    "gold_failed": "the gold query failed, so there was nothing to compare with",
    "gold_limit": "the gold query hit a limit, so there was nothing to compare with",
    "gold_unstable": "the gold query gives another result each time",
}
"""Verdict -> what it says about an answer."""


class _Pool:
    """Equal values once, by number: most right answers return what gold returns, and many prompts share a schema."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._places: dict[str, int] = {}

    def place(self, value: Any) -> int | None:
        if value is None:
            return None
        key = repr(value)
        if key not in self._places:
            self._places[key] = len(self.values)
            self.values.append(value)
        return self._places[key]


def questions_data(source: Source) -> Json:
    """For templates/questions.js: models, questions (each with one answer or null per model), and the pools `tables` and
    `starts` whose places they name. Raises UserError if eval/prompts.json is damaged."""
    from finetune.evaluation.error_classes import ERROR_CLASSES  # here, because the command line loads nothing of it

    models = sorted(source.rows)
    by_model = [{str(row["id"]): row for row in source.rows[model]} for model in models]
    prompts = _Prompts(source.folder / PROMPTS, evaluate_command(source.folder))
    tables, starts = _Pool(), _Pool()
    questions = []
    for name in dict.fromkeys(name for rows in reversed(by_model) for name in rows):
        rows = [rows.get(name) for rows in by_model]
        known = [row for row in rows if row is not None]
        first = known[-1]
        start, rest = prompts.of(name, known)
        questions.append(
            {
                "id": name,
                **{key: str(first.get(key) or "") for key in ("db_id", "difficulty", "question")},
                "gold": clipped(str(first.get("gold") or ""), MOST_CHARACTERS),
                "rows": tables.place(_table(row.get("gold_sample") for row in known)),
                "prompt": None if rest is None else [starts.place(start), rest],
                "answers": [row and _answer(row, tables) for row in rows],
            }
        )
    most = max(SHORTEST_START, min(LONGEST_START, ALL_STARTS // max(1, len(starts.values))))
    return {
        "models": models,
        "questions": questions,
        "tables": tables.values,
        "starts": [clipped(start, most) for start in starts.values],
        "meaning": MEANING,
        "classes": {name: one.title for name, one in ERROR_CLASSES.items()},
    }


def _answer(row: Json, tables: _Pool) -> Json:
    sql = str(row.get("prediction") or "")
    return {
        "sql": clipped(sql or str(row.get("answer") or ""), MOST_CHARACTERS),
        "is_sql": bool(sql),
        "verdict": str(row["verdict"]),
        "class": error_class(row),
        "error": clipped(str(row.get("error") or ""), MOST_CHARACTERS),
        "rows": tables.place(_table([row.get("result_sample")])),
    }


def _table(samples: Iterable[Any]) -> Json | None:
    found = next((table for sample in samples if (table := sample_table(sample))), None)
    return None if found is None else found.as_dict()


class _Prompts:
    """eval/prompts.json (evaluation/prompt_file.py); evaluations of earlier versions wrote none."""

    def __init__(self, path: Path, command: str) -> None:
        self._starts: list[str] = []
        self._prompts: Json = {}
        try:
            found = load_json(path)
            self._starts, self._prompts = found["starts"], found["prompts"]
            if not isinstance(self._prompts, dict) or not all(isinstance(start, str) for start in self._starts):
                raise TypeError("starts and prompts")
        except FileNotFoundError:
            return
        except (OSError, ValueError, LookupError, TypeError):
            raise UserError(
                f"{path}: not a file of prompts; run `{command}` again, or delete it", code="report.bad_prompts"
            ) from None

    def of(self, name: str, rows: list[Json]) -> tuple[str, str | None]:
        """Start and rest of the prompt that these rows answer; (_, None) if it is not kept, or is another one."""
        try:
            number, rest = self._prompts[name]
            start = self._starts[number]
            whole = hashlib.sha256((start + rest).encode(errors="backslashreplace")).hexdigest()
        except (LookupError, ValueError, TypeError):
            return "", None
        return (start, rest) if any(row.get("prompt_sha256") == whole for row in rows) else ("", None)
