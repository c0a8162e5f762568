"""Checks CSV files before a library reads them: their encoding and their columns."""

from __future__ import annotations

import codecs
import csv
from pathlib import Path

from finetune.errors import UserError

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def csv_files(folder: Path) -> list[Path]:
    """The CSV and TSV files of a folder, without hidden ones."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in _DELIMITERS
        and path.is_file()
        and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    )


def header(path: Path) -> list[str]:
    """The names of its columns. Raises UserError if the file is not UTF-8 throughout, empty, names a column twice,
    or has more cells in its first record than columns."""
    _check_utf8(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            lines = csv.reader(file, delimiter=_DELIMITERS[path.suffix.lower()])
            names = next(lines, [])
            first = next((line for line in lines if line), [])
        except csv.Error as error:
            raise UserError(f"{path}:1: not a line of CSV ({error})", code="data.unreadable") from None
    if not names:
        raise UserError(f"{path}: empty; expected a first line with the names of the columns", code="data.empty")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{path}:1: the column {repeated[0]!r} is there twice; rename one", code="data.repeated_column")
    if len(first) > len(names):  # pandas would take the first cells as the names of rows and shift all columns
        raise UserError(
            f"{path}: the first record has {len(first)} cells, but the first line names {len(names)} columns; put cells that "
            "hold a comma in quotes, or name the other columns",
            code="data.bad_csv",
        )
    return names


def _check_utf8(path: Path) -> None:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if number == 1 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UserError(f"{path}: UTF-16 text; save it as UTF-8", code="data.bad_encoding")
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}:{number}: not UTF-8 text (byte 0x{raw[error.start]:02x}); save it as UTF-8, for example with "
                    f"`iconv -f WINDOWS-1252 -t UTF-8` if it comes from Excel",
                    code="data.bad_encoding",
                ) from None
