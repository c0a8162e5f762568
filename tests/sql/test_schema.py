"""Schemas: read from databases, written as DDL, read back, and rendered compactly."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from finetune.sql.engines.sqlite import ddl_of_database
from finetune.sql.quoting import RESERVED, quoted
from finetune.sql.schema import compact, create_database, ddl_of_spider_entry, parse_ddl
from finetune.sql.tables import Column, ForeignKey, Table
from tests.helpers.errors import raises

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
SPIDER = SHARED / "spider"

SHOP = """
CREATE TABLE customer (id INTEGER PRIMARY KEY, name TEXT NOT NULL, city TEXT);
CREATE TABLE orders (
    id INTEGER PRIMARY KEY, -- not the invoice number; see below
    customer_id INTEGER REFERENCES customer(id),
    total NUMERIC(8, 2) DEFAULT 0 /* euros */
);
"""


def made(tmp_path: Path, script: str) -> Path:
    path = tmp_path / "made.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
    return path


def spider_databases() -> list[Path]:
    found = sorted(SPIDER.glob("database/*/*.sqlite")) + sorted(SHARED.glob("evaluator_databases/*/*.sqlite"))
    if not found:
        pytest.skip(f"no databases in {SHARED}")
    return found


def columns_by_table(path: Path) -> dict[str, list[Any]]:
    with closing(sqlite3.connect(path)) as connection:
        tables = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT GLOB 'sqlite_*'"
        names = [name for (name,) in connection.execute(tables)]
        return {name: connection.execute("SELECT * FROM pragma_table_info(?)", (name,)).fetchall() for name in names}


# From a database to DDL and back ----------------------------------------------------------------------------


def test_ddl_is_one_table_or_view_a_line_in_order_of_creation_without_comments_and_extra_spaces(
    tmp_path: Path,
) -> None:
    script = (
        SHOP
        + """
        CREATE INDEX by_city ON customer (city);
        CREATE VIEW big AS SELECT * FROM orders WHERE total > 100;
        CREATE TRIGGER t AFTER INSERT ON orders BEGIN SELECT 1; END;
        CREATE TABLE "log; -- entries" ( n INTEGER PRIMARY KEY AUTOINCREMENT , "a  b" TEXT DEFAULT 'x  y' );
        CREATE VIRTUAL TABLE note USING fts5(body);
    """
    )
    assert ddl_of_database(made(tmp_path, script)).splitlines() == [
        "CREATE TABLE customer (id INTEGER PRIMARY KEY, name TEXT NOT NULL, city TEXT);",
        "CREATE TABLE orders (id INTEGER PRIMARY KEY, customer_id INTEGER REFERENCES customer(id), "
        "total NUMERIC(8, 2) DEFAULT 0);",
        "CREATE VIEW big AS SELECT * FROM orders WHERE total > 100;",
        'CREATE TABLE "log; -- entries" (n INTEGER PRIMARY KEY AUTOINCREMENT, "a  b" TEXT DEFAULT \'x  y\');',
        "CREATE VIRTUAL TABLE note USING fts5(body);",
    ]


def test_every_spider_database_survives_the_round_trip_through_ddl(tmp_path: Path) -> None:
    databases = spider_databases()
    for number, path in enumerate(databases):
        copy = tmp_path / f"{number}.sqlite"
        create_database(ddl_of_database(path), copy)
        assert columns_by_table(copy) == columns_by_table(path), path
    assert len(databases) >= 140


def test_every_spider_database_parses_to_its_own_tables_and_columns() -> None:
    for path in spider_databases():
        tables = parse_ddl(ddl_of_database(path))
        found = {table.name: [(c.name, c.nullable, c.primary_key) for c in table.columns] for table in tables}
        expected = {
            name: [(column, not (not_null or key), key > 0) for _, column, _, not_null, _, key in columns]
            for name, columns in columns_by_table(path).items()
        }
        assert found == expected, path
        names = {(table.name, column.name) for table in tables for column in table.columns}
        for table in tables:
            for key in table.foreign_keys:
                assert {(table.name, column) for column in key.columns} <= names
                if key.referenced:
                    assert len(key.referenced) == len(key.columns)


def test_a_database_without_tables_or_no_database_is_the_users_mistake(tmp_path: Path) -> None:
    with raises("sql.no_tables", match=r"made\.sqlite: the database has no tables"):
        ddl_of_database(made(tmp_path, "CREATE VIEW v AS SELECT 1"))
    with raises("sql.database_missing", match=r"missing\.sqlite"):
        ddl_of_database(tmp_path / "missing.sqlite")


# DDL to tables ----------------------------------------------------------------------------------------------


def test_tables_keys_and_types_are_read() -> None:
    assert parse_ddl(SHOP) == (
        Table(
            "customer",
            (
                Column("id", "INTEGER", primary_key=True, nullable=False),
                Column("name", "TEXT", primary_key=False, nullable=False),
                Column("city", "TEXT", primary_key=False, nullable=True),
            ),
        ),
        Table(
            "orders",
            (
                Column("id", "INTEGER", primary_key=True, nullable=False),
                Column("customer_id", "INTEGER", primary_key=False, nullable=True),
                Column("total", "NUMERIC(8, 2)", primary_key=False, nullable=True),
            ),
            (ForeignKey(("customer_id",), "customer", ("id",)),),
        ),
    )


ODD = [
    (
        "CREATE TABLE 'odd one' ('ID' int, `Home Games` int, [Away] text, PRIMARY KEY ('ID'))",
        "ID|Home Games|Away",
    ),
    (
        'CREATE TABLE "t" ("Official_ratings_(millions)" real, "18_49" text)',
        "Official_ratings_(millions)|18_49",
    ),
    ("CREATE TABLE t (a, b UNSIGNED BIG INT, c LONG VARCHAR, d int AS (a + 1))", "a|b|c|d"),
    ("CREATE TABLE t (a int NOT NULL ON CONFLICT IGNORE, b int, PRIMARY KEY (a DESC)) WITHOUT ROWID", "a|b"),
    ('CREATE TABLE "select" ("order" int, "say ""hi""" text)', 'order|say "hi"'),
    ("CREATE TABLE t (rank int, date date, year year, key int)", "rank|date|year|key"),
    ("CREATE TABLE t (a ENUM('x, y'), b int)", "a|b"),  # MySQL's, which SQLite refuses
]


@pytest.mark.parametrize(("ddl", "columns"), ODD)
def test_odd_ddl_is_read(ddl: str, columns: str) -> None:
    (table,) = parse_ddl(ddl)
    assert [column.name for column in table.columns] == columns.split("|")


@pytest.mark.parametrize("dialect", ["sqlite", "mysql", "postgres"])
def test_keys_in_every_notation(dialect: str) -> None:
    tables = parse_ddl(
        """
        CREATE TABLE Ship (Id int PRIMARY KEY, name text);
        CREATE TABLE crew (ship_id int, role varchar(9) NOT NULL, captain int, PRIMARY KEY (ship_id, role),
            CONSTRAINT aboard FOREIGN KEY (SHIP_ID) REFERENCES ship (ID) ON DELETE CASCADE);
        CREATE TABLE pay (a int REFERENCES Ship, b varchar(9), FOREIGN KEY (a, b) REFERENCES crew);
        """,
        dialect,
    )
    assert [table.primary_key for table in tables] == [("Id",), ("ship_id", "role"), ()]
    assert [(key.table, key.referenced) for table in tables for key in table.foreign_keys] == [
        ("Ship", ("Id",)),
        ("Ship", ("Id",)),
        ("crew", ("ship_id", "role")),
    ]
    assert [column.nullable for column in tables[1].columns] == [False, False, True]


@pytest.mark.parametrize("dialect", ["sqlite", "postgres"])
def test_rows_and_settings_are_passed_over_and_not_run(tmp_path: Path, dialect: str) -> None:
    script = f"ATTACH '{tmp_path}/made.db' AS x; {SHOP}; INSERT INTO nowhere VALUES (1); UPDATE customer SET id = 1;"
    assert [table.name for table in parse_ddl(script, dialect)] == ["customer", "orders"]
    assert not (tmp_path / "made.db").exists()


@pytest.mark.parametrize(
    ("ddl", "dialect", "code", "message"),
    [
        ("SELECT 1", "sqlite", "sql.no_tables", "no CREATE TABLE statement"),
        ("", "sqlite", "sql.no_tables", "no CREATE TABLE statement"),
        ("CREATE TABLE t (a int, b", "sqlite", "sql.bad_schema", r"in: CREATE TABLE t \(a int"),
        ("CREATE TABLE t (a int, b", "mysql", "sql.bad_schema", r"in: CREATE TABLE t \(a int"),
        ("CREATE TABLE t (a int); DROP TABLE t", "sqlite", "sql.no_tables", "no CREATE TABLE statement"),
        ("CREATE TABLE t (a int)", "klingon", "sql.unknown_dialect", "klingon"),
    ],
)
def test_ddl_that_cannot_be_read_is_the_users_mistake(ddl: str, dialect: str, code: str, message: str) -> None:
    with raises(code, match=message):
        parse_ddl(ddl, dialect)


# The short rendering ----------------------------------------------------------------------------------------


def test_compact_names_columns_and_foreign_keys_alone() -> None:
    assert compact(parse_ddl(SHOP)) == "customer(id, name, city)\norders(id, customer_id -> customer.id, total)"


def test_compact_quotes_what_sql_needs_in_quotes() -> None:
    ddl = """CREATE TABLE "Home Games" ("order" int PRIMARY KEY, 'naïve' int, "a""b" int, "2nd" int, x$ int);
             CREATE TABLE t (g int REFERENCES "Home Games"("order"))"""
    assert compact(parse_ddl(ddl)) == (
        '"Home Games"("order", naïve, "a""b", "2nd", "x$")\nt(g -> "Home Games"."order")'
    )


def test_every_spider_name_can_be_queried_as_compact_writes_it() -> None:
    for path in spider_databases():
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
            for table in parse_ddl(ddl_of_database(path)):
                columns = ", ".join(quoted(column.name) for column in table.columns)
                cursor = connection.execute(f"SELECT {columns} FROM {quoted(table.name)} LIMIT 0")
                assert [column[0] for column in cursor.description] == [column.name for column in table.columns]


def test_reserved_words_are_those_that_sqlite_refuses_bare() -> None:
    for word in [*RESERVED, "name", "rank", "key", "date", "year", "desc", "end", "match", "row", "left"]:
        with closing(sqlite3.connect(":memory:")) as connection:
            connection.execute(f'CREATE TABLE t (x int, "{word}" int)')
            connection.execute("INSERT INTO t VALUES (1, 2)")
            try:
                works = connection.execute(f"SELECT {word} FROM t WHERE t.{word} = 2").fetchall() == [(2,)]
            except sqlite3.Error:
                works = False
        assert works is (word not in RESERVED), word


# Spider's tables.json ---------------------------------------------------------------------------------------


def test_an_entry_of_tables_json_becomes_ddl() -> None:
    entry = {
        "db_id": "games",
        "table_names_original": ["Stadium", "home games"],
        "column_names_original": [
            [-1, "*"],
            [0, "ID"],
            [0, "Name"],
            [1, "Stadium ID"],
            [1, "played"],
            [1, "x"],
        ],
        "column_types": ["text", "number", "text", "number", "time", "others"],
        "primary_keys": [1, [3, 4]],
        "foreign_keys": [[3, 1]],
    }
    ddl = ddl_of_spider_entry(entry)
    assert ddl.splitlines() == [
        "CREATE TABLE Stadium (ID NUMERIC, Name TEXT, PRIMARY KEY (ID));",
        'CREATE TABLE "home games" ("Stadium ID" NUMERIC, played DATETIME, x, '
        'PRIMARY KEY ("Stadium ID", played), FOREIGN KEY ("Stadium ID") REFERENCES Stadium (ID));',
    ]
    assert compact(parse_ddl(ddl)) == 'Stadium(ID, Name)\n"home games"("Stadium ID" -> Stadium.ID, played, x)'


@pytest.mark.parametrize("missing", ["table_names_original", "column_types", "foreign_keys"])
def test_a_broken_entry_of_tables_json_is_named(missing: str) -> None:
    entry: dict[str, Any] = {
        "db_id": "games",
        "table_names_original": ["t"],
        "column_names_original": [[-1, "*"], [0, "a"]],
        "column_types": ["text", "text"],
        "primary_keys": [],
        "foreign_keys": [],
    }
    assert ddl_of_spider_entry(entry) == "CREATE TABLE t (a TEXT);"
    del entry[missing]
    with raises("data.bad_json", match=rf"my/tables\.json: games: .*{missing}"):
        ddl_of_spider_entry(entry, source="my/tables.json")


def test_every_entry_of_tables_json_creates_the_tables_of_its_database(tmp_path: Path) -> None:
    if not SPIDER.exists():
        pytest.skip(f"{SPIDER} is not at hand")
    entries = json.loads((SPIDER / "tables.json").read_text(encoding="utf-8"))
    for number, entry in enumerate(entries):
        copy = tmp_path / f"{number}.sqlite"
        create_database(ddl_of_spider_entry(entry), copy)
        path = SPIDER / "database" / entry["db_id"] / f"{entry['db_id']}.sqlite"
        if path.exists():
            names = [
                {table.lower(): [column[1].lower() for column in columns] for table, columns in found.items()}
                for found in (columns_by_table(copy), columns_by_table(path))
            ]
            assert names[0] == names[1], entry["db_id"]
    assert len(entries) >= 140


# Making a database ------------------------------------------------------------------------------------------


def test_a_script_makes_a_database_with_its_rows_and_triggers(tmp_path: Path) -> None:
    path = tmp_path / "shop.sqlite"
    create_database(
        SHOP + "BEGIN; INSERT INTO customer VALUES (1, 'a;b', 'Bern'); COMMIT;"
        "CREATE TRIGGER t AFTER DELETE ON customer BEGIN DELETE FROM orders; SELECT 1; END;",
        path,
    )
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT name FROM customer").fetchall() == [("a;b",)]
        assert connection.execute("SELECT count(*) FROM sqlite_master WHERE type = 'trigger'").fetchone() == (1,)


@pytest.mark.parametrize(
    ("script", "code", "message"),
    [
        (
            SHOP + "CREATE TABLE broken (a int,,);",
            "sql.bad_schema",
            r"shop\.sql: near \",\": syntax error, in: CREATE TABLE broken",
        ),
        (SHOP + "ATTACH 'other.db' AS other;", "sql.bad_schema", r"shop\.sql: not authorized, in: ATTACH"),
        (SHOP + SHOP, "sql.bad_schema", r"shop\.sql: table customer already exists"),
        ("-- nothing yet\n", "sql.no_tables", r"shop\.sql: no CREATE TABLE statement"),
    ],
)
def test_a_bad_script_names_file_and_statement_and_leaves_nothing(
    tmp_path: Path, script: str, code: str, message: str
) -> None:
    with raises(code, match=message):
        create_database(script, tmp_path / "shop.sqlite", source="shop.sql")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_not_replaced(tmp_path: Path) -> None:
    path = made(tmp_path, SHOP)
    before = path.read_bytes()
    with raises("sql.database_exists", match=r"made\.sqlite: already exists"):
        create_database(SHOP, path)
    with raises("disk.error", match="cannot be written"):
        create_database(SHOP, tmp_path / "no such folder" / "shop.sqlite")
    assert path.read_bytes() == before
