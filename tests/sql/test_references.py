"""The tables that a query reads, compared with those that its schema shows."""

import pytest

from finetune.sql.references import tables_not_shown

ORDERS = "CREATE TABLE orders (id INT, items INT)"
TWO = "CREATE TABLE sales.orders (id INT); CREATE TABLE staging.orders (id INT); CREATE TABLE ev.events_1 (x INT)"

SHOWN = [
    ("sqlite", ORDERS, 'SELECT * FROM Orders AS o JOIN "ORDERS" ON 1'),
    ("sqlite", ORDERS, "SELECT value FROM orders, json_each(orders.id)"),
    ("sqlite", ORDERS, "SELECT name FROM sqlite_master UNION SELECT name FROM pragma_table_info('x')"),
    ("sqlite", ORDERS, "WITH RECURSIVE n(i) AS (SELECT 1 UNION SELECT i + 1 FROM n) SELECT * FROM n JOIN orders"),
    ("sqlite", "CREATE TABLE t (a); CREATE VIEW v AS SELECT a FROM t", "SELECT * FROM v"),
    ("sqlite", "CREATE VIRTUAL TABLE f USING fts5(b)", "SELECT * FROM f WHERE f MATCH 'x'"),
    ("bigquery", TWO, "SELECT * FROM p.sales.orders o, o.items, UNNEST([1]) x"),
    ("bigquery", TWO, "SELECT * FROM `ev.events_*`"),
    ("bigquery", TWO, "SELECT table_name FROM sales.INFORMATION_SCHEMA.TABLES"),
    (
        "postgres",
        ORDERS,
        "SELECT * FROM public.orders, generate_series(1, 2) g, LATERAL (SELECT 1) y, (VALUES (1)) v(x)",
    ),
    ("snowflake", ORDERS, "SELECT * FROM orders, LATERAL FLATTEN(input => id) f"),
    ("hive", ORDERS, "SELECT * FROM orders LATERAL VIEW explode(items) t AS x"),
    ("bigquery", ORDERS, "SELECT * FROM orders, UNNEST(items) AS i, i.parts AS p"),
    ("oracle", ORDERS, "SELECT 1 FROM dual, v$session, sys.gv$instance, user_objects, all_tables, user_cons_columns"),
    ("trino", ORDERS, 'SELECT * FROM "orders$partitions"'),
    ("spark", ORDERS, "SELECT * FROM delta.`/mnt/x`, parquet.`s3://b/y`"),
    ("duckdb", ORDERS, "SELECT * FROM 'a.csv', read_csv('b.csv')"),
    ("tsql", ORDERS, "SELECT * FROM dbo.orders CROSS APPLY string_split(id, ',')"),
]
MISSING = [
    ("sqlite", "CREATE TABLE client (id INT)", "SELECT * FROM client JOIN Orders USING (id)", ["Orders"]),
    (
        "sqlite",
        ORDERS,
        "SELECT * FROM orders WHERE id IN (SELECT id FROM client) AND EXISTS (SELECT 1 FROM x)",
        ["client", "x"],
    ),
    ("snowflake", "CREATE OR REPLACE TABLE client (id int)", "SELECT * FROM client, orders", ["orders"]),
    ("oracle", ORDERS, "SELECT 1 FROM user_orders", ["user_orders"]),
    ("trino", ORDERS, 'SELECT * FROM "client$partitions"', ["client$partitions"]),
    ("bigquery", TWO, "SELECT * FROM other.orders", ["other.orders"]),
    ("postgres", TWO, "WITH a AS (SELECT 1) SELECT * FROM a, sales.a", ["sales.a"]),
]


@pytest.mark.parametrize(("dialect", "schema", "sql"), SHOWN)
def test_tables_that_the_schema_shows_and_what_is_no_table(dialect: str, schema: str, sql: str) -> None:
    assert tables_not_shown(sql, schema, dialect) == []


@pytest.mark.parametrize(("dialect", "schema", "sql", "missing"), MISSING)
def test_tables_that_the_schema_does_not_show_are_named(
    dialect: str, schema: str, sql: str, missing: list[str]
) -> None:
    assert tables_not_shown(sql, schema, dialect) == missing
