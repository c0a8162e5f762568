"""Database schemas: DDL text, the tables and keys in it, and a compact rendering for prompts.

The schema of a record is DDL text. That of an engine's `schema` and of `ddl_of_spider_entry` has one table or view per line, and
no indexes or triggers.
"""

import os
import re
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.sql.ddl.in_sqlite import RELATION, tables_by_sqlite
from finetune.sql.dialects import dialect_name
from finetune.sql.quoting import quoted
from finetune.sql.tables import Column, ForeignKey, Table, table_at
from finetune.sql.text import on_one_line, shortened, statements

SPIDER_TYPES = {"text": " TEXT", "number": " NUMERIC", "time": " DATETIME", "boolean": " BOOLEAN"}
"""SQL types for Spider's type names; "others" gets no type, as SQLite allows."""


def create_database(ddl: str, path: Path, *, source: str = "the schema") -> None:
    """Create a SQLite file by running a script of CREATE statements (and INSERTs, if it has any).

    source: the script's name in errors. Raises UserError if a statement fails or accesses another file (ATTACH), if the
    script creates no table, and if `path` exists. The file is created atomically.
    """
    if path.exists():
        raise UserError(f"{path}: already exists; remove it or choose another name", code="sql.database_exists")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with closing(sqlite3.connect(unfinished, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous = OFF")  # an unfinished file is deleted anyway
            connection.set_authorizer(_allow_this_file_only)
            for statement in statements(ddl):
                try:
                    connection.execute(statement)
                except (sqlite3.Error, sqlite3.Warning) as error:
                    raise UserError(f"{source}: {error}, in: {shortened(statement)}", code="sql.bad_schema") from None
            has_table = connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'table'").fetchone()
        if not has_table:
            raise UserError(f"{source}: no CREATE TABLE statement in it", code="sql.no_tables")
        os.replace(unfinished, path)
    except (OSError, sqlite3.OperationalError) as error:
        raise UserError(f"{path}: cannot be written ({error})", code="disk.error") from None
    finally:
        unfinished.unlink(missing_ok=True)


def _allow_this_file_only(action: int, *_: str | None) -> int:
    return sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_ATTACH else sqlite3.SQLITE_OK


def ddl_of_spider_entry(entry: Mapping[str, Any], *, source: str = "tables.json") -> str:
    """DDL text for one entry of Spider's tables.json, for a database whose SQLite file is not available.

    Names are the original ones; the types are Spider's five, so less precise than those in the file.
    source: the JSON file's name in the UserError that is raised for an entry in an unexpected format.
    """
    try:
        tables: list[str] = entry["table_names_original"]
        columns: list[tuple[int, str]] = [(table, name) for table, name in entry["column_names_original"]]
        types: list[str] = entry["column_types"]
        # Newer files list the columns of a composite key.
        primary = [key if isinstance(key, list) else [key] for key in entry["primary_keys"]]
        foreign: list[tuple[int, int]] = [(key, other) for key, other in entry["foreign_keys"]]
        lines = []
        for number, table in enumerate(tables):
            if table.lower().startswith("sqlite_"):  # Spider also lists some of SQLite's internal tables
                continue
            mine = [index for index, (owner, _) in enumerate(columns) if owner == number]
            parts = [quoted(columns[index][1]) + SPIDER_TYPES.get(types[index], "") for index in mine]
            key = [quoted(columns[index][1]) for group in primary for index in group if index in mine]
            parts += [f"PRIMARY KEY ({', '.join(key)})"] if key else []
            parts += [
                f"FOREIGN KEY ({quoted(columns[index][1])}) REFERENCES "
                f"{quoted(tables[columns[other][0]])} ({quoted(columns[other][1])})"
                for index, other in foreign
                if index in mine
            ]
            lines.append(f"CREATE TABLE {quoted(table)} ({', '.join(parts)});")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        name = entry.get("db_id", "an entry without db_id")
        problem = f"{type(error).__name__}: {error}"
        raise UserError(f"{source}: {name}: not in Spider's format ({problem})", code="data.bad_json") from None
    return "\n".join(lines)


def parse_ddl(ddl: str, dialect: str = "sqlite") -> tuple[Table, ...]:
    """The tables and views that exist after a script of DDL, in the order of their creation.

    Every statement creates or changes a table, is known not to (CREATE INDEX, INSERT, SET, GO, ...), or is an error that quotes
    it. SQLite's DDL is read by SQLite itself; sqlglot reads what SQLite rejects, and all other dialects. Raises UserError
    also if no table is left.
    """
    dialect = dialect_name(dialect)
    if not re.search(r"\b(?:CREATE|INTO)\b", ddl, re.IGNORECASE):
        raise _without_tables(ddl, dialect)
    try:
        if dialect != "sqlite":
            raise sqlite3.NotSupportedError
        tables = tables_by_sqlite(ddl)
    except sqlite3.Error:
        from finetune.sql.ddl.reader import tables_by_sqlglot  # slow to import, and not needed for SQLite's schemas

        tables = tables_by_sqlglot(ddl, dialect)
    if not tables:
        raise _without_tables(ddl, dialect)
    return tuple(replace(table, foreign_keys=_resolved(table, tables)) for table in tables)


@lru_cache(maxsize=1024)
def shared_tables(ddl: str, dialect: str) -> tuple[Table, ...]:
    """As `parse_ddl`, once for a schema that many records share."""
    return parse_ddl(ddl, dialect)


def _without_tables(ddl: str, dialect: str) -> UserError:
    what = shortened(ddl, dialect=dialect)
    return UserError(f"schema: no CREATE TABLE statement in it: {what}", code="sql.no_tables")


def _resolved(owner: Table, tables: Iterable[Table]) -> tuple[ForeignKey, ...]:
    """The keys with the referenced names in the other table's spelling, and its primary key if no column is named."""
    resolved = []
    for key in owner.foreign_keys:
        table = table_at(tables, key.path, near=owner.path[:-1])
        if table is None:
            resolved.append(key)
            continue
        spelling = {column.name.lower(): column.name for column in table.columns}
        referenced = tuple(spelling.get(name.lower(), name) for name in key.referenced)
        if not referenced and len(table.primary_key) == len(key.columns):
            referenced = table.primary_key
        resolved.append(ForeignKey(key.columns, table.name, referenced, table.qualifier))
    return tuple(resolved)


def schema_of_script(text: str) -> str:
    """The statements of a SQLite script that make its schema, one per line, without its rows, indexes and triggers.

    Raises UserError as `parse_ddl` does.
    """
    parse_ddl(text)
    lines = [on_one_line(statement) for statement in statements(text)]
    return "\n".join(line for line in lines if RELATION.match(line))


def compact(tables: Iterable[Table]) -> str:
    """One line per table, for prompts: ``orders(id, customer_id -> customer.id, total)``.

    Names are written as a query has to write them: in quotes where they need them, with their schema where they have one,
    the fields of a STRUCT as ``customer.city``, those of an ARRAY of STRUCT as ``items[].sku``, and the values of an enum that
    CREATE TYPE makes as ``state in ('open', 'closed')``.
    """
    tables = list(tables)
    names = {table.path: table for table in tables}
    return "\n".join(
        f"{_table_written(table)}({', '.join(_column_shown(column, table, names) for column in table.columns)})"
        for table in tables
    )


def _column_shown(column: Column, table: Table, names: Mapping[tuple[str, ...], Table]) -> str:
    shown = ", ".join(column.fields) or _column_written(column)
    if column.values:
        shown += f"{'[]' * column.is_array} in ({', '.join(map(_text_written, column.values))})"
    for key in table.foreign_keys:
        for name, referenced in zip(key.columns, key.referenced, strict=False):
            if name.lower() == column.name.lower():
                return f"{shown} -> {_target_written(key, referenced, names)}"
    return shown


def _target_written(key: ForeignKey, referenced: str, names: Mapping[tuple[str, ...], Table]) -> str:
    table = names.get(key.path)
    if table is None:
        return ".".join(map(quoted, (*key.qualifier, key.table, referenced)))
    column = next((column for column in table.columns if column.name == referenced), None)
    return f"{_table_written(table)}.{_column_written(column) if column else quoted(referenced)}"


def _table_written(table: Table) -> str:
    return table.written if table.written is not None else quoted(table.name)


def _text_written(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _column_written(column: Column) -> str:
    return column.written if column.written is not None else quoted(column.name)
