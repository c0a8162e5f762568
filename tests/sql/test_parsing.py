"""What counts as one query, and the limits of the parser's work. Messages about syntax are in tests/data/test_prepare.py."""

import time

import pytest
from sqlglot.errors import ParseError

from finetune.sql import parsing
from finetune.sql.parsing import NotAQueryError, other_statement, parses, query_tree, same_tree


@pytest.mark.parametrize(
    ("dialect", "sql", "what"),
    [
        ("sqlite", "DELETE FROM t", "it is a DELETE statement"),
        ("sqlite", "INSERT OR IGNORE INTO t VALUES (1)", "it is a INSERT statement"),
        ("sqlite", "INSERT INTO t (x y) VALUES (1", "it is a INSERT statement"),
        ("sqlite", "WITH a AS (SELECT 1) DELETE FROM t", "it is a DELETE statement"),
        ("sqlite", "-- x\nEXPLAIN QUERY PLAN SELECT 1", "it is a EXPLAIN statement"),
        ("sqlite", "PRAGMA table_info(t)", "it is a PRAGMA statement"),
        ("sqlite", "BEGIN; UPDATE t SET a = 1; COMMIT", "there are 3 statements"),
        ("mysql", "SHOW TABLES", "it is a SHOW statement"),
        ("mysql", "REPLACE INTO t VALUES (1)", "it is a REPLACE statement"),
        ("mysql", "CALL p(1, 2)", "it is a CALL statement"),
        ("tsql", "SELECT a INTO b FROM t", "writes what it selects"),
        ("tsql", "EXEC p 1", "it is a EXEC statement"),
        ("postgres", "WITH d AS (DELETE FROM t RETURNING a) SELECT a FROM d", "it holds a DELETE"),
        ("snowflake", "MERGE INTO t USING u ON t.a = u.a WHEN MATCHED THEN DELETE", "it is a MERGE statement"),
    ],
)
def test_other_statements_are_told_apart_from_queries_with_faults(dialect: str, sql: str, what: str) -> None:
    with pytest.raises(NotAQueryError, match=what):
        query_tree(sql, dialect)


@pytest.mark.parametrize(
    ("dialect", "sql"),
    [
        ("sqlite", "SELEC a FROM t"),
        ("sqlite", "SELECT FROM WHERE"),
        ("sqlite", "SELECT 1; SELECT 2"),
        ("sqlite", "'DELETE'"),
        ("sqlite", "delete_me"),
        ("sqlite", ""),
        ("mysql", r"SELECT 'C:\' FROM t"),
    ],
)
def test_a_query_with_a_fault_is_no_other_statement(dialect: str, sql: str) -> None:
    with pytest.raises(ParseError) as caught:
        query_tree(sql, dialect)
    assert not isinstance(caught.value, NotAQueryError)
    assert other_statement(sql, dialect) is None


@pytest.mark.parametrize(
    ("dialect", "sql"),
    [
        ("sqlite", "SELECT a AS \"delete\" FROM t WHERE b = 'INSERT INTO t'"),
        ("mysql", "SELECT REPLACE(a, 'b', 'c'), INSERT(a, 1, 2, 'x') FROM t FOR UPDATE"),
        ("duckdb", "FROM t SELECT a"),
        ("postgres", "VALUES (1), (2)"),
        ("tsql", "(SELECT a FROM t) UNION (SELECT b FROM u)"),
    ],
)
def test_queries_are_queries(dialect: str, sql: str) -> None:
    assert parses(sql, dialect) is None


@pytest.mark.parametrize(
    ("sql", "problem"),
    [
        ("SELECT " + "[" * 100_000, "] is not closed"),
        ("SELECT " + "(" * 900, "nested too deeply"),
        ("SELECT " + "1+" * 500 + "1", "more than 1,000 words"),
        ("SELECT '" + "x" * 10_000_000 + "'", "10.0 MB long; 1 MB is the limit"),
        ("SELECT 1 FROM a " + "JOIN a " * 40, "takes too long"),
        ("SELECT " + "STRUCT(" * 40, "takes too long"),
    ],
    ids=["brackets", "parentheses", "words", "10 MB", "joins", "structs"],
)
def test_hostile_text_is_refused_in_bounded_time(monkeypatch: pytest.MonkeyPatch, sql: str, problem: str) -> None:
    monkeypatch.setattr(parsing, "MAX_WORDS", 1000)
    monkeypatch.setattr(parsing, "MAX_STEPS", 10_000)
    started = time.process_time()
    assert problem in (parses(sql) or "")
    assert time.process_time() - started < 2, "at most 0.1 s; without limits hours, or 1.3 GB"


def test_the_parsers_inside_athenas_have_limits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "MAX_STEPS", 10_000)
    assert "takes too long" in (parses("SELECT 1 FROM a " + "JOIN a " * 40, "athena") or "")


def test_the_limits_leave_room_for_real_queries() -> None:
    names = [f"t{number}" for number in range(8)]
    nested = "SELECT a FROM t WHERE b IN (" * 30 + "SELECT 1" + ")" * 30
    joined = f"SELECT 1 FROM {' JOIN '.join(names)} ON " + " AND ".join(f"t0.id = {name}.id" for name in names)
    listed = f"SELECT a FROM t WHERE b IN ({', '.join(map(str, range(2000)))})"
    assert [parses(sql) for sql in (nested, joined, listed)] == [None, None, None]


def test_a_tree_is_the_same_whatever_the_comments() -> None:
    tree = query_tree("SELECT a -- x\n FROM t")
    assert same_tree(tree, "select a from t", "sqlite")
    assert not same_tree(tree, "SELECT a", "sqlite")
    assert not same_tree(tree, "SELECT 'a", "sqlite")


@pytest.mark.parametrize("dialect", ["sqlite", "mysql", "postgres", "bigquery", "tsql"])
@pytest.mark.parametrize("end", ["; -- done", ";\n/* done */\n", "; ; -- x"])
def test_a_comment_after_the_last_statement_is_no_statement(dialect: str, end: str) -> None:
    assert parses(f"SELECT a FROM t{end}", dialect) is None
