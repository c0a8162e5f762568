"""Reads a dataset with the package `datasets`: from the hub, or from a folder of parquet, CSV or JSON files.

Texts stay as they are written: CSV is read without guessing types, and numbers in `id`, `db_id` and `evidence` become text.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.data.candidates import Candidate, Source
from finetune.data.csv_files import csv_files, header
from finetune.data.hub import imported, one_line, unreachable
from finetune.data.records import FIELDS
from finetune.errors import UserError

_MAY_BE_NUMBERS = ("id", "db_id", "evidence")


def huggingface_source(
    path: str,
    revision: str | None,
    subset: str | None,
    columns: Mapping[str, str],
    databases: Path | None,
    *,
    key: str,
    progress: bool = True,
) -> Source:
    """A dataset that `datasets.load_dataset` reads: a hub id with a revision, or a local folder (parquet, CSV, ...).

    columns: maps our fields to the dataset's columns. Without `id`, ids are made from the position; without `db_id`, examples
    of one schema share a generated one; without `schema`, the schema is read from `databases`.
    """
    _check_columns(columns, databases, key)
    if revision is None and (files := csv_files(Path(path))):
        for file in files:
            _check_present(columns, header(file), str(file), key)
        dataset = _load_dataset(path, revision, subset, key, columns)
    else:
        dataset = _load_dataset(path, revision, subset, key)
        _check_present(columns, dataset.column_names, path, key)
        if dataset.info.builder_name == "csv":
            dataset = _load_dataset(path, revision, subset, key, columns)
    rows = tqdm(
        dataset.select_columns(sorted(set(columns.values()))),
        desc=f"Reading {path}",
        disable=not progress,
        delay=1,
    )
    candidates = [
        Candidate(
            path,
            number,
            f"{path} record {number}",
            row,
            _our_fields(row, columns, f"{Path(path).name}-{number}"),
        )
        for number, row in enumerate(rows, 1)
    ]
    return Source(candidates, databases, None if "schema" in columns else {}, strict=False)


def _check_present(columns: Mapping[str, str], present: Sequence[str], path: str, key: str) -> None:
    absent = [theirs for theirs in columns.values() if theirs not in present]
    if absent:
        raise UserError(
            f"{key}.columns: {path} has no column {absent[0]!r}; it has {', '.join(present)}",
            code="data.missing_column",
        )


def _our_fields(row: Mapping[str, Any], columns: Mapping[str, str], generated_id: str) -> dict[str, Any]:
    fields = {"id": generated_id} | {ours: row[theirs] for ours, theirs in columns.items()}
    fields |= {name: _as_text(fields[name]) for name in _MAY_BE_NUMBERS if name in fields}
    if fields.get("split") == "":  # an empty cell of CSV
        fields["split"] = None
    if not fields.get("dialect", "given"):
        del fields["dialect"]
    if "db_id" not in fields:
        fields["db_id"] = "schema-" + hashlib.sha256(str(fields["schema"]).encode()).hexdigest()[:12]
    return fields


def _as_text(value: Any) -> Any:
    """A number as people write it: a column of whole numbers in which some are missing is stored as 7.0 and NaN."""
    if isinstance(value, float):
        if math.isnan(value):
            return None
        value = int(value) if value.is_integer() else value
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _check_columns(columns: Mapping[str, str], databases: Path | None, key: str) -> None:
    for ours in columns:
        if ours not in FIELDS:
            raise UserError(
                f"{key}.columns.{ours}: not a field of a record; expected any of {', '.join(FIELDS)}",
                code="data.bad_columns",
            )
    for ours in ("question", "sql"):
        if ours not in columns:
            raise UserError(
                f"{key}.columns: {ours} is missing; name the dataset's column for it", code="data.bad_columns"
            )
    if "schema" not in columns and not (databases and "db_id" in columns):
        raise UserError(
            f"{key}.columns: schema is missing; name the dataset's column for it, or give db_id and the databases folder",
            code="data.bad_columns",
        )


def _load_dataset(
    path: str, revision: str | None, subset: str | None, key: str, text_columns: Mapping[str, str] | None = None
) -> Any:
    """text_columns: for CSV, the columns to read, as text, in which nothing is guessed: 007 and NA stay what they are."""
    datasets = imported("datasets", key)
    options: dict[str, Any] = {}
    if text_columns:
        features = {name: datasets.Value("string") for name in text_columns.values()}
        options = {"features": datasets.Features(features), "keep_default_na": False}
    try:
        loaded = datasets.load_dataset(path, revision=revision, split=subset, **options)
    except Exception as error:  # every file format, the hub and the network have their own exceptions
        if revision is None:
            raise UserError(
                f"{key}: {path}: cannot be read as a dataset ({one_line(error)})", code="data.unreadable"
            ) from error
        raise unreachable(path, revision, key, error) from error
    if isinstance(loaded, dict):
        if len(loaded) != 1:
            raise UserError(
                f"{key}.subset: {path} has several splits, expected one of {', '.join(sorted(loaded))}",
                code="data.unknown_subset",
            )
        return next(iter(loaded.values()))
    return loaded
