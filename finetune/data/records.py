"""The record, one question about one database with its gold SQL, and its JSONL format.

Reading is strict: an unknown or malformed field is an error, so that no setting in a file is silently ignored.
"""

from __future__ import annotations

import codecs
import difflib
import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any, Literal

from finetune.data.strict_json import array_items, loads
from finetune.errors import UserError
from finetune.runtime.files import RepeatedKeyError, atomic_file, kind_of

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Record:
    """One example. schema: DDL text. dialect: a name that sqlglot knows. evidence: a hint shown in the prompt."""

    id: str
    db_id: str
    question: str
    sql: str
    schema: str
    dialect: str = "sqlite"
    split: Split | None = None
    evidence: str | None = None


REQUIRED = ("id", "db_id", "question", "sql", "schema")
FIELDS = tuple(f.name for f in fields(Record))


@dataclass(frozen=True)
class Line:
    """One record of a file: its line, counted from 1 (in_array: its position in the array), and its value; if `problem` is set
    because it is not JSON, `value` is the raw text."""

    number: int
    value: Any
    problem: str | None = None
    in_array: bool = False

    def place(self, path: Path) -> str:
        """Where it is, for messages."""
        return f"{path} record {self.number}" if self.in_array else f"{path}:{self.number}"


def read_lines(path: Path) -> Iterator[Line]:
    """The records of a JSONL file, without blank lines, or of a file that is one JSON array.

    Raises UserError if the path is missing or not a file, and if the file is neither of the two: an array that is not closed,
    records over several lines, UTF-16.
    """
    if (kind := kind_of(path)) != "a file":
        found = "no such file" if kind == "nothing" else kind
        raise UserError(f"{path}: {found}; expected a JSONL file", code="data.not_found")
    with path.open("rb") as file:
        if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(f"{path}: UTF-16 text; save it as UTF-8", code="data.bad_encoding")
        first = True
        for number, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                yield Line(number, repr(raw), f"not UTF-8 text ({error.reason} at byte {error.start})")
                continue
            if not text:
                continue
            line = _parse(number, text)
            if first and (line.problem or isinstance(line.value, list)):
                array = _array(path, line)
                if array is not None:
                    yield from array
                    return
            first = False
            yield line


def _array(path: Path, first: Line) -> list[Line] | None:
    """The records of a file that is one array; None if its lines are to be read one by one. first: its first line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        return [
            Line(number, item, problem, in_array=True) for number, (item, problem) in enumerate(array_items(text), 1)
        ]
    except json.JSONDecodeError as error:
        if first.problem and str(first.value).startswith("["):
            where = f"{path}:{error.lineno}: not a JSON array ({error.msg} at column {error.colno})"
            raise UserError(f"{where}; expected one record per line, or an array", code="data.bad_json") from None
    except TypeError:  # one value that is no array
        pass
    except (ValueError, RecursionError):
        return None
    start, _, rest = text.strip().partition("\n")
    if (
        start.strip().startswith("{")
        and not start.strip().endswith("}")
        and not rest.lstrip().startswith(("{", "["))
        and rest
    ):
        raise UserError(
            f"{path}:{first.number}: a JSON object over several lines; expected one record per line (as `jq -c .` writes them), "
            "or an array of records",
            code="data.bad_json",
        )
    return None


def _parse(number: int, text: str) -> Line:
    try:
        return Line(number, loads(text))
    except json.JSONDecodeError as error:
        return Line(number, text, f"not JSON ({error.msg} at column {error.colno})")
    except RepeatedKeyError as error:
        return Line(number, text, str(error))
    except (ValueError, RecursionError) as error:
        return Line(number, text, f"not JSON ({error})")


def field_problems(value: object, required: Collection[str] = REQUIRED) -> list[str]:
    """Why a JSON value is not a valid record: missing and unknown fields, wrong types, empty texts."""
    if not isinstance(value, dict):
        return [f"expected a JSON object with the fields {', '.join(REQUIRED)}, found {_kind(value)}"]
    problems = [f"lacks the field {name}" for name in REQUIRED if name in required and name not in value]
    for name, content in value.items():
        if name not in FIELDS:
            close = difflib.get_close_matches(str(name), FIELDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(FIELDS)}"
            problems.append(f"unknown field {name!r} ({hint})")
        elif problem := _value_problem(name, content):
            problems.append(f"{name}: {problem}")
    return problems


def _value_problem(name: str, content: object) -> str | None:
    if content is None and name in ("split", "evidence"):
        return None
    if name == "split":
        return None if content in SPLITS else f"expected one of {', '.join(SPLITS)} or null, found {content!r}"
    if not isinstance(content, str):
        return f"expected text, found {_kind(content)}"
    if not content.strip() and name != "evidence":
        return "empty"
    if re.search(r"[\ud800-\udfff]", content):
        return "holds half of a surrogate pair, which is no Unicode text"
    if name == "db_id" and (re.search(r"[/\\\0]", content) or content.startswith(".")):
        return f"expected a plain name, because a folder is named after it, found {content!r}"
    return None


def _kind(value: object) -> str:
    if isinstance(value, date):
        return "a date"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def read_records(path: Path) -> list[Record]:
    """All records of a JSONL file. Raises a UserError that names file, line and field of the first fault."""
    records = []
    for line in read_lines(path):
        problems = [line.problem] if line.problem else field_problems(line.value)
        if problems:
            raise UserError(f"{line.place(path)}: {'; '.join(problems)}", code="data.bad_record")
        records.append(Record(**line.value))
    return records


def to_json(record: Record) -> str:
    """The record as a JSON object on one line; fields that are None are left out."""
    return json.dumps({k: v for k, v in asdict(record).items() if v is not None}, ensure_ascii=False)


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write records as JSONL, atomically. Raises UserError if the disk is full or the folder is not writable."""
    with atomic_file(path) as file:
        file.writelines(to_json(record) + "\n" for record in records)
