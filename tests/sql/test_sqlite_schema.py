"""What a SQLite file shows of its schema: views, virtual tables, and names and statements in odd encodings."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from finetune.sql.engines.sqlite import SqlSandbox, ddl_of_database
from finetune.sql.schema import compact, parse_ddl
from tests.helpers.errors import raises


def made(tmp_path: Path, *statements: str) -> Path:
    path = tmp_path / "made.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)
    return path


def test_virtual_tables_are_shown_and_the_tables_that_hold_their_rows_are_not(tmp_path: Path) -> None:
    path = made(
        tmp_path,
        "CREATE TABLE doc (id INTEGER PRIMARY KEY, body TEXT)",
        "CREATE VIRTUAL TABLE note USING fts5(title, body, content='doc', content_rowid='id')",
        "CREATE VIRTUAL TABLE old USING fts4(body)",
        "CREATE VIRTUAL TABLE box USING rtree(id, x0, x1)",
        "CREATE TABLE note_archive (a)",
        "CREATE TABLE box_nodes (a)",
    )
    assert compact(parse_ddl(ddl_of_database(path))).splitlines() == [
        "doc(id, body)",
        "note(title, body)",
        "old(body)",
        "box(id, x0, x1)",
        "note_archive(a)",
        "box_nodes(a)",
    ]


def test_views_are_shown_where_sqlite_can_query_them(tmp_path: Path) -> None:
    path = made(
        tmp_path,
        "CREATE TABLE gone (a)",
        "CREATE VIEW of_gone AS SELECT a FROM gone",
        "CREATE VIEW later AS SELECT id, city AS town FROM client",
        "CREATE TABLE client (id INTEGER, city TEXT)",
        "CREATE VIEW odd AS SELECT no_such_function(id) AS x FROM client",
        "CREATE VIEW named (n) AS SELECT count(*) FROM client",
        "DROP TABLE gone",
    )
    assert compact(parse_ddl(ddl_of_database(path))).splitlines() == ["later(id, town)", "client(id, city)", "named(n)"]


def rewritten(path: Path, change: str, *values: object) -> None:
    """Changes sqlite_master itself."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(f"UPDATE sqlite_master SET {change} WHERE name = 't'", values)


@pytest.mark.parametrize(
    ("raw", "shown"),
    [(b"pr\xe9nom", "prénom"), ("prénom".encode(), "prénom"), (b"a\x80\xc3\xbc", "a€ü"), (b"x\x81", "x\x81")],
    ids=["latin-1", "utf-8", "both", "neither"],
)
def test_a_column_name_that_is_not_utf8_is_read(tmp_path: Path, raw: bytes, shown: str) -> None:
    path = made(tmp_path, "CREATE TABLE t (id INTEGER, plain_name TEXT)", "INSERT INTO t VALUES (1, 'x')")
    rewritten(path, "sql = CAST(? AS TEXT)", b'CREATE TABLE t (id INTEGER, "' + raw + b'" TEXT)')
    (table,) = parse_ddl(ddl_of_database(path))
    assert [column.name for column in table.columns] == ["id", shown]
    with SqlSandbox() as sandbox:
        assert sandbox.run(path, "SELECT id FROM t", 5).rows == [(1,)]


@pytest.mark.parametrize("column", ["sql", "name", "type", "tbl_name"])
def test_blobs_in_the_table_of_tables_are_read_as_sqlite_reads_them(tmp_path: Path, column: str) -> None:
    path = made(tmp_path, "CREATE TABLE t (a INTEGER)", "CREATE TABLE u (b INTEGER)")
    rewritten(path, f"{column} = CAST({column} AS BLOB)")
    assert ddl_of_database(path).splitlines() == ["CREATE TABLE t (a INTEGER);", "CREATE TABLE u (b INTEGER);"]


@pytest.mark.parametrize("sql", [b"\x00\xff", b"", b"CREATE TABLE t (", 7])
def test_a_broken_table_of_tables_is_the_users_mistake(tmp_path: Path, sql: object) -> None:
    path = made(tmp_path, "CREATE TABLE t (a INTEGER)")
    rewritten(path, "sql = ?", sql)
    with raises("sql.database_corrupt", match=r"made\.sqlite: corrupt, or not a SQLite file \(malformed"):
        ddl_of_database(path)


def test_an_utf16_database_is_read(tmp_path: Path) -> None:
    path = made(tmp_path, "PRAGMA encoding = 'UTF-16le'", "CREATE TABLE größe (名 TEXT)")
    assert ddl_of_database(path) == "CREATE TABLE größe (名 TEXT);"
