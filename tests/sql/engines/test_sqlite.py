"""At least one hostile query for each guarantee listed in `finetune.sql.engines.sqlite`."""

import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from finetune.sql.engines.base import Limits, QueryResult
from finetune.sql.engines.sqlite import SqlSandbox
from finetune.sql.lexer import MAX_STATEMENT_BYTES
from tests.helpers.errors import raises

ENDLESS = "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT count(*) FROM t"
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's limits are set and read on Linux only")


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "film club #1?.sqlite"  # characters that a URI has to escape
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE film (id INTEGER PRIMARY KEY, title TEXT, year INTEGER)")
        connection.execute("INSERT INTO film VALUES (1, 'Alien', 1979), (2, 'Brazil', 1985), (3, NULL, 1990)")
        connection.execute("CREATE VIRTUAL TABLE review USING fts5(body)")
        connection.execute("INSERT INTO review VALUES ('a slow and lovely film')")
    connection.close()
    return path


@pytest.fixture(scope="module")
def sandbox() -> Iterator[SqlSandbox]:
    with SqlSandbox(Limits(max_result_bytes=8 << 20)) as box:
        yield box


def worker_pid(sandbox: SqlSandbox) -> int:
    assert sandbox._worker is not None
    return sandbox._worker.pid


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except ProcessLookupError:
        return False
    except FileNotFoundError:  # no /proc on this system
        return True
    return state != "Z"  # a zombie counts as ended


# What comes back --------------------------------------------------------------------------------------------


def test_rows_and_columns_come_back(sandbox: SqlSandbox, database: Path) -> None:
    result = sandbox.run(database, "SELECT title, year AS y FROM film ORDER BY id;", 5)
    assert result.rows == [("Alien", 1979), ("Brazil", 1985), (None, 1990)]
    assert result.columns == ("title", "y")
    assert (result.error, result.error_kind) == (None, None)
    assert 0 < result.seconds < 5


def test_every_type_of_value_survives_the_round_trip(sandbox: SqlSandbox, database: Path) -> None:
    sql = "SELECT NULL, 9223372036854775807, 0.1, 1e999, 'naïve\n{\"', x'00ff', '', x''"
    result = sandbox.run(database, sql, 5)
    assert result.rows == [(None, 2**63 - 1, 0.1, float("inf"), 'naïve\n{"', b"\x00\xff", "", b"")]
    assert [type(value) for value in result.rows[0]] == [
        type(None),
        int,
        float,
        float,
        str,
        bytes,
        str,
        bytes,
    ]


def test_text_that_is_not_utf8_comes_back_printable_and_distinct(sandbox: SqlSandbox, database: Path) -> None:
    result = sandbox.run(database, "SELECT CAST(x'4761726369e9' AS TEXT), CAST(x'47617263' AS TEXT)", 5)
    assert result.rows == [("Garci\\xe9", "Garc")]


def test_no_rows_is_a_result_and_no_statement_is_an_error(sandbox: SqlSandbox, database: Path) -> None:
    assert sandbox.run(database, "SELECT title FROM film WHERE year > 3000", 5).rows == []
    for empty in ("", "  ", "-- nothing", ";"):
        result = sandbox.run(database, empty, 5)
        assert (result.error, result.error_kind) == ("no SQL statement to run", "sql_error")


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT nmae FROM film", "no such column: nmae"),
        ("SELECT title FORM film", 'near "film": syntax error'),
        ("SELECT 'a\0b'", "null character"),
        ("SELECT '\ud800'", "surrogates not allowed"),
    ],
)
def test_a_wrong_query_says_what_is_wrong_in_one_line(
    sandbox: SqlSandbox, database: Path, sql: str, message: str
) -> None:
    result = sandbox.run(database, sql, 5)
    assert (result.rows, result.error_kind) == (None, "sql_error")
    assert result.error is not None and message in result.error and "\n" not in result.error


def test_reading_functions_tables_and_full_text_search_work(sandbox: SqlSandbox, database: Path) -> None:
    assert sandbox.run(database, "SELECT value FROM json_each('[7, 8]')", 5).rows == [(7,), (8,)]
    assert sandbox.run(database, "SELECT body FROM review WHERE review MATCH 'lovely'", 5).rows is not None
    assert sandbox.run(database, "SELECT name FROM sqlite_master WHERE name = 'film'", 5).rows == [("film",)]


def test_several_databases_one_after_the_other(sandbox: SqlSandbox, database: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE film AS SELECT 'Metropolis' AS title")
    connection.close()
    for _ in range(2):
        assert sandbox.run(other, "SELECT title FROM film", 5).rows == [("Metropolis",)]
        assert sandbox.run(database, "SELECT count(*) FROM film", 5).rows == [(3,)]


# Read-only access -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO film VALUES (9, 'x', 1)",
        "UPDATE film SET title = 'x'",
        "DELETE FROM film",
        "WITH x AS (SELECT 1) DELETE FROM film",
        "UPDATE sqlite_master SET sql = ''",
        "REPLACE INTO film VALUES (1, 'x', 1)",
        "DROP TABLE film",
        "CREATE TABLE other (a)",
        "ALTER TABLE film RENAME TO movie",
        "CREATE INDEX i ON film(year)",
        "CREATE TEMP TABLE t (a)",
        "CREATE TEMP VIEW v AS SELECT 1",
        "CREATE VIRTUAL TABLE v USING fts5(a)",
        "PRAGMA table_info(film)",
        "PRAGMA writable_schema = ON",
        "PRAGMA trusted_schema",
        "SELECT * FROM pragma_table_info('film')",
        "BEGIN",
        "SAVEPOINT s",
        "VACUUM",
        "REINDEX",
        "ANALYZE",
        "DETACH main",
        "SELECT load_extension('/tmp/evil.so')",
        "SELECT fts3_tokenizer('simple')",
        "SELECT readfile('/etc/passwd')",
        "SELECT writefile('written', 'x')",
    ],
)
def test_a_statement_that_does_more_than_read_is_refused(sandbox: SqlSandbox, database: Path, sql: str) -> None:
    refused_by_sqlite_itself = "sqlite_master" in sql or "file(" in sql
    before = database.read_bytes()
    result = sandbox.run(database, sql, 5)
    assert result.rows is None
    assert result.error_kind == ("sql_error" if refused_by_sqlite_itself else "forbidden"), result
    assert database.read_bytes() == before
    assert [path.name for path in database.parent.iterdir()] == [database.name]


@pytest.mark.parametrize("sql", ["ATTACH '{}' AS made", "VACUUM INTO '{}'"])
def test_no_query_creates_a_file(sandbox: SqlSandbox, database: Path, tmp_path: Path, sql: str) -> None:
    made = tmp_path / "made.db"
    assert sandbox.run(database, sql.format(made), 5).error_kind == "forbidden"
    assert not made.exists()


def test_only_one_statement_runs(sandbox: SqlSandbox, database: Path) -> None:
    result = sandbox.run(database, "SELECT 1; SELECT 2", 5)
    assert (result.rows, result.error_kind) == (None, "forbidden")
    assert sandbox.run(database, "SELECT 1; -- that is all", 5).rows == [(1,)]


def test_a_query_does_not_affect_the_next_one(sandbox: SqlSandbox, database: Path) -> None:
    for sql in ("PRAGMA case_sensitive_like = ON", "CREATE TEMP TABLE film AS SELECT 1 AS title", "BEGIN"):
        sandbox.run(database, sql, 5)
    assert sandbox.run(database, "SELECT count(*) FROM film WHERE title LIKE 'aLIEN'", 5).rows == [(1,)]


# Time, memory, size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [
        ENDLESS,
        # One call that does not return to SQLite's own loop, where a progress handler would be called:
        "SELECT instr(printf('%.*c', 1000000, 'a'), printf('%.*c', 500000, 'a') || 'b')",
    ],
    ids=["endless recursion", "one heavy function call"],
)
def test_the_wall_clock_ends_any_query(sandbox: SqlSandbox, database: Path, sql: str) -> None:
    sandbox.run(database, "SELECT 1", 5)
    pid, started = worker_pid(sandbox), time.monotonic()
    result = sandbox.run(database, sql, 0.4)
    assert result.error_kind == "timeout" and result.rows is None
    assert time.monotonic() - started < 2
    assert not is_running(pid)
    assert sandbox.run(database, "SELECT 1", 5).rows == [(1,)]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT zeroblob(1000000000)",
        "SELECT randomblob(1000000000)",
        "SELECT group_concat(printf('%.*c', 1000000, 'x')) FROM film a, film b, film c",
        pytest.param(
            "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t)"
            " SELECT n, printf('%.*c', 1000000, 'x') FROM t ORDER BY 2",
            marks=linux_only,
        ),
    ],
)
@pytest.mark.parametrize("temp_bytes", [0, 16 << 20])
def test_a_query_that_needs_too_much_memory_is_stopped(database: Path, sql: str, temp_bytes: int) -> None:
    limits = Limits(memory_bytes=128 << 20, max_result_bytes=8 << 20, temp_bytes=temp_bytes)
    with SqlSandbox(limits) as sandbox:
        result = sandbox.run(database, sql, 10)
        assert result.error_kind == "too_large" and result.rows is None, result
        assert sandbox.run(database, "SELECT 1", 5).rows == [(1,)]


def test_no_single_value_is_longer_than_a_result_may_be(database: Path) -> None:
    with SqlSandbox(Limits(max_result_bytes=1 << 20)) as sandbox:
        assert sandbox.run(database, "SELECT length(zeroblob(1000000))", 5).rows == [(1_000_000,)]
        assert sandbox.run(database, "SELECT length(zeroblob(2000000))", 5).error_kind == "too_large"


def test_a_giant_result_is_cut_off(sandbox: SqlSandbox, database: Path) -> None:
    numbers = "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < {}) SELECT n{} FROM t"
    assert sandbox.run(database, numbers.format(1000, ""), 5, max_rows=999).error_kind == "too_large"
    assert len(sandbox.run(database, numbers.format(1000, ""), 5, max_rows=1000).rows or []) == 1000
    wide = sandbox.run(database, numbers.format(1000, ", printf('%.*c', 100000, 'x')"), 5)
    assert wide.rows is None and wide.error_kind == "too_large"


@linux_only
def test_the_worker_does_not_inherit_the_parents_environment(
    sandbox: SqlSandbox, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    sandbox.close()
    sandbox.run(database, "SELECT 1", 5)
    process = Path(f"/proc/{worker_pid(sandbox)}")
    names = {entry.split(b"=")[0] for entry in (process / "environ").read_bytes().split(b"\0") if entry}
    assert names <= {b"PATH", b"MALLOC_ARENA_MAX", b"LD_LIBRARY_PATH", b"SQLITE_TMPDIR"}
    assert os.readlink(process / "cwd") == "/"
    assert os.getsid(worker_pid(sandbox)) == worker_pid(sandbox)


@linux_only
def test_the_worker_has_hard_limits(sandbox: SqlSandbox, database: Path) -> None:
    sandbox.run(database, "SELECT 1", 5)
    pid = worker_pid(sandbox)
    assert resource.prlimit(pid, resource.RLIMIT_AS) == (512 << 20, 512 << 20)
    assert resource.prlimit(pid, resource.RLIMIT_FSIZE) == (512 << 20, 512 << 20)
    assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (16, 16)
    assert resource.prlimit(pid, resource.RLIMIT_CORE) == (0, 0)
    assert 0 < resource.prlimit(pid, resource.RLIMIT_CPU)[0] <= 60


@linux_only
def test_a_worker_out_of_cpu_time_is_a_timeout(sandbox: SqlSandbox, database: Path) -> None:
    sandbox.run(database, "SELECT 1", 5)
    limit = (resource.RLIMIT_CPU, (1, resource.RLIM_INFINITY))
    threading.Timer(0.3, resource.prlimit, (worker_pid(sandbox), *limit)).start()
    result = sandbox.run(database, ENDLESS, 20)
    assert result.error_kind == "timeout" and result.seconds < 15


def test_a_statement_of_more_than_a_megabyte_is_not_run_nor_looked_at(sandbox: SqlSandbox, database: Path) -> None:
    longest = f"SELECT length('{'x' * (MAX_STATEMENT_BYTES - 20)}')".ljust(MAX_STATEMENT_BYTES)
    assert sandbox.run(database, longest, 5).rows == [(MAX_STATEMENT_BYTES - 20,)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("finetune.sql.engines.sqlite.double_quotes_as_names", Mock(side_effect=AssertionError))
        for sql in (longest + " ", "é" * (MAX_STATEMENT_BYTES // 2 + 1), "SELECT " + "[" * 10_000_000):
            result = sandbox.run(database, sql, 5)
            assert result.hit_limit and result.error is not None and "1 MB is the limit" in result.error


# The worker's life ------------------------------------------------------------------------------------------


def test_a_worker_killed_between_queries_is_replaced(sandbox: SqlSandbox, database: Path) -> None:
    sandbox.run(database, "SELECT 1", 5)
    os.kill(worker_pid(sandbox), signal.SIGKILL)
    time.sleep(0.2)
    assert sandbox.run(database, "SELECT 1", 5).rows == [(1,)]


def test_a_worker_killed_during_a_query_is_reported(sandbox: SqlSandbox, database: Path) -> None:
    sandbox.run(database, "SELECT 1", 5)
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {worker_pid(sandbox)}"])
    result = sandbox.run(database, ENDLESS, 10)
    killer.wait()
    assert result.error_kind == "crashed" and result.error is not None and "-9" in result.error
    assert sandbox.run(database, "SELECT 1", 5).rows == [(1,)]


def test_an_interrupted_query_does_not_answer_the_next_one(
    sandbox: SqlSandbox, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox.run(database, "SELECT 1", 5)
    with monkeypatch.context() as patch:
        patch.setattr("finetune.sql.engines.sqlite_process._is_complete", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sandbox.run(database, "SELECT 'late'", 5)
    assert sandbox.run(database, "SELECT 'next'", 5).rows == [("next",)]


def test_the_worker_ends_when_its_parent_is_killed(database: Path) -> None:
    script = (
        "import sys, threading\n"
        "from pathlib import Path\n"
        "from finetune.sql.engines.sqlite import SqlSandbox\n"
        "box, path = SqlSandbox(), Path(sys.argv[1])\n"
        "box.run(path, 'SELECT 1', 5)\n"
        "print(box._worker.pid, flush=True)\n"
        "box.run(path, sys.argv[2], 60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(database), ENDLESS], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.2)  # the endless query is running
    assert is_running(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 3
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def test_a_query_does_not_start_a_python_process(sandbox: SqlSandbox, database: Path) -> None:
    sandbox.run(database, "SELECT 1", 5)
    pid = worker_pid(sandbox)
    seconds = sorted(sandbox.run(database, "SELECT title FROM film", 5).seconds for _ in range(50))
    assert worker_pid(sandbox) == pid
    assert seconds[25] < 0.01  # measured: 0.3 ms


def test_too_little_memory_to_start_is_the_users_mistake(database: Path) -> None:
    with SqlSandbox(Limits(memory_bytes=1 << 20)) as sandbox, raises("sql.worker_failed", match="1 MiB"):
        sandbox.run(database, "SELECT 1", 5)


# The file ---------------------------------------------------------------------------------------------------


def test_a_bad_file_is_the_users_mistake_and_named(sandbox: SqlSandbox, tmp_path: Path, database: Path) -> None:
    (tmp_path / "empty.sqlite").touch()
    (tmp_path / "notes.sqlite").write_text("Dear diary, today I was not a database at all.")
    damaged = bytearray(database.read_bytes())
    damaged[100:] = b"\xff" * (len(damaged) - 100)
    (tmp_path / "damaged.sqlite").write_bytes(damaged)
    (tmp_path / "folder.sqlite").mkdir()
    for name, code, said in [
        ("missing", "sql.database_missing", "no such database file"),
        ("folder", "sql.database_missing", "expected a SQLite file, found a folder"),
        ("empty", "sql.database_corrupt", "not a SQLite file; it is empty"),
        ("notes", "sql.database_corrupt", "not a SQLite file"),
        ("damaged", "sql.database_corrupt", "corrupt, or not a SQLite file"),
    ]:
        with raises(code, match=rf"{name}\.sqlite: {said}"):
            sandbox.run(tmp_path / f"{name}.sqlite", "SELECT * FROM film", 5)


# Double quotes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "is_text"),
    [
        ('SELECT count(*) FROM film WHERE title = "Alien"', True),
        ('SELECT count("tilte") FROM film', True),
        ('SELECT "title" FROM film AS "f" WHERE "f"."year" = 1979', False),
        ('SELECT title AS "a `name`" FROM film WHERE title = \'"Alien"\' -- "x"', False),
    ],
)
def test_a_double_quoted_name_taken_for_text_is_noticed_and_can_be_refused(
    sandbox: SqlSandbox, database: Path, sql: str, is_text: bool
) -> None:
    lenient = sandbox.run(database, sql, 5)
    strict = sandbox.run(database, sql, 5, double_quoted_text=False)
    assert lenient.rows is not None and lenient.double_quoted_text is is_text
    if is_text:
        assert strict.error_kind == "sql_error" and strict.error is not None and "no such column" in strict.error
    else:
        assert strict == QueryResult(lenient.rows, lenient.columns, None, None, strict.seconds)
