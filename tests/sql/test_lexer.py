"""The lexical rules of each dialect, each case from the engine's documentation or grammar, and the limits on the work."""

import random
import sqlite3
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
import sqlglot
from sqlglot.dialects import DIALECTS
from sqlglot.errors import TokenError

from finetune.sql.dialects import SYNONYMS, dialect_name
from finetune.sql.engines.sqlite import SqlSandbox
from finetune.sql.lexer import MAX_STATEMENT_BYTES, pieces, too_long, unclosed
from finetune.sql.text import has_order_by, is_select, on_one_line, shortened, statements, without_distinct
from tests.helpers.errors import raises

NAMES = sorted(name.lower() for name in DIALECTS)

QUOTED = [
    ("sqlite", r"'it''s; -- x'"),
    ("sqlite", r"[a -- b]"),
    ("sqlite", r"'a\'"),
    ("mysql", r"'it\'s late -- call back'"),
    ("mysql", r"'it''s -- x\\'"),
    ("mysql", r'"it\"s # x"'),
    ("mysql", r"_utf8mb4'it\'s -- x'"),
    ("mysql", r"N'it\'s # x'"),
    ("mysql", "`a``-- b`"),
    ("doris", r"'it\'s -- x'"),
    ("starrocks", r"'it\'s -- x'"),
    ("singlestore", r"'it\'s -- x'"),
    ("postgres", r"E'it\'s -- x'"),
    ("postgres", r"e'\\'"),
    ("postgres", r"E'it\'s' -- first half" + "\n  '\\'s -- second half'"),
    ("postgres", r"'C:\'"),
    ("postgres", "$$it's -- x$$"),
    ("postgres", "$tag$it's $$ -- x$tag$"),
    ("postgres", "$été$it's -- x$été$"),
    ("postgres", "U&'it''s -- x'"),
    ("postgres", '"a""-- b"'),
    ("redshift", r"'it\'s -- x'"),
    ("materialize", r"E'it\'s -- x'"),
    ("risingwave", r"E'it\'s -- x'"),
    ("duckdb", r"E'it\'s -- x'"),
    ("duckdb", "$$it's -- x$$"),
    ("bigquery", r"'it\'s -- x'"),
    ("bigquery", r'"it\"s # x"'),
    ("bigquery", r"r'it\'s -- x'"),
    ("bigquery", r"rb'it\'s -- x'"),
    ("bigquery", '"""it\'s "x" -- y"""'),
    ("bigquery", "'''it's \\''' -- y'''"),
    ("bigquery", 'r"""it\'s -- y"""'),
    ("bigquery", r"`a\`-- b`"),
    ("snowflake", r"'it\'s -- x'"),
    ("snowflake", "'it''s // x'"),
    ("snowflake", r"$$it's \ -- x$$"),
    ("spark", r"'it\'s -- x'"),
    ("spark", r'"it\"s -- x"'),
    ("spark", r"r'C:\'"),
    ("databricks", r"'it\'s -- x'"),
    ("databricks", r'R"C:\"'),
    ("hive", r"'it\'s -- x'"),
    ("tsql", "[a]]-- b]"),
    ("tsql", "N'it''s -- x'"),
    ("tsql", r"'C:\'"),
    ("oracle", "q'[it's -- x]'"),
    ("oracle", "nq'{it's -- x}'"),
    ("oracle", "Q'!it's -- x!'"),
    ("oracle", "q'(a)b)'"),
    ("oracle", r"'C:\'"),
    ("clickhouse", r"'it\'s -- x'"),
    ("clickhouse", r"`a\`-- b`"),
    ("clickhouse", "$tag$it's -- x$tag$"),
    ("trino", r"'C:\'"),
    ("athena", r"'C:\'"),
    ("teradata", r"'C:\'"),
]


@pytest.mark.parametrize(("dialect", "quoted"), QUOTED)
def test_quoted_text_is_one_piece_and_stays_as_it_is(dialect: str, quoted: str) -> None:
    sql = f"SELECT  a, {quoted}  ,  b FROM t; SELECT 2"
    assert statements(sql, dialect=dialect) == [f"SELECT  a, {quoted}  ,  b FROM t;", "SELECT 2"]
    assert on_one_line(sql, dialect=dialect) == f"SELECT a, {quoted}, b FROM t; SELECT 2"
    assert unclosed(sql, dialect=dialect) is None
    assert [piece.text for piece in pieces(sql, dialect=dialect) if piece.kind in ("text", "name")][-1] in quoted


COMMENTS = [
    ("sqlite", "a -- it's\n, b /* it's */, c", "a, b, c"),
    ("sqlite", "kind--1\n, b", "kind, b"),
    ("sqlite", "a /* b /* c */ + d", "a + d"),
    ("mysql", "kind--1, b", "kind--1, b"),
    ("mysql", "kind -- 1\n, b", "kind, b"),
    ("mysql", "kind --\n, b", "kind, b"),
    ("mysql", "a # it's\n, b", "a, b"),
    ("mysql", "a--/* no comment before this one */1", "a--/* no comment before this one */1"),
    ("mysql", "/*!  1 +  */ 2 /* it's */", "/*! 1 + */ 2"),
    ("mysql", "/*+ MAX_EXECUTION_TIME(1000) */  a", "/*+ MAX_EXECUTION_TIME(1000) */ a"),
    ("mysql", "a -- x\rb", "a"),
    ("starrocks", "kind--1\n, b", "kind, b"),
    ("postgres", "a /* b /* it's */ c */ + d", "a + d"),
    ("postgres", "a # b, c", "a # b, c"),
    ("postgres", "data #> '{a}' -- it's\n, b", "data #> '{a}', b"),
    ("postgres", "a$b$c -- it's\n, b$c$d", "a$b$c, b$c$d"),
    ("postgres", "$1 -- it's\n + $2", "$1 + $2"),
    ("postgres", "'a' -- one text with the next\n 'b'", "'a'\n'b'"),
    ("bigquery", "a # it's\n, b -- it's\n, c", "a, b, c"),
    ("snowflake", "a // it's\n, b -- it's\n, c", "a, b, c"),
    ("duckdb", "a // b, #1 -- it's", "a // b, #1"),
    ("spark", "a /* /* it's */ */, b -- goes on \\\n it's here\n, c", "a, b, c"),
    ("spark", "/*+ BROADCAST(t) */ a", "/*+ BROADCAST(t) */ a"),
    ("oracle", "/*+ INDEX(t, i) */ a -- it's", "/*+ INDEX(t, i) */ a"),
    ("tsql", "a /* /* it's */ */ FROM #t -- it's", "a FROM #t"),
    ("clickhouse", "a // it's\n, b # it's\n, c #! it's", "a, b, c"),
    ("trino", "a /* b /* c */ + d", "a + d"),
]


@pytest.mark.parametrize(("dialect", "columns", "expected"), COMMENTS)
def test_comments_end_where_the_dialect_ends_them(dialect: str, columns: str, expected: str) -> None:
    assert on_one_line(f"SELECT {columns}", dialect=dialect) == f"SELECT {expected}"


@pytest.mark.parametrize(
    ("dialect", "sql", "place"),
    [
        ("sqlite", "SELECT 'it''s", "line 1, column 8: a quoted text"),
        ("sqlite", "SELECT a,\n [b FROM t", "line 2, column 2: a quoted name"),
        ("mysql", r"SELECT 'C:\' FROM t", "line 1, column 8: a quoted text"),
        ("mysql", "SELECT 1 /* it's", "line 1, column 10: a comment"),
        ("postgres", "SELECT $a$ x $b$", "line 1, column 8: a quoted text"),
        ("postgres", "SELECT 1 /* /* */", "line 1, column 10: a comment"),
        ("oracle", "SELECT q'[it's]  -- x", "line 1, column 8: a quoted text"),
        ("bigquery", "SELECT '''it''", "line 1, column 8: a quoted text"),
    ],
)
def test_text_that_does_not_lex_is_located_and_not_altered(dialect: str, sql: str, place: str) -> None:
    assert (unclosed(sql, dialect=dialect) or "").startswith(place)
    assert on_one_line(sql, dialect=dialect) == sql or dialect == "sqlite"


def test_every_dialect_of_sqlglot_has_rules_and_agrees_with_its_tokenizer() -> None:
    chance = random.Random(19)
    atoms = "'it''s; --'|'a'|\"a\"|`x`|-- it's\n|# it's\n|/* it's */| |\n|(|)|,|1|a|é|$$|$a$|'\\'|e'|r'|q'[|]'|\"\"\"|@|.|+|\r\n"
    compared = 0
    for name in NAMES:
        tokenizer = sqlglot.Dialect.get_or_raise(name)
        for _ in range(60):
            sql = "".join(chance.choices(atoms.split("|"), k=chance.randint(1, 8)))
            assert "".join(piece.text for piece in pieces(sql, dialect=name)) == sql
            if unclosed(sql, dialect=name) or (name == "clickhouse" and "#" in sql):
                continue
            try:
                before = [(token.token_type, token.text) for token in tokenizer.tokenize(sql)]
            except TokenError:
                continue
            joined = on_one_line(sql, dialect=name)
            assert [(t.token_type, t.text) for t in tokenizer.tokenize(joined)] == before, (name, sql, joined)
            compared += 1
    assert compared > 500


def test_the_other_functions_read_by_dialect_too() -> None:
    sql = r"SELECT DISTINCT a FROM t WHERE b = 'it\'s; DISTINCT' -- x" + "\n; SELECT 2"
    assert without_distinct(sql, dialect="mysql") == sql.split("; SELECT 2")[0].replace("DISTINCT a", " a") + ";"
    assert shortened(sql, dialect="mysql") == r"SELECT DISTINCT a FROM t WHERE b = 'it\'s; DISTINCT'; SELECT 2"
    assert has_order_by(r"SELECT 'it\'s' FROM t ORDER BY a", dialect="mysql")
    assert not has_order_by(r"SELECT 'it\'s ORDER BY a'", dialect="mysql")
    assert not has_order_by("SELECT a FROM (SELECT a FROM t ORDER BY a LIMIT 3)")
    assert has_order_by("SELECT a FROM t WHERE b IN (SELECT 1) ORDER /* x */ BY a")
    assert (
        is_select("/* x */ WITH a AS (SELECT 1) SELECT 2") and is_select("(VALUES (1))") and not is_select("'select'")
    )


@pytest.mark.parametrize("kind", ["TEMP TRIGGER", "TRIGGER", "OR REPLACE TRIGGER"])
def test_the_body_of_a_trigger_is_not_split(kind: str) -> None:
    trigger = f"CREATE {kind} x AFTER INSERT ON t BEGIN DELETE FROM u; SELECT 1; END;"
    assert statements(f"SELECT 1; {trigger} SELECT 2; ; -- no statement\n") == ["SELECT 1;", trigger, "SELECT 2;"]


# Names of dialects ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "name"),
    [("MySQL", "mysql"), ("mssql", "tsql"), ("SQL Server", "tsql"), ("sqlserver", "tsql"), ("T-SQL", "tsql"),
     ("pgsql", "postgres"), ("PostgreSQL", "postgres"), ("SQLite3", "sqlite"), ("BigQuery", "bigquery"),
     ("spark_sql", "spark"), ("MariaDB", "mysql"), ("Oracle", "oracle"), (" snowflake ", "snowflake")],
)  # fmt: skip
def test_other_names_of_a_dialect_are_accepted(written: str, name: str) -> None:
    assert dialect_name(written) == name
    assert on_one_line("SELECT  1", dialect=written) == "SELECT 1"


def test_synonyms_name_known_dialects_and_hide_none() -> None:
    assert set(SYNONYMS.values()) <= set(NAMES)
    assert not set(SYNONYMS) & set(NAMES)
    assert [dialect_name(name) for name in NAMES] == NAMES


@pytest.mark.parametrize(
    ("written", "hint"),
    [
        ("mysq", "did you mean mysql"),
        ("postgress", "did you mean postgres"),
        ("klingon", "expected one of athena, bigquery"),
    ],
)
def test_an_unknown_dialect_gets_the_nearest_name(written: str, hint: str) -> None:
    with raises("sql.unknown_dialect", match=f"{written}.*{hint}"):
        dialect_name(written)


# Limits -----------------------------------------------------------------------------------------------------


UNITS = ("[", "'", "/*", "$a$b", "q'[", "\\'", '"""', "''\n", "--\n", "-- \\\n", "x ;", "CREATE TRIGGER x;")


@pytest.mark.parametrize("dialect", ["sqlite", "postgres", "oracle"])
@pytest.mark.parametrize("unit", UNITS)
def test_time_grows_with_the_length_and_not_with_its_square(dialect: str, unit: str) -> None:
    many = unit * (80_000 // len(unit))
    started = time.process_time()
    on_one_line("SELECT " + many, dialect=dialect)
    statements("SELECT e'a'" + many, dialect=dialect)
    assert time.process_time() - started < 2, "at most 0.5 s; a square takes 3.5 s and more"


@pytest.mark.parametrize(
    ("sql", "problem"),
    [
        ("x" * MAX_STATEMENT_BYTES, None),
        ("é" * (MAX_STATEMENT_BYTES // 2), None),
        ("é" * (MAX_STATEMENT_BYTES // 2) + "x", "1.0 MB long; 1 MB is the limit"),
        ("SELECT '" + "x" * 10_000_000 + "'", "10.0 MB long; 1 MB is the limit"),
        ("\ud800" * MAX_STATEMENT_BYTES, "3.0 MB long"),
    ],
    ids=["1 MB", "1 MB in two-byte characters", "one byte more", "10 MB literal", "lone surrogates"],
)
def test_a_statement_is_measured_in_bytes(sql: str, problem: str | None) -> None:
    found = too_long(sql)
    assert found is None if problem is None else problem in (found or "")


def test_the_sandbox_refuses_a_statement_that_is_too_long(tmp_path: Path) -> None:
    database = tmp_path / "a.sqlite"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE t (a)")
    with SqlSandbox() as sandbox:
        result = sandbox.run(database, "SELECT '" + "x" * 10_000_000 + "'", 5.0)
    assert (result.rows, result.error_kind) == (None, "too_large")
    assert result.error == "the statement is 10.0 MB long; 1 MB is the limit"


def test_pieces_follow_each_other() -> None:
    found = list(pieces("SELECT 'a', b -- c\nFROM t /*"))
    assert all(one.start + len(one.text) == other.start for one, other in pairwise(found))
    assert [piece.kind for piece in found if piece.kind != "space"] == [
        *("word", "text", "sign", "word", "comment", "word", "word", "comment")
    ]
