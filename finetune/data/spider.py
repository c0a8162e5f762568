"""Reads a folder with the layout of Spider or BIRD: question files, a file of tables, and databases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.data.candidates import Candidate, Source
from finetune.data.strict_json import array_items
from finetune.errors import UserError
from finetune.sql.schema import ddl_of_spider_entry


def spider_source(folder: Path, files: list[str], databases: Path | None, shown: Path) -> Source:
    """A folder with the layout of Spider (question files, tables.json, database/<db_id>/<db_id>.sqlite) or of BIRD (dev.json,
    dev_tables.json, dev_databases/<db_id>/<db_id>.sqlite).

    The schemas come from the database folder if there is one, else from tables.json; one of the two must exist.
    shown: the folder's name in candidates, which stays the same on every machine when `folder` is a download cache.
    """
    databases = databases or _databases(folder, files)
    tables = _of_these_files(sorted(folder.glob("*tables.json")), folder, files, "tables.json")
    if databases is None and tables is None:
        raise UserError(
            f"{folder}: neither a folder database/ nor tables.json (nor <split>_databases/ or <split>_tables.json, as in BIRD), "
            "so no schema for the questions",
            code="data.no_schema",
        )
    schemas = {} if databases or tables is None else _schemas(tables)
    candidates = [candidate for file in files for candidate in _spider_file(folder / file, shown / file)]
    return Source(candidates, databases, schemas, strict=False)


def _databases(folder: Path, files: list[str]) -> Path | None:
    if (folder / "database").is_dir():
        return folder / "database"
    found = _of_these_files(
        [path for path in sorted(folder.glob("*_databases")) if path.is_dir()], folder, files, "databases"
    )
    inner = found / found.name if found else None  # as BIRD's archive unpacks
    return inner if inner and inner.is_dir() else found


def _of_these_files(found: list[Path], folder: Path, files: list[str], what: str) -> Path | None:
    """The one that belongs to the question files: that of the plain name, the only one, or the one with their prefix."""
    by_prefix = {path.name.removesuffix(what).removesuffix("_"): path for path in found}
    if len(found) < 2 or "" in by_prefix:
        return by_prefix.get("", found[0] if found else None)
    fitting = {prefix for prefix in by_prefix if all(Path(file).name.startswith(prefix) for file in files)}
    if len(fitting) != 1:
        names = ", ".join(path.name for path in found)
        raise UserError(
            f"{folder}: which of {names} belongs to {', '.join(files)}? Give each file a source of its own, or `databases`",
            code="data.no_schema",
        )
    return by_prefix[fitting.pop()]


def _spider_file(path: Path, shown: Path) -> Iterator[Candidate]:
    for number, (entry, repeated) in enumerate(_json_array(path), 1):
        fields, problem = entry, repeated
        if isinstance(entry, dict):
            fields = {name: entry[name] for name in ("db_id", "question", "evidence") if name in entry}
            fields["id"] = f"{shown.parent.name}/{shown.stem}-{number}"
            fields["sql"] = entry.get("query", entry.get("SQL"))
            problem = problem or ("lacks the field query (or SQL)" if fields["sql"] is None else None)
        yield Candidate(str(shown), number, f"{shown} record {number}", entry, fields, problem)


def _json_array(path: Path) -> list[tuple[Any, str | None]]:
    """The entries, each with a problem or None."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a JSON array", code="data.not_found")
    try:
        entries = list(array_items(path.read_text(encoding="utf-8-sig")))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})", code="data.bad_json"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON in UTF-8 ({error})", code="data.bad_json") from None
    except TypeError:
        entries = []
    if not entries:
        raise UserError(f"{path}: expected a JSON array with at least one entry", code="data.bad_json")
    return entries


def _schemas(tables: Path) -> dict[str, str]:
    schemas: dict[str, str] = {}
    for number, (entry, repeated) in enumerate(_json_array(tables), 1):
        if repeated:
            raise UserError(f"{tables} record {number}: {repeated}", code="data.bad_json")
        if not isinstance(entry, dict) or not isinstance(entry.get("db_id"), str):
            raise UserError(f"{tables} record {number}: expected an object with db_id", code="data.bad_json")
        ddl = ddl_of_spider_entry(entry, source=str(tables))
        if schemas.setdefault(entry["db_id"], ddl) != ddl:
            raise UserError(f"{tables} record {number}: another schema for {entry['db_id']}", code="data.bad_json")
    return schemas
