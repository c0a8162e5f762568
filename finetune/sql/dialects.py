"""The names of SQL dialects: those of sqlglot, and the other names that people use for the same dialects."""

import difflib
import re
from functools import lru_cache

from finetune.errors import UserError

SYNONYMS = {
    "sqlite3": "sqlite",
    "mariadb": "mysql",
    "mysql5": "mysql",
    "mysql8": "mysql",
    "pg": "postgres",
    "pgsql": "postgres",
    "plpgsql": "postgres",
    "postgre": "postgres",
    "postgresql": "postgres",
    "postgressql": "postgres",
    "psql": "postgres",
    "azuresql": "tsql",
    "microsoftsqlserver": "tsql",
    "mssql": "tsql",
    "mssqlserver": "tsql",
    "sqlserver": "tsql",
    "transactsql": "tsql",
    "microsoftfabric": "fabric",
    "bq": "bigquery",
    "gbq": "bigquery",
    "googlebigquery": "bigquery",
    "googlesql": "bigquery",
    "awsathena": "athena",
    "amazonathena": "athena",
    "awsredshift": "redshift",
    "amazonredshift": "redshift",
    "apachespark": "spark",
    "pyspark": "spark",
    "spark3": "spark",
    "sparksql": "spark",
    "databrickssql": "databricks",
    "apachehive": "hive",
    "hiveql": "hive",
    "hql": "hive",
    "oracledb": "oracle",
    "oraclesql": "oracle",
    "plsql": "oracle",
    "prestodb": "presto",
    "prestosql": "trino",
    "trinodb": "trino",
    "snowflakesql": "snowflake",
    "memsql": "singlestore",
    "singlestoredb": "singlestore",
    "apachedoris": "doris",
    "apachedrill": "drill",
    "apachedruid": "druid",
}
"""Other names -> sqlglot's, in lower case and without spaces, hyphens, underscores and points."""


@lru_cache(maxsize=1024)
def dialect_name(name: str) -> str:
    """sqlglot's name of a dialect, whatever the case: `MySQL` is `mysql`, `mssql` and `T-SQL` are `tsql`.

    Raises UserError with the nearest known name for any other text.
    """
    if name == "sqlite":
        return name
    from sqlglot.dialects import DIALECTS  # here, because SQLite needs no parser

    known = {known.lower() for known in DIALECTS}
    plain = re.sub(r"[\s_.-]+", "", name.lower())
    if plain in known:
        return plain
    if plain in SYNONYMS:
        return SYNONYMS[plain]
    near = difflib.get_close_matches(plain, [*known, *SYNONYMS], n=1)
    hint = f"did you mean {SYNONYMS.get(near[0], near[0])}?" if near else f"expected one of {', '.join(sorted(known))}"
    raise UserError(f"unknown SQL dialect {name[:50]!r}; {hint}", code="sql.unknown_dialect")
