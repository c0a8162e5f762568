"""The three kinds of source: our JSONL, a Spider-format folder, a Hugging Face dataset.

Each yields raw candidates and where they come from; finetune/data/validate.py decides which of them are usable.
Relative paths are relative to the current directory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from finetune.config.schema import SourceSection
from finetune.data.records import FIELDS, read_lines
from finetune.errors import UserError
from finetune.sql.dialects import dialect_name
from finetune.sql.schema import ddl_of_spider_entry

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Candidate:
    """One example as read, not yet validated.

    file, line: its place; line is the line of a JSONL file, else the position in the array or dataset, counted from 1.
    where: the same for messages. raw: the value as read. fields: the value under our field names. problem: a fault found
    while reading.
    """

    file: str
    line: int
    where: str
    raw: Any
    fields: Any
    problem: str | None = None


@dataclass(frozen=True)
class Source:
    """An opened source.

    databases: folder of <db_id>/<db_id>.sqlite, or None if there is no database to run gold SQL on.
    schemas: DDL by db_id for candidates without a schema of their own; None if every candidate must have one.
    strict: whether one malformed line is an error, as in the user's own file; otherwise it is only rejected.
    """

    candidates: list[Candidate]
    databases: Path | None
    schemas: Mapping[str, str] | None
    strict: bool


def open_source(section: SourceSection, key: str, *, progress: bool = True) -> Source:
    """Read one source completely. key: its config key, for error messages.

    Raises UserError if a file, folder, dataset or revision is missing, empty or in the wrong format.
    """
    dialect = _known_dialect(section.dialect, f"{key}.dialect")
    databases = Path(section.databases) if section.databases else None
    if databases and not databases.is_dir():
        raise UserError(
            f"{key}.databases: {databases}: no such folder; expected <db_id>/<db_id>.sqlite inside it",
            code="data.not_found",
        )
    if section.kind == "jsonl":
        source = jsonl_source(Path(section.path), databases)
    elif section.kind == "spider":
        folder = _local_or_hub(section.path, section.revision, key)
        if not section.files:
            raise UserError(
                f"{key}.files: expected the question files in {section.path}, such as [train_spider.json]",
                code="data.no_files",
            )
        if folder is None:
            folder = _download(section.path, section.revision, section.files, key)
        source = spider_source(folder, section.files, databases, shown=Path(section.path))
    else:
        _local_or_hub(section.path, section.revision, key)
        source = huggingface_source(
            section.path,
            section.revision,
            section.subset,
            section.columns,
            databases,
            key=key,
            progress=progress,
        )
    if not source.candidates:
        raise UserError(f"{key}: {section.path}: empty, expected at least one example", code="data.empty")
    candidates = [_with_source_settings(candidate, dialect, section.split, key) for candidate in source.candidates]
    return replace(source, candidates=candidates)


def jsonl_source(path: Path, databases: Path | None) -> Source:
    """Our own format: one record per line, schema included."""
    candidates = [
        Candidate(str(path), line.number, f"{path}:{line.number}", line.value, line.value, line.problem)
        for line in read_lines(path)
    ]
    return Source(candidates, databases, schemas=None, strict=True)


def spider_source(folder: Path, files: list[str], databases: Path | None, shown: Path) -> Source:
    """A folder with the layout of Spider or BIRD: question files, tables.json, database/<db_id>/<db_id>.sqlite.

    The schemas come from the database folder if there is one, else from tables.json; one of the two must exist.
    shown: the folder's name in candidates, which stays the same on every machine when `folder` is a download cache.
    """
    databases = databases or (folder / "database" if (folder / "database").is_dir() else None)
    tables = folder / "tables.json"
    if databases is None and not tables.is_file():
        raise UserError(
            f"{folder}: neither a folder database/ nor tables.json, so no schema for the questions",
            code="data.no_schema",
        )
    schemas = {} if databases else _schemas(tables)
    candidates = [candidate for file in files for candidate in _spider_file(folder / file, shown / file)]
    return Source(candidates, databases, schemas, strict=False)


def _spider_file(path: Path, shown: Path) -> Iterator[Candidate]:
    for number, entry in enumerate(_json_array(path), 1):
        fields, problem = entry, None
        if isinstance(entry, dict):
            fields = {name: entry[name] for name in ("db_id", "question", "evidence") if name in entry}
            fields["id"] = f"{shown.parent.name}/{shown.stem}-{number}"
            fields["sql"] = entry.get("query", entry.get("SQL"))
            problem = "lacks the field query (or SQL)" if fields["sql"] is None else None
        yield Candidate(str(shown), number, f"{shown} record {number}", entry, fields, problem)


def _json_array(path: Path) -> list[Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a JSON array", code="data.not_found")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})", code="data.bad_json"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON in UTF-8 ({error})", code="data.bad_json") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: expected a JSON array with at least one entry", code="data.bad_json")
    return entries


def _schemas(tables: Path) -> dict[str, str]:
    schemas = {}
    for number, entry in enumerate(_json_array(tables), 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("db_id"), str):
            raise UserError(f"{tables} record {number}: expected an object with db_id", code="data.bad_json")
        schemas[entry["db_id"]] = ddl_of_spider_entry(entry, source=str(tables))
    return schemas


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
    dataset = _load_dataset(path, revision, subset, key)
    absent = [theirs for theirs in columns.values() if theirs not in dataset.column_names]
    if absent:
        raise UserError(
            f"{key}.columns: {path} has no column {absent[0]!r}; it has {', '.join(dataset.column_names)}",
            code="data.missing_column",
        )
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


def _our_fields(row: Mapping[str, Any], columns: Mapping[str, str], generated_id: str) -> dict[str, Any]:
    fields = {"id": generated_id} | {ours: row[theirs] for ours, theirs in columns.items()}
    if isinstance(fields["id"], int):
        fields["id"] = str(fields["id"])
    if "db_id" not in fields:
        fields["db_id"] = "schema-" + hashlib.sha256(str(fields["schema"]).encode()).hexdigest()[:12]
    return fields


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


def _load_dataset(path: str, revision: str | None, subset: str | None, key: str) -> Any:
    datasets = _import("datasets", key)
    try:
        loaded = datasets.load_dataset(path, revision=revision, split=subset)
    except Exception as error:  # every file format, the hub and the network have their own exceptions
        if revision is None:
            raise UserError(
                f"{key}: {path}: cannot be read as a dataset ({_one_line(error)})", code="data.unreadable"
            ) from error
        raise _unreachable(path, revision, key, error) from error
    if isinstance(loaded, dict):
        if len(loaded) != 1:
            raise UserError(
                f"{key}.subset: {path} has several splits, expected one of {', '.join(sorted(loaded))}",
                code="data.unknown_subset",
            )
        return next(iter(loaded.values()))
    return loaded


def _download(path: str, revision: str | None, files: list[str], key: str) -> Path:
    hub = _import("huggingface_hub", key)
    patterns = [*files, "tables.json", "database/*"]
    try:
        return Path(hub.snapshot_download(path, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except Exception as error:  # as above
        raise _unreachable(path, revision, key, error) from error


def _unreachable(path: str, revision: str | None, key: str, error: Exception) -> UserError:
    return UserError(
        f"{key}: cannot fetch {path} at revision {revision} from the Hugging Face hub ({_one_line(error)}); check the "
        "id, the revision, the network and HF_TOKEN, or give the path of a local copy",
        code="data.hub_unreachable",
    )


def _local_or_hub(path: str, revision: str | None, key: str) -> Path | None:
    """The local folder, or None for a hub id. Both may look like owner/name, so a revision is what marks a hub id."""
    local = Path(path)
    if revision is None:
        if local.is_dir():
            return local
        if local.exists():
            raise UserError(f"{key}.path: {path}: expected a folder, found a file", code="data.not_found")
        hint = "; a Hugging Face dataset id needs a revision (the commit to pin)" if _HUB_ID.fullmatch(path) else ""
        raise UserError(f"{key}.path: {path}: no such folder in {Path.cwd()}{hint}", code="data.not_found")
    if local.exists():
        raise UserError(
            f"{key}.revision: {path} is a local folder, which has no revision; remove the key",
            code="data.revision_of_folder",
        )
    if not _HUB_ID.fullmatch(path):
        raise UserError(
            f"{key}.path: {path}: neither a folder nor a Hugging Face dataset id (owner/name)",
            code="data.not_found",
        )
    return None


def _with_source_settings(
    candidate: Candidate, dialect: str, split: Literal["auto", "train", "val", "test"], key: str
) -> Candidate:
    """The candidate with the source's dialect and split applied."""
    if not isinstance(candidate.fields, dict):
        return candidate
    fields = {"dialect": dialect} | candidate.fields
    problem = candidate.problem
    if split != "auto":
        if fields.get("split") not in (None, split):
            problem = problem or f"split: the record says {fields['split']!r}, but {key}.split says {split!r}"
        fields["split"] = split
    return replace(candidate, fields=fields, problem=problem)


def _known_dialect(dialect: str, key: str) -> str:
    try:
        return dialect_name(dialect)
    except UserError as error:
        raise UserError(f"{key}: {error}", code="sql.unknown_dialect") from None


def _import(module: str, key: str) -> Any:
    try:
        return __import__(module)
    except ImportError:
        raise UserError(
            f"{key}: needs the package {module}; pip install 'finetune-text2sql[train]'", code="install.missing_package"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
