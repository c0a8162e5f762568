"""From the rows of a user's file to records."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from finetune.data.records import Record, Split, field_problems
from finetune.errors import UserError, shown
from finetune.init.columns import SPLITS, Field
from finetune.init.database import Database
from finetune.init.rows import Rows


@dataclass(frozen=True)
class Pairs:
    """records: ready to be written; places: where each is in the user's file. unfilled: the places of rows without a question or
    without SQL, which were left out. notes: what else the user should know, a line each."""

    records: list[Record]
    places: list[str]
    unfilled: list[str]
    notes: tuple[str, ...] = ()


def records_of(table: Rows, columns: Mapping[Field, str], database: Database | None, dialect: str) -> Pairs:
    """database: whose schema the records get; None: each row has its own. Raises UserError that names the first row that is no
    record, if no row is filled in, and if there is no schema."""
    if database is None and "schema" not in columns:
        raise UserError(
            f"--data {table.path}: no column holds the schema (CREATE TABLE text), which every prompt shows; give the database "
            "or its schema with --db FILE.sqlite or --db SCHEMA.sql, or name the column with --column schema=NAME",
            code="init.no_schema",
        )
    known = [_text(row.get(columns["id"])) for row in table.rows] if "id" in columns else []
    own_ids = bool(known) and all(known) and max(Counter(known).values()) == 1
    records, places, unfilled = [], [], list[str]()
    for number, (row, place) in enumerate(zip(table.rows, table.places, strict=True), 1):
        question, sql = (_text(row.get(columns[field])) for field in ("question", "sql"))
        if not question or not sql:
            unfilled.append(place.removeprefix(str(table.path)).lstrip(": "))
            continue
        fields = {
            "id": known[number - 1] if own_ids else f"{table.path.stem}-{number}",
            "question": question,
            "sql": sql,
        }
        fields |= {"dialect": dialect, **_of_database(row, columns, database)}
        if evidence := _text(row.get(columns.get("evidence", ""))):
            fields["evidence"] = evidence
        if problems := field_problems(fields):
            raise UserError(f"--data {place}: {'; '.join(problems)}", code="init.bad_row")
        records.append(Record(**fields, split=_split(row, columns)))
        places.append(place)
    if not records:
        raise UserError(
            f"--data {table.path}: no row has both a question and its SQL; fill some in", code="init.nothing_filled_in"
        )
    records, notes = _with_every_split(records, columns)
    return Pairs(records, places, unfilled, (*_other_databases(table, columns, database), *notes))


def _with_every_split(records: list[Record], columns: Mapping[Field, str]) -> tuple[list[Record], tuple[str, ...]]:
    """Where a file has a split for every row, but none of validation or test, that is taken from the rows to train on."""
    given = {record.split for record in records}
    lacking = [split for split in ("val", "test") if split not in given]
    if not lacking or "train" not in given or None in given:
        return records, ()
    free = [replace(record, split=None) if record.split == "train" else record for record in records]
    names = " and ".join(lacking)
    return free, (f"the column {shown(columns['split'])} has no rows of {names}: taken from those of train",)


def _other_databases(table: Rows, columns: Mapping[Field, str], database: Database | None) -> tuple[str, ...]:
    """A warning where the rows name several databases, and one schema was given for all of them."""
    if database is None or database.is_folder or "db_id" not in columns:
        return ()
    column = columns["db_id"]
    names = sorted({name for row in table.rows if (name := _text(row.get(column)))})
    if len(names) < 2:
        return ()
    listed = ", ".join(map(shown, names[:3])) + ", ..." * (len(names) > 3)
    return (
        f"WARNING: the column {shown(column)} names {len(names)} databases ({listed}), and every question gets the schema of "
        f"--db {database.path}; take out the rows of the others, or give --db a folder of <db_id>/<db_id>.sqlite",
    )


def _of_database(row: Mapping[str, Any], columns: Mapping[Field, str], database: Database | None) -> dict[str, str]:
    own = _text(row.get(columns.get("db_id", "")))
    if database is not None:
        name = own if database.is_folder else database.db_id
        if database.is_folder and name not in database.schemas:
            raise UserError(
                f"--data: the column {shown(columns.get('db_id', 'db_id'))} names the database {shown(name)}, which is not in "
                f"--db {database.path}: expected {database.path}/{name}/{name}.sqlite",
                code="init.unknown_database",
            )
        return {"db_id": name, "schema": database.schemas[name]}
    schema = _text(row.get(columns["schema"]))
    return {"db_id": own or _name_of(schema), "schema": schema}


def _name_of(schema: str) -> str:
    import hashlib

    return "schema-" + hashlib.sha256(schema.encode()).hexdigest()[:12]


def _split(row: Mapping[str, Any], columns: Mapping[Field, str]) -> Split | None:
    return SPLITS.get(_text(row.get(columns.get("split", ""))).lower())  # type: ignore[return-value]


def _text(value: Any) -> str:
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        value = int(value) if value.is_integer() else value
    return "" if value is None else str(value).strip()
