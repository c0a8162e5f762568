"""Compares the tables that a query reads with those that its schema shows."""

import re
from functools import lru_cache

from sqlglot import exp
from sqlglot.errors import ParseError

from finetune.sql.ddl.names import path_of
from finetune.sql.parsing import shared_tree
from finetune.sql.quoting import word_set
from finetune.sql.schema import shared_tables
from finetune.sql.tables import ends_alike

_CATALOGS = word_set("account_usage information_schema mysql performance_schema pg_catalog snowflake sys system")
"""Schemas that a database brings itself, of several dialects."""
_FILES = (".csv", ".json", ".jsonl", ".ndjson", ".parquet", ".tsv")
"""DuckDB and Spark also read files as tables."""
_CATALOG_TABLES = (
    "sqlite_",
    "pg_",
    "pragma_",
    "svv_",
    "stv_",
    "stl_",
    "svl_",
    "all_tab",
    "user_tab",
    "dba_",
    "v$",
    "gv$",
)
"""How the names of such tables begin."""
_ORACLE = re.compile(
    r"(?:all|user)_(?:objects|views|users|source|sequences|(?:ind_|cons_)?columns|constraints|indexes|triggers)"
)


def tables_not_shown(sql: str, schema: str, dialect: str) -> list[str]:
    """The tables that a query reads and the DDL does not create, as the query writes them, sorted.

    Left out: the query's own WITH tables and aliases, functions, files, and the database's catalog. A name without its
    schema means any table of that name. Empty if the query cannot be parsed.
    """
    try:
        tree = shared_tree(sql, dialect)
    except ParseError:  # SQLite runs queries that sqlglot does not read
        return []
    shown = _paths(schema, dialect)
    own = {cte.alias.lower() for cte in tree.find_all(exp.CTE)}
    tables = list(tree.find_all(exp.Table))
    aliases = {table.alias_or_name.lower() for table in tables} | {
        name.name.lower()
        for array in tree.find_all(exp.Unnest)
        if (alias := array.args.get("alias"))
        for name in alias.columns
    }
    missing: dict[tuple[str, ...], str] = {}
    for table in tables:
        path = path_of(table)
        if not path or (len(path) == 1 and path[0] in own) or _is_catalog(path, dialect) or _is_file(path[-1]):
            continue
        if len(path) > 1 and path[0] in aliases:  # an array of another table: FROM orders AS o, o.items
            continue
        if not any(_means(path, other) for other in shown):
            missing[path] = ".".join(part.name for part in table.parts)
    return sorted(missing.values())


@lru_cache(maxsize=1024)
def _paths(schema: str, dialect: str) -> frozenset[tuple[str, ...]]:
    return frozenset(table.path for table in shared_tables(schema, dialect))


def _is_file(name: str) -> bool:
    return "/" in name or name.endswith(_FILES)


def _is_catalog(path: tuple[str, ...], dialect: str) -> bool:
    *schemas, name = ".".join(path).split(".")  # sqlglot reads BigQuery's INFORMATION_SCHEMA.TABLES as one part
    if dialect == "oracle" and _ORACLE.fullmatch(name):
        return True
    return path == ("dual",) or not _CATALOGS.isdisjoint(schemas) or name.startswith(_CATALOG_TABLES)


def _means(path: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """BigQuery's `events_*` means every table whose name begins so; Trino's "orders$partitions" is a part of orders."""
    if not ends_alike(path, other) and "$" in path[-1][1:]:
        path = (*path[:-1], path[-1].rpartition("$")[0])
    if path[-1].endswith("*"):
        return other[-1].startswith(path[-1][:-1])
    return ends_alike(path, other)
