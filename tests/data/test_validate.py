"""Gold SQL of every dialect: what the answer to train on is, what SQLite's word counts for, and statements that are no query."""

import re
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import SourceSection
from finetune.data.check import Findings, check
from finetune.data.prompts import completion
from finetune.data.split import sql_key
from tests.helpers.data_examples import (
    data_section,
    jsonl_source,
    make_database,
    read_jsonl,
    row,
    run_prepare,
    write_jsonl,
)
from tests.helpers.errors import raises


def checked(source: SourceSection, **changes: Any) -> Findings:
    return check(data_section([source], "unused", **changes), timeout_seconds=5, progress=False)


def one(tmp_path: Path, *, databases: bool = False, **changes: Any) -> Findings:
    """What is found in a source of this one record."""
    if databases and not (tmp_path / "databases").exists():
        make_database(tmp_path / "databases")
    settings = {"databases": str(tmp_path / "databases")} if databases else {}
    return checked(jsonl_source(write_jsonl(tmp_path / "q.jsonl", [row(1, **changes)]), **settings))


TRAINED = [
    ("mysql", r"SELECT id FROM notes WHERE body = 'it\'s late -- call back' AND kind = 2", None),
    ("mysql", "SELECT kind--1, a # it's\nFROM t", "SELECT kind--1, a FROM t"),
    ("postgres", r"SELECT E'it\'s -- x' FROM t", None),
    ("postgres", "SELECT $$it's -- x$$ FROM t", None),
    ("postgres", "SELECT a /* b /* it's */ c */\nFROM t", "SELECT a FROM t"),
    ("bigquery", r'SELECT """it\"s -- x""", r"a\"-- b" FROM t', None),
    ("bigquery", "SELECT a # it's\nFROM t", "SELECT a FROM t"),
    ("snowflake", r"SELECT 'it\'s -- x', $$it's -- y$$ FROM t", None),
    ("snowflake", "SELECT a // it's\nFROM t", "SELECT a FROM t"),
    ("spark", r"SELECT 'it\'s -- x', r'C:\' FROM t", None),
    ("databricks", r"SELECT 'it\'s -- x' FROM t", None),
    ("tsql", "SELECT [a]]-- b], N'it''s -- x' FROM t", None),
    ("oracle", "SELECT q'[it's -- x]' FROM t", None),
    ("duckdb", r"SELECT E'it\'s -- x' FROM t", None),
    ("clickhouse", r"SELECT 'it\'s -- x' FROM t", None),
    ("MySQL", r"SELECT 'it\'s -- x' FROM t", None),
    ("mssql", "SELECT TOP 3 [a -- b] FROM t", None),
]


@pytest.mark.parametrize(("dialect", "sql", "trained"), TRAINED)
def test_the_answer_to_train_on_is_the_gold_sql(tmp_path: Path, dialect: str, sql: str, trained: str | None) -> None:
    findings = one(tmp_path, sql=sql, dialect=dialect)
    assert findings.rejections == []
    (record,) = [record for split in findings.splits for record in findings.records(split)]
    assert completion(record.sql, dialect=record.dialect) == (trained or sql)


@pytest.mark.parametrize(
    ("dialect", "sql", "reason"),
    [
        # sqlglot does not know that Spark continues this comment, so its two readings differ
        ("spark", "SELECT a -- x \\\n, b\nFROM t", "sql_changes_on_one_line"),
        ("mysql", r"SELECT 'C:\' FROM t", "sql_does_not_parse"),
        ("postgres", "SELECT $a$ x $b$ FROM t", "sql_does_not_parse"),
        ("snowflake", "SELECT 1 /* it's", "sql_does_not_parse"),
        ("sqlserver2", "SELECT 1", "malformed"),
    ],
)
def test_what_cannot_be_read_reliably_is_refused(tmp_path: Path, dialect: str, sql: str, reason: str) -> None:
    assert [rejection.reason for rejection in one(tmp_path, sql=sql, dialect=dialect).rejections] == [reason]


def test_the_name_of_a_dialect_is_written_as_sqlglot_writes_it(tmp_path: Path) -> None:
    rows = [row(1, dialect="PostgreSQL", split="test"), row(2, split="train"), row(3, dialect="SQLite", split="val")]
    source = jsonl_source(write_jsonl(tmp_path / "q.jsonl", rows), dialect="SQL Server")
    run_prepare([source], tmp_path / "prepared")
    written = {
        split: read_jsonl(tmp_path / "prepared" / f"{split}.jsonl")[0]["dialect"] for split in ("train", "val", "test")
    }
    assert written == {"train": "tsql", "val": "sqlite", "test": "postgres"}
    with raises("sql.unknown_dialect", match=r"data\.sources\[0\]\.dialect: .*'posgres'; did you mean postgres"):
        checked(jsonl_source(tmp_path / "q.jsonl", dialect="posgres"))


# SQLite accepts more than the parser ------------------------------------------------------------------------

ODD = [
    "SELECT CAST(price AS BIG INT) FROM item",
    "SELECT CAST(name AS VARYING CHARACTER(10)) FROM item",
    "SELECT a.id FROM item a, item b ON a.id = b.id",
    "SELECT glob FROM (SELECT id AS glob FROM item)",
    "SELECT outer.id FROM item AS outer ORDER BY outer.id",
    "SELECT CAST(id AS BIG INT) FROM item -- it's\n WHERE id > 1 /* open",
]


@pytest.mark.parametrize("databases", [True, False], ids=["with the database", "with the schema alone"])
@pytest.mark.parametrize("sql", ODD)
def test_what_sqlite_runs_is_accepted_though_it_does_not_parse(tmp_path: Path, sql: str, databases: bool) -> None:
    findings = one(tmp_path, sql=sql, databases=databases)
    assert findings.rejections == []
    (record,) = [record for split in findings.splits for record in findings.records(split)]
    assert sql_key(record)


@pytest.mark.parametrize("databases", [True, False])
@pytest.mark.parametrize(
    ("sql", "detail"),
    [
        ("SELECT CAST(id AS BIG INT), nope FROM item", "SQLite says: no such column: nope"),
        ("SELEC id FROM item", "Invalid expression"),
        ("SELECT CAST(id AS BIG INT) FROM item; DELETE FROM item", "DELETE|2 statements|Invalid"),
        # SQLite takes the no-break space for a letter, the answer on one line has a space there
        ("SELECT 'a' AS b\xa0c FROM item", "SQLite says: .*near"),
    ],
)
def test_what_sqlite_does_not_run_either_is_refused(tmp_path: Path, sql: str, detail: str, databases: bool) -> None:
    (rejection,) = one(tmp_path, sql=sql, databases=databases).rejections
    assert rejection.reason == "sql_does_not_parse"
    assert re.search(detail, rejection.detail)


# Statements that are no query -------------------------------------------------------------------------------

OTHERS = ["DELETE FROM item", "INSERT OR IGNORE INTO item VALUES (1, 'a', 2)", "WITH a AS (SELECT 1) DELETE FROM item"]


@pytest.fixture
def mixed(tmp_path: Path) -> SourceSection:
    make_database(tmp_path / "databases")
    rows = [*(row(number) for number in range(20)), *(row(20 + i, sql=sql) for i, sql in enumerate(OTHERS))]
    return jsonl_source(write_jsonl(tmp_path / "q.jsonl", rows), databases=str(tmp_path / "databases"))


def test_other_statements_among_the_golds_stop_the_source_and_name_the_filter(mixed: SourceSection) -> None:
    findings = checked(mixed)
    assert [rejection.reason for rejection in findings.rejections] == ["sql_does_not_parse"] * 3
    assert len(findings.problems) == 1 and "`data.statements: select` leaves such records out" in findings.problems[0]


def test_the_filter_leaves_other_statements_out_and_lists_them(tmp_path: Path, mixed: SourceSection) -> None:
    findings = checked(mixed, statements="select")
    assert [rejection.reason for rejection in findings.rejections] == ["left_out"] * 3
    assert findings.problems == [] and (findings.sources[0].read, findings.sources[0].faulty) == (23, 0)
    manifest = run_prepare([mixed], tmp_path / "prepared", statements="select").manifest
    assert manifest["rejected"] == {"left_out": 3} and manifest["settings"]["statements"] == "select"


def test_the_filter_hides_no_faults_among_the_queries(tmp_path: Path, mixed: SourceSection) -> None:
    rows = [
        *(row(number) for number in range(5)),
        row(5, sql="SELEC 1"),
        *(row(6 + i, sql=OTHERS[0]) for i in range(20)),
    ]
    write_jsonl(Path(mixed.path), rows)
    (problem,) = checked(mixed, statements="select").problems
    assert "1 of 6 records of this source are faulty" in problem
