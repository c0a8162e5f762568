"""The columns that a query reads, compared with those that its schema shows: only what is certainly missing is named."""

import json
import sqlite3
from contextlib import closing
from functools import cache
from pathlib import Path

import pytest

from finetune.sql.column_references import columns_not_shown
from finetune.sql.engines.sqlite import ddl_of_database
from finetune.sql.schema import ddl_of_spider_entry
from tests.helpers.judged_questions import SHARED

CLINIC = """
CREATE TABLE patient (id INT, name TEXT, city TEXT);
CREATE TABLE visit (id INT, patient_id INT REFERENCES patient (id), day DATE, "Fee" NUMERIC);
CREATE VIEW busy AS SELECT patient_id, count(*) AS visits FROM visit GROUP BY patient_id;
"""
UNNAMED = CLINIC + "CREATE VIEW daily AS SELECT day, date_trunc('month', day) FROM visit;"
TWO = "CREATE TABLE sales.item (id INT, price INT); CREATE TABLE staging.item (id INT)"
CHILD = "CREATE TABLE a (x INT); CREATE TABLE b (y INT) INHERITS (a); ALTER TABLE a ADD COLUMN z INT"
ORDERS = "CREATE TABLE orders (id INT64, customer STRUCT<city STRING>, items ARRAY<STRUCT<sku STRING>>)"

SHOWN = [
    ("postgres", CLINIC, 'SELECT NAME, p.Id, V."Fee", b.visits FROM Patient p JOIN visit v ON true, public.busy b'),
    ("postgres", CLINIC, "SELECT city AS town, count(*) FROM patient GROUP BY town ORDER BY count, town"),
    ("postgres", CLINIC, "SELECT patient, p FROM patient, visit p"),
    ("postgres", CLINIC, "SELECT ctid, p.xmin, oid, current_date, localtimestamp, user FROM patient p"),
    ("postgres", CLINIC, "WITH RECURSIVE w(i) AS (SELECT 1 UNION SELECT i FROM w), u AS (SELECT 1 AS j) SELECT i, j FROM w, u"),
    ("postgres", CLINIC, "WITH patient AS (SELECT 1 AS age) SELECT age, patient.age FROM patient"),
    ("postgres", CLINIC, "SELECT s.n, total FROM (SELECT id AS n FROM visit) s, (VALUES (1)) v(total)"),
    ("postgres", CLINIC, "SELECT count, s.max, date_trunc FROM (SELECT count(*), max(id), date_trunc('day', day) FROM visit) s"),
    ("postgres", CLINIC, "SELECT btrim, timezone, uuid FROM (SELECT trim(name), day AT TIME ZONE 'UTC', uuid 'x' FROM visit) s"),
    ("postgres", CLINIC, "SELECT x.age FROM (SELECT * FROM patient) x"),
    ("postgres", CLINIC, "SELECT p.b FROM patient AS p(a, b, c)"),
    ("postgres", CLINIC, "SELECT generate_series, ordinality FROM generate_series(1, 2) WITH ORDINALITY"),
    ("postgres", CLINIC, "SELECT age FROM patient, LATERAL jsonb_to_record('{}') AS r(age int)"),
    ("postgres", CLINIC, "SELECT age FROM json_to_recordset('[]') r, patient"),
    ("postgres", CLINIC, "SELECT sum(id) OVER w FROM visit WINDOW w AS (ORDER BY day)"),
    ("postgres", CLINIC, "SELECT relname FROM pg_class, information_schema.tables"),
    ("postgres", CLINIC, "SELECT p.id FROM patient p WHERE EXISTS (SELECT 1 FROM visit p WHERE p.day > '2020-01-01')"),
    ("postgres", UNNAMED, "SELECT date_trunc, daily.date_trunc FROM daily"),
    ("postgres", TWO, "SELECT item.price, price FROM item"),
    ("postgres", CHILD, "SELECT b.z, b.x FROM b"),
    ("sqlite", CLINIC, 'SELECT rowid, "no column, so a text" FROM patient WHERE name = "Ann"'),
    ("sqlite", "CREATE VIRTUAL TABLE f USING fts5(body)", "SELECT rank, f.rank FROM f WHERE f MATCH 'x'"),
    ("mysql", CLINIC.replace('"', "`"), 'SELECT `count(*)`, "Ann", utc_date FROM (SELECT count(*) FROM patient) t'),
    ("tsql", CLINIC, "SELECT DATE_BUCKET(week, 1, day), DATENAME(dw, day), n = id FROM visit ORDER BY n"),
    ("oracle", CLINIC, "SELECT rownum, level, sysdate, s.nextval FROM patient CONNECT BY level < 3"),
    ("snowflake", CLINIC, "SELECT f.value, index FROM patient, LATERAL FLATTEN(input => name) f"),
    ("snowflake", CLINIC, "SELECT f.value, index FROM patient, TABLE(FLATTEN(input => name)) f"),
    ("snowflake", CLINIC, "SELECT value FROM patient, TABLE(SPLIT_TO_TABLE(name, ','))"),
    ("bigquery", ORDERS, "SELECT customer.city, i.sku, sku, orders.customer.city FROM orders, UNNEST(items) AS i"),
    ("bigquery", ORDERS, "SELECT _PARTITIONTIME, DATE_TRUNC(id, MONTH) FROM orders"),
    ("duckdb", CLINIC, "SELECT list_filter([1], x -> x > 1), filename FROM patient"),
    ("spark", CLINIC, "SELECT x FROM patient LATERAL VIEW explode(name) t AS x"),
]  # fmt: skip
MISSING = [
    ("postgres", CLINIC, "SELECT haarfarbe FROM patient", ["haarfarbe"]),
    ("postgres", CLINIC, "SELECT name FROM patient WHERE lower(haarfarbe) = 'x' ORDER BY Shoe", ["Shoe", "haarfarbe"]),
    ("postgres", CLINIC, "SELECT max(age) AS age FROM patient", ["age"]),
    ("postgres", CLINIC, "SELECT p.day FROM patient p JOIN visit v ON p.id = v.patient_id", ["p.day"]),
    ("postgres", CLINIC, "SELECT patient.day, public.busy.id FROM patient, busy WHERE busy.fee > 1", ["busy.fee", "patient.day"]),
    ("postgres", CLINIC, 'SELECT "hair colour" FROM patient', ['"hair colour"']),
    ("postgres", CLINIC, "WITH w AS (SELECT haarfarbe FROM patient) SELECT * FROM w", ["haarfarbe"]),
    ("postgres", CLINIC, "SELECT id FROM visit WHERE patient_id IN (SELECT pid FROM patient)", ["pid"]),
    ("postgres", CLINIC, "SELECT p.age FROM patient p, generate_series(1, 2) g WHERE shoe = 1", ["p.age"]),
    ("postgres", UNNAMED, "SELECT week FROM visit", ["week"]),
    ("postgres", TWO, "SELECT sales.item.id, colour FROM item, sales.item", ["colour"]),
    ("sqlite", CLINIC, "SELECT haarfarbe, p.day FROM patient p", ["haarfarbe", "p.day"]),
    ("mysql", CLINIC.replace('"', "`"), "SELECT `haarfarbe` FROM patient", ["`haarfarbe`"]),
    ("tsql", CLINIC, "SELECT TOP 3 [haarfarbe] FROM patient WITH (NOLOCK)", ["[haarfarbe]"]),
    ("bigquery", ORDERS, "SELECT colour, o.colour FROM orders o", ["colour", "o.colour"]),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "schema", "sql"), SHOWN)
def test_columns_that_are_there_or_may_be(dialect: str, schema: str, sql: str) -> None:
    assert columns_not_shown(sql, schema, dialect) == []


@pytest.mark.parametrize(("dialect", "schema", "sql", "missing"), MISSING)
def test_columns_that_are_certainly_not_there(dialect: str, schema: str, sql: str, missing: list[str]) -> None:
    assert columns_not_shown(sql, schema, dialect) == missing


def runs(database: Path, sql: str) -> bool:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        try:
            connection.execute(f"EXPLAIN {sql}")
        except (sqlite3.Error, sqlite3.Warning):
            return False
    return True


def spider_golds() -> set[tuple[str, str]]:
    if not (SHARED / "spider").is_dir():
        pytest.skip("the shared data are not here")
    files = [SHARED / "spider" / name for name in ("train_spider.json", "dev.json")]
    return {(each["db_id"], each["query"]) for file in files for each in json.loads(file.read_text(encoding="utf-8"))}


def test_no_gold_of_spider_that_runs_is_rejected() -> None:
    golds = spider_golds()
    entries = json.loads((SHARED / "spider" / "tables.json").read_text(encoding="utf-8"))
    schemas = {entry["db_id"]: ddl_of_spider_entry(entry) for entry in entries}
    found = [(name, sql) for name, sql in sorted(golds) if columns_not_shown(sql, schemas[name], "sqlite")]
    files = {name: SHARED / "spider" / "database" / name / f"{name}.sqlite" for name, _ in found}
    assert len(golds) > 3000
    assert [sql for name, sql in found if runs(files[name], sql)] == []
    assert [name for name, _ in found] == ["assets_maintenance"]  # it reads a table that its database lacks


def test_no_prediction_that_runs_is_rejected() -> None:
    path = SHARED / "evaluator_cases.jsonl"
    if not path.is_file():
        pytest.skip("the shared data are not here")
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    schema = cache(ddl_of_database)
    rejections = 0
    for case in cases:
        database = SHARED / "evaluator_databases" / case["db_id"] / f"{case['db_id']}.sqlite"
        if columns_not_shown(case["pred"], schema(database), "sqlite"):
            rejections += 1
            assert not runs(database, case["pred"]), case["pred"]
    assert rejections > 10
