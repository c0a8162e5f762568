"""Reads SQLite's DDL by letting SQLite create the tables in memory, and finds what a SQLite file shows of its schema.

SQLite itself is the reader because it accepts much that sqlglot does not (ON CONFLICT, LONG VARCHAR, PRIMARY KEY (a DESC)).
"""

import re
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace

from finetune.sql.quoting import word_set
from finetune.sql.tables import Column, ForeignKey, Table
from finetune.sql.text import on_one_line, statements

RELATION = re.compile(
    r"(?P<what>CREATE|ALTER|DROP)(?: TEMP| TEMPORARY)?(?: VIRTUAL)? (?P<kind>TABLE|VIEW)\b", re.IGNORECASE
)
"""SQLite's statements that create or change tables and views."""
_HIDDEN = re.compile(r"\bCREATE\b.*\b(?:TABLE|VIEW)\b", re.IGNORECASE | re.DOTALL)
_TEMPORARY = re.compile(r"^CREATE TEMP(?:ORARY)?\b", re.IGNORECASE)
_MODULE = re.compile(r"CREATE VIRTUAL TABLE\b.*?\bUSING (\w+)", re.IGNORECASE | re.DOTALL)
_SHADOWS = {
    "fts3": ("content", "docsize", "segdir", "segments", "stat"),
    "fts4": ("content", "docsize", "segdir", "segments", "stat"),
    "fts5": ("config", "content", "data", "docsize", "idx"),
    "rtree": ("node", "parent", "rowid"),
    "rtree_i32": ("node", "parent", "rowid"),
}
"""The modules of virtual tables whose columns are those that the statement names, and the suffixes of the tables in which they
keep their rows (https://sqlite.org/fts5.html, fts3.html, rtree.html)."""
_IRRELEVANT = word_set(
    """
    analyze attach begin commit delete detach end explain insert pragma reindex release replace rollback savepoint select
    update vacuum values with
"""
)
"""First words of the other statements that SQLite has (https://sqlite.org/lang.html)."""
_OTHER_OBJECT = re.compile(r"(?:CREATE(?: UNIQUE| TEMP| TEMPORARY)?|DROP) (?:INDEX|TRIGGER)\b", re.IGNORECASE)


# A script ---------------------------------------------------------------------------------------------------


def tables_by_sqlite(ddl: str) -> list[Table]:
    """The tables and views of a script, in order of creation. Nothing is selected and no other file is opened.

    Raises sqlite3.Error if SQLite does not accept a statement, or does not know it.
    """
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        tables: set[str] = set()
        for statement in statements(ddl):
            if _is_made_as_view(connection, statement):
                connection.set_authorizer(None)
                tables.update(
                    connection.execute("SELECT name FROM sqlite_master ORDER BY rowid DESC LIMIT 1").fetchone()
                )
        connection.set_authorizer(None)
        return [
            replace(_table_by_pragma(connection, name), is_view=sql.startswith("CREATE VIEW") and name not in tables)
            for name, sql in _relations(connection)
        ]


def _is_made_as_view(connection: sqlite3.Connection, statement: str) -> bool:
    """Run a statement that changes the schema; whether it is a table for which a view stands in."""
    line = on_one_line(statement)
    relation = RELATION.match(line)
    if relation is None:
        known = line.strip(";").split(" ")[0].lower() in _IRRELEVANT and not _HIDDEN.search(line)
        if not known and not _OTHER_OBJECT.match(line):
            raise sqlite3.NotSupportedError
        return False
    module = _MODULE.match(line)
    internal = relation["what"].upper() != "CREATE" or (module is not None and module[1].lower() in _SHADOWS)
    connection.set_authorizer(_allow_creating if not internal else _allow_changing)
    if _TEMPORARY.match(line):  # in a prompt a table like any other
        statement = line = _TEMPORARY.sub("CREATE", line)
    try:
        connection.execute(statement)
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_AUTH or relation["kind"].upper() != "TABLE":
            raise
        # CREATE TABLE AS: a view has the same columns, and runs nothing
        connection.execute(re.sub(r"^CREATE TABLE", "CREATE VIEW", line, flags=re.IGNORECASE))
        return True
    return False


def _allow_creating(action: int, *_: str | None) -> int:
    refused = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_CREATE_VTABLE)
    return sqlite3.SQLITE_DENY if action in refused else sqlite3.SQLITE_OK


def _allow_changing(action: int, *_: str | None) -> int:
    """For ALTER, DROP and the known modules, which read and write SQLite's own tables."""
    return sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_ATTACH else sqlite3.SQLITE_OK


def _table_by_pragma(connection: sqlite3.Connection, name: str) -> Table:
    columns = tuple(
        Column(column, kind, primary_key=key > 0, nullable=not (not_null or key))
        for column, kind, not_null, key in connection.execute(
            'SELECT name, type, "notnull", pk FROM pragma_table_xinfo(?) WHERE hidden <> 1 ORDER BY cid', (name,)
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


# A database -------------------------------------------------------------------------------------------------


def shown_statements(connection: sqlite3.Connection) -> list[str]:
    """The statements of the tables and views of a database, in order of creation.

    Left out: SQLite's own tables, those in which a virtual table keeps its rows, and views and virtual tables that this
    SQLite cannot query. Bytes that are not UTF-8 are read as Windows-1252. Raises sqlite3.Error if the file is corrupt.
    """
    return [
        sql
        for name, sql in _relations(connection)
        if re.match("CREATE TABLE\\b", on_one_line(sql), re.IGNORECASE) or _can_be_queried(connection, name)
    ]


def _relations(connection: sqlite3.Connection) -> list[tuple[str, str]]:
    """Name and statement of each table and view, without SQLite's own and those of virtual tables."""
    text_factory = connection.text_factory
    connection.text_factory = bytes
    try:
        rows = connection.execute(
            "SELECT CAST(name AS TEXT), CAST(sql AS TEXT) FROM sqlite_master"
            r" WHERE CAST(type AS TEXT) IN ('table', 'view') AND name NOT LIKE 'sqlite\_%' ESCAPE '\' ORDER BY rowid"
        ).fetchall()
    finally:
        connection.text_factory = text_factory
    found = [(_decoded(name), _decoded(sql)) for name, sql in rows if name and sql]
    shadows = {shadow for name, sql in found for shadow in _shadows_of(name, sql)}
    return [(name, sql) for name, sql in found if name.lower() not in shadows]


def _shadows_of(name: str, sql: str) -> Iterable[str]:
    module = _MODULE.match(on_one_line(sql))
    suffixes = _SHADOWS.get(module[1].lower(), ()) if module else ()
    return (f"{name}_{suffix}".lower() for suffix in suffixes)


def _can_be_queried(connection: sqlite3.Connection, name: str) -> bool:
    """Whether the view or virtual table can be compiled: its tables, functions and module exist."""
    try:
        columns = connection.execute("SELECT 1 FROM pragma_table_xinfo(?) LIMIT 1", (name,)).fetchone()
    except sqlite3.Error:
        return False
    return columns is not None


def _decoded(text: bytes) -> str:
    marked = text.decode("utf-8", "surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda match: _windows(ord(match[0]) - 0xDC00), marked)


def _windows(byte: int) -> str:
    raw = bytes([byte])
    try:
        return raw.decode("cp1252")
    except UnicodeDecodeError:
        return raw.decode("latin-1")
