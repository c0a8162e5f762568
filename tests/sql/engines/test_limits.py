"""The limits of queries come from the config and grow with the database; what hits one is told apart from an error."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import EvaluationSection
from finetune.data.limits import limits_of
from finetune.data.sources import open_source
from finetune.data.validate import GOLD_HITS_LIMIT, validate
from finetune.sql.engines.base import Limits
from finetune.sql.engines.sqlite import SqlSandbox, _grown
from tests.helpers.data_examples import jsonl_source, row, write_jsonl
from tests.sql.engines.test_sqlite import ENDLESS

ROWS = 40_000
SMALL = Limits(memory_bytes=96 << 20, temp_bytes=2 << 20, max_rows=1000, max_result_bytes=1 << 20)
"""Too small for each of LARGE_QUERIES, except for a database that is large."""
LARGE_QUERIES = {
    "window": "SELECT max(r) FROM (SELECT row_number() OVER (PARTITION BY city ORDER BY note) AS r, note FROM sale)",
    "group": "SELECT count(*) FROM (SELECT note, count(*) FROM sale GROUP BY note)",
    "sort": "SELECT note FROM sale ORDER BY note DESC LIMIT 3 OFFSET 30000",
    "distinct": "SELECT count(DISTINCT note || city) FROM sale",
    "rows": "SELECT id FROM sale WHERE id < 3000",
    "bytes": "SELECT group_concat(substr(note, 1, 40)) FROM sale WHERE id < 30000",
}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 5 MiB, with wide rows in no order: the shape of a table of 3 million rows in 380 MB."""
    path = tmp_path_factory.mktemp("large") / "sales.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("CREATE TABLE sale (id INTEGER PRIMARY KEY, city TEXT, note TEXT)")
        connection.execute(
            "INSERT INTO sale WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
            "SELECT i, 'city ' || (i * 7919 % 500), printf('%090d', i * 104729 % 1000003) FROM n",
            (ROWS - 1,),
        )
    return path


@pytest.mark.parametrize("name", LARGE_QUERIES)
def test_a_large_database_gets_more_of_everything(database: Path, name: str) -> None:
    with closing(sqlite3.connect(database)) as plain:
        expected = plain.execute(LARGE_QUERIES[name]).fetchall()
    assert database.stat().st_size > 4 << 20
    with SqlSandbox(replace(SMALL, large_database_bytes=1 << 20)) as sandbox:
        assert sandbox.run(database, LARGE_QUERIES[name], 5).rows == expected
    with SqlSandbox(replace(SMALL, large_database_bytes=None)) as sandbox:
        result = sandbox.run(database, LARGE_QUERIES[name], 5)
        assert result.rows is None and result.error_kind == "too_large" and result.hit_limit, result


def test_large_sorts_are_written_to_files_and_not_kept_in_memory(database: Path) -> None:
    ten_times = "SELECT row_number() OVER (ORDER BY note, b.id) AS r FROM sale, (SELECT id FROM sale LIMIT 10) b"
    with SqlSandbox(Limits(memory_bytes=64 << 20)) as sandbox:
        assert sandbox.run(database, f"SELECT max(r) FROM ({ten_times})", 20).rows == [(10 * ROWS,)]
    with SqlSandbox(Limits(memory_bytes=64 << 20, temp_bytes=0)) as sandbox:
        result = sandbox.run(database, f"SELECT max(r) FROM ({ten_times})", 20)
        assert result.error in ("the query ran out of memory", "out of memory") and result.hit_limit


def test_the_time_grows_too_and_is_named_in_the_error(database: Path) -> None:
    with SqlSandbox(replace(SMALL, large_database_bytes=1 << 20)) as sandbox:
        result = sandbox.run(database, ENDLESS, 0.05)
    factor = -(-database.stat().st_size // (1 << 20))
    assert result.error == f"no answer within {0.05 * factor:g} seconds" and result.hit_limit and factor >= 3


def test_the_database_decides_and_not_what_ran_before(database: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.sqlite"
    with closing(sqlite3.connect(small, isolation_level=None)) as connection:
        connection.execute("CREATE TABLE t AS SELECT 1 AS a")
    many = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000) SELECT i FROM n"
    with SqlSandbox(replace(SMALL, large_database_bytes=1 << 20)) as sandbox:
        for _ in range(2):
            assert sandbox.run(database, many, 5).rows is not None
            assert sandbox.run(small, many, 5).error == "the result has more than 1,000 rows"
        assert sandbox.run(small, many, 5, max_rows=3000).rows is not None


@pytest.mark.parametrize(
    ("size", "factor"),
    [(0, 1), (128 << 20, 1), ((128 << 20) + 1, 2), (380 << 20, 3), (5 << 30, 40), (10 << 40, 81920)],
)
def test_limits_grow_in_proportion_as_far_as_the_machine_allows(
    size: int, factor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits()
    assert limits.factor(size) == factor
    assert replace(limits, large_database_bytes=None).factor(size) == 1
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": (4 << 30) // 4096}.get)
    grown = _grown(limits, factor)
    assert grown.memory_bytes == min(factor * limits.memory_bytes, 2 << 30)
    assert grown.temp_bytes == factor * limits.temp_bytes
    assert grown.max_result_bytes == min(factor, 8) * limits.max_result_bytes
    assert _grown(Limits(memory_bytes=3 << 30), factor).memory_bytes == 3 << 30


def test_the_config_sets_each_limit_and_its_defaults_are_the_engines() -> None:
    assert limits_of(EvaluationSection()) == Limits()
    section = EvaluationSection(max_memory_mib=64, max_temp_mib=0, max_rows=7, max_result_mib=2, large_database_mib=0.5)
    assert limits_of(section) == Limits(64 << 20, 0, 7, 2 << 20, 1 << 19)
    assert limits_of(EvaluationSection(large_database_mib=None)).large_database_bytes is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_rows": 10}, "more than 10 rows"),
        ({"max_result_mib": 1}, "larger than 1,048,576 bytes"),
        ({"max_temp_mib": 1}, "a temporary file of more than 1 MiB"),
    ],
)
def test_a_gold_query_that_hits_a_limit_of_the_config_says_which_and_what_to_do(
    database: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    path = tmp_path / "databases" / "shop" / "shop.sqlite"
    path.parent.mkdir(parents=True)
    path.symlink_to(database)
    sql = "SELECT note FROM sale ORDER BY note LIMIT 30000"
    source = jsonl_source(
        write_jsonl(tmp_path / "rows.jsonl", [row(1, sql=sql, schema="CREATE TABLE sale (id, city, note);")]),
        databases=str(tmp_path / "databases"),
    )
    opened = open_source(source, "source", progress=False)

    accepted, _ = validate(opened, timeout_seconds=10, limits=limits_of(EvaluationSection()), progress=False)
    assert len(accepted) == 1
    _, [rejection] = validate(
        opened, timeout_seconds=10, limits=limits_of(replace(EvaluationSection(), **changes)), progress=False
    )
    assert rejection.reason == GOLD_HITS_LIMIT
    assert said in rejection.detail and "config's section evaluation" in rejection.detail
