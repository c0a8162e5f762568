"""Reads a file of questions and SQL as rows: CSV with any separator, JSON, JSONL, parquet. What is guessed is said."""

from __future__ import annotations

import codecs
import csv
import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.records import read_lines
from finetune.errors import UserError, shown
from finetune.runtime.files import LARGEST_FILE, kind_of, read_bytes
from finetune.runtime.installed import install_command

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
SAME_WIDTH = 0.9
"""Share of the rows that must have as many cells as the header, for a separator to be the file's."""
NOT_TABLES = {
    b"PK\x03\x04": "an Excel workbook or another ZIP file; save the sheet as CSV",
    b"\xd0\xcf\x11\xe0": "an Excel workbook of the old kind; save the sheet as CSV",
    b"\x1f\x8b": "compressed; unpack it first (`gunzip FILE`)",
    b"SQLite format 3\x00": "a SQLite database; give it with --db",
    b"PGDMP": "a PostgreSQL dump; write its schema with `pg_restore --schema-only -f schema.sql FILE`, and give that with --db",
}
PARQUET = b"PAR1"


@dataclass(frozen=True)
class Rows:
    """A table as read. columns: their names, in order. rows: a value for each column; places: where each row is, for messages.
    notes: how the file was read, where that was not plain; a line each."""

    path: Path
    columns: list[str]
    rows: list[dict[str, Any]]
    places: list[str]
    notes: tuple[str, ...] = ()


def read_rows(path: Path, encoding: str | None = None) -> Rows:
    """encoding: of a CSV or TSV file; None: UTF-8, or UTF-16 with its mark, else Windows-1252, which is then said.

    Raises UserError for anything that is no table of texts: a folder, a binary file, no rows, one column, rows of another width.
    """
    if (kind := kind_of(path)) != "a file":
        raise UserError(
            f"--data {path}: {'no such file' if kind == 'nothing' else kind}; {_EXPECTED}", code="init.no_data"
        )
    try:
        content = read_bytes(path)
    except OSError as error:
        raise UserError(f"--data {path}: cannot be read ({error.strerror})", code="init.unreadable_data") from None
    if path.suffix.lower() == ".sql":
        raise UserError(f"--data {path}: SQL text; a schema is given with --db; {_EXPECTED}", code="init.not_a_table")
    for magic, what in NOT_TABLES.items():
        if content.startswith(magic):
            raise UserError(f"--data {path}: {what}", code="init.not_a_table")
    if content.startswith(PARQUET):
        return _parquet(path)
    if not content.strip():
        raise UserError(f"--data {path}: empty; {_EXPECTED}", code="init.empty_data")
    start = content.lstrip(codecs.BOM_UTF8 + b" \t\r\n")[:1]
    if path.suffix.lower() in (".json", ".jsonl", ".ndjson") or (
        start in (b"{", b"[") and path.suffix.lower() != ".csv"
    ):
        return _json(path)
    text, notes = _decoded(path, content, encoding)
    return _csv(path, text, notes)


_EXPECTED = "expected a CSV, TSV, JSON, JSONL or parquet file of questions and their SQL"


def _decoded(path: Path, content: bytes, encoding: str | None) -> tuple[str, tuple[str, ...]]:
    if encoding is not None:
        try:
            return content.decode(encoding).removeprefix("\ufeff"), ()
        except LookupError:
            raise UserError(
                f"--encoding {encoding}: unknown to Python; such as windows-1252", code="init.bad_encoding"
            ) from None
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise UserError(
                f"--data {path}:{line}: no text in {encoding} (byte {error.start})", code="init.bad_encoding"
            ) from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return _decoded(path, content, "utf-16")
    if b"\0" in content:
        raise UserError(f"--data {path}: a binary file; {_EXPECTED}", code="init.not_a_table")
    try:
        return content.decode("utf-8-sig"), ()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
    try:
        text = content.decode("windows-1252")
    except UnicodeDecodeError:
        raise UserError(
            f"--data {path}:{line}: neither UTF-8 nor Windows-1252; save it as UTF-8, or name its --encoding",
            code="init.bad_encoding",
        ) from None
    example = re.search(r"\w*[^\x00-\x7f]\w*", text)
    shown_word = f", which makes {shown(example[0])} of a word in it" if example else ""
    return text, (f"{path} is not UTF-8 (line {line}): read as Windows-1252{shown_word}; --encoding names another",)


def _csv(path: Path, text: str, notes: tuple[str, ...]) -> Rows:
    named = re.match(r"sep=([^\w\s\"']|\t)(?=\r|\n)", text)  # Excel's own line, which it does not show
    if named:
        text = text[named.end() :]
    found = {delimiter: _parsed(text, delimiter) for delimiter in ([named[1]] if named else DELIMITERS)}
    best = max(found, key=lambda delimiter: _fit(found[delimiter]))
    lines = found[best]
    if best != "," and not (best == "\t" and path.suffix.lower() == ".tsv"):
        notes = (*notes, f"{path} is separated by {DELIMITERS.get(best, shown(best))}")
    if not lines:
        raise UserError(f"--data {path}: empty; {_EXPECTED}", code="init.empty_data")
    header = [name.strip() for name in lines[0][1]]
    while (
        header
        and not header[-1]
        and all(len(cells) < len(header) or not cells[len(header) - 1] for _, cells in lines[1:])
    ):
        header.pop()  # Excel writes empty columns behind the last one
    if len(header) < 2:
        raise UserError(
            f"--data {path}: one column ({shown(header[0] if header else '')}); a question and its SQL are two, separated by "
            "commas, semicolons or tabs",
            code="init.one_column",
        )
    if repeated := next((name for name in header if header.count(name) > 1), None):
        raise UserError(
            f"--data {path}:1: the column {shown(repeated)} is there twice; rename one", code="init.repeated_column"
        )
    rows, places = [], []
    for number, cells in lines[1:]:
        if any(cells[len(header) :]) or len(cells) < len(header):
            raise UserError(
                f"--data {path}:{number}: {len(cells)} cell{'s' * (len(cells) != 1)}, but the first line names {len(header)} "
                "columns; put cells that hold a separator or a line break in double quotes, and leave no cell out",
                code="init.row_width",
            )
        rows.append(dict(zip(header, cells, strict=False)))
        places.append(f"{path}:{number}")
    return _with_rows(path, header, rows, places, notes)


def _parsed(text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """Each row that is not blank, with the number of its first line."""
    found, begin = [], 1
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    limit = csv.field_size_limit(min(sys.maxsize, LARGEST_FILE))  # of the whole process
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                found.append((begin, cells))
            begin = reader.line_num + 1
    except csv.Error:
        return found[:0]
    finally:
        csv.field_size_limit(limit)
    return found


def _fit(lines: list[tuple[int, list[str]]]) -> tuple[bool, int]:
    if not lines:
        return False, 0
    width = len(lines[0][1])
    same = sum(len(cells) == width for _, cells in lines)
    return width > 1 and same >= SAME_WIDTH * len(lines), width


def _json(path: Path) -> Rows:
    columns: dict[str, None] = {}
    rows, places = [], []
    for line in read_lines(path):
        if line.problem or not isinstance(line.value, dict):
            what = line.problem or f"expected an object with a question and its SQL, found {shown(line.value)}"
            raise UserError(f"--data {line.place(path)}: {what}", code="init.bad_json")
        columns |= dict.fromkeys(line.value)
        rows.append(line.value)
        places.append(line.place(path))
    return _with_rows(path, list(columns), rows, places, ())


def _parquet(path: Path) -> Rows:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(
            f"--data {path}: reading parquet needs pyarrow; run `{install_command('train')}`, or save it as CSV or JSONL",
            code="init.no_parquet",
        ) from None
    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise UserError(
            f"--data {path}: not a parquet file that can be read ({shown(str(error))})", code="init.not_a_table"
        ) from None
    rows = table.to_pylist()
    return _with_rows(path, list(table.column_names), rows, [f"{path} record {n}" for n in range(1, len(rows) + 1)], ())


def _with_rows(
    path: Path, columns: list[str], rows: list[dict[str, Any]], places: list[str], notes: tuple[str, ...]
) -> Rows:
    if not rows:
        raise UserError(f"--data {path}: no rows below its header; {_EXPECTED}", code="init.empty_data")
    return Rows(path, columns, rows, places, notes)
