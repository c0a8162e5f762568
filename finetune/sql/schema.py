"""Database schemas: DDL text, the tables and keys in it, and a compact rendering for prompts.

The schema of a record is DDL text, one CREATE TABLE per line, as returned by an engine's `schema` and by `ddl_of_spider_entry`.
It contains tables only: no views, indexes, triggers or virtual tables.
"""

import os
import re
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.sql.tables import Column, ForeignKey, Table
from finetune.sql.text import on_one_line, shortened, statements

_KEYWORDS = """
    add all alter and as autoincrement between case cast check collate commit constraint create
    current_date current_time current_timestamp default deferrable delete distinct drop else escape except
    exists foreign from group having in index insert intersect into is isnull join limit not nothing notnull
    null on or order primary raise references returning select set table then to transaction union unique
    update using values when where
"""
RESERVED = frozenset(_KEYWORDS.split())
"""Words that SQLite does not accept as an unquoted table or column name: its keywords, each one tried (3.40)."""

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
    """The tables that a DDL text creates, in its order; statements other than CREATE TABLE are skipped.

    SQLite's DDL is read by SQLite itself, because it accepts much that sqlglot does not (ON CONFLICT, LONG VARCHAR,
    PRIMARY KEY (a DESC)); sqlglot reads what SQLite rejects, and all other dialects. Raises UserError, quoting the
    statement, if one cannot be read, and if there is no CREATE TABLE at all.
    """
    creating = [part for part in statements(ddl, dialect=dialect) if is_create_table(part, dialect=dialect)]
    if not creating:
        raise UserError(
            f"schema: no CREATE TABLE statement in it: {shortened(ddl, dialect=dialect)}", code="sql.no_tables"
        )
    try:
        if dialect != "sqlite":
            raise sqlite3.NotSupportedError
        tables = _tables_by_sqlite(creating)
    except sqlite3.Error:
        from finetune.sql.ddl import tables_by_sqlglot  # slow to import, and not needed for SQLite's schemas

        tables = tables_by_sqlglot(creating, dialect)
    by_name = {table.name.lower(): table for table in tables}
    return tuple(replace(table, foreign_keys=_resolved(table.foreign_keys, by_name)) for table in tables)


def _resolved(keys: Iterable[ForeignKey], by_name: Mapping[str, Table]) -> tuple[ForeignKey, ...]:
    """The keys with the referenced names in the other table's spelling, and its primary key if no column is named."""
    resolved = []
    for key in keys:
        table = by_name.get(key.table.lower())
        if table is None:
            resolved.append(key)
            continue
        spelling = {column.name.lower(): column.name for column in table.columns}
        referenced = tuple(spelling.get(name.lower(), name) for name in key.referenced)
        if not referenced and len(table.primary_key) == len(key.columns):
            referenced = table.primary_key
        resolved.append(ForeignKey(key.columns, table.name, referenced))
    return tuple(resolved)


def is_create_table(statement: str, *, dialect: str = "sqlite") -> bool:
    return re.match(r"CREATE TABLE\b", on_one_line(statement, dialect=dialect), re.IGNORECASE) is not None


def _tables_by_sqlite(creating: Iterable[str]) -> list[Table]:
    """Creates the tables in memory and reads them back. The statements can neither select nor open anything."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.set_authorizer(_allow_creating)
        for statement in creating:
            connection.execute(statement)
        connection.set_authorizer(None)
        names = connection.execute(
            r"SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite\_%' ESCAPE '\'"
        )
        return [_table_by_pragma(connection, name) for (name,) in names.fetchall()]


def _allow_creating(action: int, *_: str | None) -> int:
    refused = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_CREATE_VTABLE)
    return sqlite3.SQLITE_DENY if action in refused else sqlite3.SQLITE_OK


def _table_by_pragma(connection: sqlite3.Connection, name: str) -> Table:
    columns = tuple(
        Column(column, kind, primary_key=key > 0, nullable=not (not_null or key))
        for column, kind, not_null, key in connection.execute(
            'SELECT name, type, "notnull", pk FROM pragma_table_xinfo(?) ORDER BY cid', (name,)
        )
    )
    keys: dict[int, list[tuple[str, str, str | None]]] = {}
    for number, table, column, referenced in connection.execute(
        'SELECT id, "table", "from", "to" FROM pragma_foreign_key_list(?) ORDER BY id DESC, seq', (name,)
    ):  # SQLite numbers them from the last to the first
        keys.setdefault(number, []).append((table, column, referenced))
    foreign_keys = tuple(
        ForeignKey(
            columns=tuple(column for _, column, _ in parts),
            table=parts[0][0],
            referenced=tuple(referenced for _, _, referenced in parts if referenced is not None),
        )
        for parts in keys.values()
    )
    return Table(name, columns, foreign_keys)


def compact(tables: Iterable[Table]) -> str:
    """One line per table, for prompts: ``orders(id, customer_id -> customer.id, total)``.

    Names that need quotes in SQL are quoted, so that the model sees what it has to write.
    """
    return "\n".join(
        f"{quoted(table.name)}({', '.join(_with_reference(column, table) for column in table.columns)})"
        for table in tables
    )


def _with_reference(column: Column, table: Table) -> str:
    for key in table.foreign_keys:
        for name, referenced in zip(key.columns, key.referenced, strict=False):
            if name == column.name:
                return f"{quoted(name)} -> {quoted(key.table)}.{quoted(referenced)}"
    return quoted(column.name)


def quoted(name: str) -> str:
    """The name as written in SQL: in double quotes if it is not a plain word or is reserved."""
    if re.fullmatch(r"[^\W\d]\w*", name) and name.lower() not in RESERVED:
        return name
    return '"' + name.replace('"', '""') + '"'
