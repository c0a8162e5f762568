"""What --db may be: files that are hostile, cut off, written to, large, or no database at all."""

from __future__ import annotations

import os
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.init import database as database_module
from finetune.init.database import database_name, look_at_database
from tests.helpers.errors import raises
from tests.init.conftest import DUMP, make_library

Write = Callable[..., Path]


def test_a_database_its_tables_and_which_of_them_have_rows(tmp_path: Path) -> None:
    path = make_library(tmp_path / "my library.sqlite")
    connection = sqlite3.connect(path)
    connection.execute('CREATE TABLE "odd ""name""; ünïcode" (x)')
    connection.execute("CREATE VIEW recent AS SELECT * FROM book WHERE year > 2000")
    connection.commit()
    connection.close()
    found = look_at_database(path)
    assert (found.db_id, found.dialect, found.is_executable, found.is_linked) == ("my_library", "sqlite", True, False)
    assert found.filled == frozenset({"author", "book", "recent"})
    assert [table.name for table in found.tables] == ["author", "book", 'odd "name"; ünïcode', "recent"]


def test_a_database_that_is_being_written_to_is_read_with_what_is_committed(library: Path) -> None:
    writer = sqlite3.connect(library)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("CREATE TABLE loan (id INTEGER)")
    writer.execute("INSERT INTO loan VALUES (1)")
    writer.commit()
    writer.execute("INSERT INTO loan VALUES (2)")
    before = {path.name: path.read_bytes() for path in library.parent.glob("library.sqlite*")}
    assert look_at_database(library).filled == frozenset({"author", "book", "loan"})
    assert {path.name: path.read_bytes() for path in library.parent.glob("library.sqlite*")} == before
    writer.close()


def test_a_copy_that_was_cut_off_is_refused(library: Path) -> None:
    library.write_bytes(library.read_bytes()[:8192])
    with raises("init.truncated_database", match=r"8,192 bytes of the \d\d,\d\d\d"):
        look_at_database(library)


@pytest.mark.parametrize("size", [16, 50, 95])
def test_a_copy_that_ends_within_its_header_is_refused(library: Path, size: int) -> None:
    library.write_bytes(library.read_bytes()[:size])
    with raises("init.truncated_database", match=f"has {size} bytes.*copy it again"):
        look_at_database(library)


@pytest.mark.parametrize(
    "content", [b"", random.Random(1).randbytes(4096), b"no database"], ids=["empty", "encrypted", "text"]
)
def test_an_encrypted_or_other_file_is_refused(file: Write, content: bytes) -> None:
    with raises("init.not_a_database", match="not a SQLite file"):
        look_at_database(file("shop.db", content))


def test_what_is_no_file(tmp_path: Path, file: Write) -> None:
    with raises("init.no_database", match="no such file"):
        look_at_database(tmp_path / "none.sqlite")
    with raises("init.no_database", match="a folder without"):
        look_at_database(tmp_path)
    with raises("init.not_a_database", match="pg_restore"):
        look_at_database(file("shop.dump", b"PGDMP\x01\x0e"))


@pytest.mark.skipif(os.geteuid() == 0 and not os.environ.get("FT_AS_USER"), reason="root may read everything")
def test_an_unreadable_file(library: Path) -> None:
    library.chmod(0)
    with raises("init.unreadable_database", match="Permission denied"):
        look_at_database(library)


def test_an_unreadable_file_says_so(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with raises("init.unreadable_database", match="Permission denied"):
        look_at_database(library)


def test_a_database_without_tables(tmp_path: Path) -> None:
    path = tmp_path / "empty.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()
    with raises("sql.no_tables"):
        look_at_database(path)


def test_a_large_database_is_linked_to(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "COPIED_BYTES", 1000)
    assert look_at_database(library).is_linked


def test_a_link_is_followed(library: Path, tmp_path: Path) -> None:
    (tmp_path / "shop.sqlite").symlink_to(library)
    found = look_at_database(tmp_path / "shop.sqlite")
    assert (found.db_id, found.filled) == ("shop", frozenset({"author", "book"}))


def test_a_folder_of_databases(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_library(tmp_path / "all" / name / f"{name}.sqlite")
    found = look_at_database(tmp_path / "all")
    assert found.is_folder and found.is_executable and set(found.schemas) == {"one", "two"}


def test_a_dump_of_postgres_is_a_schema(file: Write) -> None:
    found = look_at_database(file("shop.sql", DUMP))
    assert (found.dialect, found.is_executable) == ("postgres", False)
    assert [table.name for table in found.tables] == ["author", "book"]
    assert found.tables[1].foreign_keys[0].table == "author"
    assert "SEQUENCE" not in found.schemas["shop"] and "INDEX" not in found.schemas["shop"]


@pytest.mark.parametrize(
    ("text", "dialect"),
    [
        ("CREATE TABLE t (a INTEGER);", "sqlite"),
        ("CREATE TABLE t (id serial, b text[]);", "postgres"),
        ("CREATE TYPE m AS ENUM ('a'); CREATE TABLE t (m m);", "postgres"),
        ("CREATE TABLE [dbo].[t] (a int IDENTITY(1, 1));", "tsql"),
        ("CREATE TABLE t (a int)\nGO\nCREATE TABLE u (a int)\nGO\n", "tsql"),
        ("CREATE TABLE t (a VARCHAR2(20))\n/\nCREATE TABLE u (a int)\n/\n", "oracle"),
        ("CREATE TABLE t (a int AUTO_INCREMENT);", "mysql"),
        ("-- MySQL dump 10.13\nCREATE TABLE `t` (`a` int) ENGINE=InnoDB;", "mysql"),
    ],
)
def test_the_dialect_of_a_schema(file: Write, text: str, dialect: str) -> None:
    assert look_at_database(file("t.sql", text)).dialect == dialect


def test_a_schema_that_cannot_be_read(file: Write) -> None:
    with raises("init.bad_schema", match="no CREATE TABLE"):
        look_at_database(file("t.sql", "SELECT 1;"))
    with raises("init.bad_schema"):
        look_at_database(file("t.sql", "CREATE TABLE t (a INTEGER"))
    with raises("init.unreadable_database", match="UTF-8"):
        look_at_database(file("t.sql", "CREATE TABLE tür (a INTEGER);".encode("windows-1252")))
    with raises("sql.unknown_dialect", match="postgrez"):
        look_at_database(file("t.sql", DUMP), "postgrez")
    with raises("init.bad_schema", match="as tsql"):
        look_at_database(file("t.sql", "CREATE TABLE `a b` (c int);"), "tsql")


@pytest.mark.parametrize(
    ("file_name", "name"),
    [("shop.sqlite", "shop"), ("my shop (2).db", "my_shop_2"), ("Łódź.sqlite", "Łódź"), ("..sqlite", "database"),
     ("'.db", "database")],
)  # fmt: skip
def test_a_name_that_a_folder_can_have(file_name: str, name: str) -> None:
    assert database_name(Path(file_name)) == name


def test_an_address_of_a_server_is_not_repeated() -> None:
    with raises("init.no_database", match="postgres://...: the address of a server") as told:
        look_at_database(Path("postgres://me:secret@host/shop"))
    assert "secret" not in str(told.value)


def test_questions_given_as_a_database(file: Write) -> None:
    with raises("init.not_a_database", match="given with --data"):
        look_at_database(file("pairs.csv", "question,sql\nHow many?,SELECT 1\n"))
