"""Reads somebody else's answers: one a line in the order of a split, or JSONL with the id of each question.

The lines of a text file are those that the public Spider evaluators take: one SQL query a line, a blank line for no answer, and
perhaps a tab and the name of the database behind it. JSONL has an object a line, with `id` and one of ANSWER_KEYS.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.data.records import Record
from finetune.errors import UserError, shown
from finetune.runtime.files import kind_of, parse_json, read_bytes

ANSWER_KEYS = ("sql", "prediction", "answer")
"""Keys of a JSONL line that may hold its answer; the first of them that is there counts."""
JSONL_ENDINGS = (".jsonl", ".ndjson")
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Expected:
    """The questions that a file may answer. split: the whole split in its order. asked: the ids of those that are judged: with a
    database, and of the sample if there is one. source: the file that holds the split. sampled: the number of questions that
    evaluation.max_questions leaves, None if it leaves all."""

    split_name: str
    split: Sequence[Record]
    asked: frozenset[str]
    source: Path
    sampled: int | None = None

    @property
    def phrase(self) -> str:
        return f"{len(self.split)} questions of the {self.split_name} split ({self.source})"


@dataclass(frozen=True)
class PredictionFile:
    """The answers by the id of their question, as text with SQL in it; "" where there is none. ignored: answers to questions of
    the split that are not judged."""

    format: Literal["lines", "jsonl"]
    answers: dict[str, str]
    ignored: int


def read_predictions(path: Path, expected: Expected) -> PredictionFile:
    """Raises UserError, which names the line, for a file that does not hold one answer to each question that is asked."""
    lines = _lines(path)
    start = next((line.strip() for line in lines if line.strip()), "")
    if path.suffix.lower() in JSONL_ENDINGS or start.startswith("{"):
        answers, kind = _of_jsonl(path, lines, expected), "jsonl"
    elif start.startswith("[") and _is_json("\n".join(lines)):
        raise UserError(
            f"{path}:1: a JSON array; expected one SQL query a line, or JSONL, one object a line, as `jq -c '.[]'` writes it",
            code="predictions.bad_file",
        )
    else:
        answers, kind = _of_lines(path, lines, expected), "lines"
    asked = {name: answers[name] for name in answers if name in expected.asked}
    return PredictionFile("jsonl" if kind == "jsonl" else "lines", asked, len(answers) - len(asked))


def _lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, with or without a byte-order mark, ended by LF or CRLF. No other character ends a line."""
    if (kind := kind_of(path)) != "a file":
        found = "no such file" if kind == "nothing" else kind
        raise UserError(
            f"{path}: {found}; expected a file with one SQL query a line, or JSONL", code="predictions.not_found"
        )
    try:
        content = read_bytes(path)
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror})", code="predictions.not_found") from error
    if content[:2] in UTF_16:
        raise UserError(f"{path}: UTF-16 text; save it as UTF-8", code="predictions.bad_encoding")
    rows = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not rows[-1]:
        rows.pop()  # the last line ends, too
    lines = []
    for number, row in enumerate(rows, 1):
        try:
            lines.append(row.removesuffix(b"\r").decode())
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}:{number}: not UTF-8 text ({error.reason} at byte {error.start}); save the file as UTF-8",
                code="predictions.bad_encoding",
            ) from None
    if not any(line.strip() for line in lines):
        raise UserError(
            f"{path}: {'only blank lines' if lines else 'empty'}, so there is no answer to judge",
            code="predictions.empty",
        )
    return lines


def _is_json(text: str) -> bool:
    try:
        parse_json(text, nan=True)
    except ValueError:
        return False
    return True


def _of_lines(path: Path, lines: list[str], expected: Expected) -> dict[str, str]:
    count = len(expected.split)
    while len(lines) > count and not lines[-1].strip():
        lines.pop()
    if len(lines) != count:
        sample = (
            f" (also those that evaluation.max_questions={expected.sampled} leaves out)" if expected.sampled else ""
        )
        raise UserError(
            f"{path}:{min(len(lines), count + 1)}: {len(lines)} lines; expected {count}, one for each of the {expected.phrase} "
            f"in that order{sample}, a blank line where there is no answer; or JSONL with id and sql",
            code="predictions.wrong_count",
        )
    databases = {record.db_id for record in expected.split}
    return {
        record.id: _without_database(path, number, line, record, databases)
        for number, (line, record) in enumerate(zip(lines, expected.split, strict=True), 1)
    }


def _without_database(path: Path, number: int, line: str, record: Record, databases: set[str]) -> str:
    """The answer in a line that may end with a tab and the name of the question's database."""
    answer, tab, last = line.rpartition("\t")
    name = last.strip()
    if not tab or name not in databases:
        return line
    if name != record.db_id:
        raise UserError(
            f"{path}:{number}: an answer about the database {shown(name)}, but question {number} of the split "
            f"({shown(record.id)}) is about {shown(record.db_id)}: the lines are not in the order of the split",
            code="predictions.other_order",
        )
    return answer


def _of_jsonl(path: Path, lines: list[str], expected: Expected) -> dict[str, str]:
    known = {record.id: record for record in expected.split}
    answers: dict[str, str] = {}
    places: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fields = _object(path, number, line)
        name = _id(path, number, fields)
        if name not in known:
            raise UserError(
                f"{path}:{number}: {shown(name)} is no id of the {expected.phrase}", code="predictions.unknown_id"
            )
        if name in places:
            raise UserError(
                f"{path}:{number}: the id {shown(name)} is there twice, first in line {places[name]}",
                code="predictions.repeated_id",
            )
        places[name] = number
        answers[name] = _answer(path, number, fields, known[name])
    if absent := [record.id for record in expected.split if record.id in expected.asked and record.id not in answers]:
        raise UserError(
            f"{path}: {len(absent)} of the {len(expected.asked)} questions that are asked have no line, first "
            f'{shown(absent[0])}; a question without an answer needs one, too, with "sql": null',
            code="predictions.missing_ids",
        )
    return answers


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = parse_json(line, nan=True)
    except json.JSONDecodeError as error:
        more = "; expected JSONL, one object a line, as `jq -c .` writes it"
        raise UserError(
            f"{path}:{number}: not JSON ({error.msg} at column {error.colno}){more}", code="predictions.bad_line"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}:{number}: not JSON ({error})", code="predictions.bad_line") from None
    if not isinstance(value, dict):
        raise UserError(
            f"{path}:{number}: expected a JSON object with id and sql, found {shown(value)}",
            code="predictions.bad_line",
        )
    return value


def _id(path: Path, number: int, fields: dict[str, Any]) -> str:
    name = fields.get("id")
    if isinstance(name, int) and not isinstance(name, bool):
        return str(name)
    if isinstance(name, str):
        return name
    found = (
        f"found {shown(name)}"
        if "id" in fields
        else f"found the keys {', '.join(shown(key) for key in list(fields)[:5])}"
    )
    raise UserError(
        f"{path}:{number}: expected the id of a question as text under the key id, {found}", code="predictions.bad_line"
    )


def _answer(path: Path, number: int, fields: dict[str, Any], record: Record) -> str:
    key = next((key for key in ANSWER_KEYS if key in fields), None)
    if key is None:
        raise UserError(
            f"{path}:{number}: no answer; expected it under the key {' or '.join(ANSWER_KEYS)}, null for none",
            code="predictions.bad_line",
        )
    answer = fields[key]
    if not isinstance(answer, str | None):
        raise UserError(
            f"{path}:{number}: {key}: expected text or null, found {shown(answer)}", code="predictions.bad_line"
        )
    other = fields.get("db_id")
    if isinstance(other, str) and other != record.db_id:
        raise UserError(
            f"{path}:{number}: an answer about the database {shown(other)}, but {shown(record.id)} is about "
            f"{shown(record.db_id)}",
            code="predictions.other_order",
        )
    return answer or ""
