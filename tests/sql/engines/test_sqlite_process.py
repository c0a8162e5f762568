"""Nothing that happens to the worker hangs or ends its parent, and the worker never outlives its parent."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from finetune.errors import LONGEST_MESSAGE
from finetune.sql.engines import sqlite_process
from finetune.sql.engines.base import Limits
from finetune.sql.engines.sqlite import SqlSandbox
from tests.sql.engines.test_sqlite import ENDLESS, is_running, linux_only, worker_pid

LONG = f"SELECT length('{'x' * 900_000}')"
"""Does not fit into a pipe, which holds 64 KiB."""


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "shop.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t AS SELECT 1 AS a")
        connection.commit()
    return path


@pytest.fixture
def sandbox(database: Path) -> Iterator[SqlSandbox]:
    """One whose worker has started."""
    with SqlSandbox() as box:
        assert box.run(database, "SELECT a FROM t", 5).rows == [(1,)]
        yield box


def ended(pid: int, seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


@pytest.mark.parametrize("sql", ["SELECT a FROM t", LONG], ids=["short", "long"])
@pytest.mark.parametrize("is_noticed", [True, False])
def test_a_worker_that_died_between_two_queries_does_not_matter(
    sandbox: SqlSandbox, database: Path, sql: str, is_noticed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = worker_pid(sandbox)
    os.kill(pid, signal.SIGKILL)
    if not is_noticed:  # it dies between the check and the request
        assert ended(pid)
        monkeypatch.setattr(sqlite_process.Worker, "is_running", lambda _: True)
    assert sandbox.run(database, sql, 5).rows in ([(1,)], [(900_000,)])
    assert worker_pid(sandbox) != pid


@pytest.mark.parametrize("sql", ["SELECT " + "[" * 100_000, "SELECT " + "'" * 100_001, "SELECT " + "x" * 100_000])
def test_an_error_does_not_echo_the_whole_query(sandbox: SqlSandbox, database: Path, sql: str) -> None:
    error = sandbox.run(database, sql, 5).error
    assert error is not None and len(error) <= LONGEST_MESSAGE


def test_closing_a_dead_worker_raises_nothing(sandbox: SqlSandbox) -> None:
    pid = worker_pid(sandbox)
    os.kill(pid, signal.SIGKILL)
    assert ended(pid)
    sandbox.close()
    sandbox.close()


def test_a_private_folder_that_was_tidied_up_is_made_anew(sandbox: SqlSandbox, database: Path) -> None:
    folder = sandbox._folder
    assert folder is not None
    shutil.rmtree(folder)
    os.kill(worker_pid(sandbox), signal.SIGKILL)
    assert sandbox.run(database, "SELECT a FROM t", 5).rows == [(1,)]
    assert sandbox._folder != folder and sandbox._private_folder().is_dir()


@linux_only
@pytest.mark.parametrize("stopped_first", [True, False])
def test_a_request_that_a_dying_worker_never_read_is_run_by_the_next_one(
    sandbox: SqlSandbox, database: Path, stopped_first: bool
) -> None:
    pid = worker_pid(sandbox)
    if stopped_first:  # the request waits in the pipe when the worker is killed
        os.kill(pid, signal.SIGSTOP)
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.2; kill -9 {pid}"])
    if not stopped_first:
        killer.wait()
    assert sandbox.run(database, "SELECT a FROM t", 5).rows == [(1,)]
    killer.wait()


@pytest.mark.parametrize("sql", ["SELECT a FROM t", LONG], ids=["short", "long"])
def test_a_stopped_worker_is_a_timeout(sandbox: SqlSandbox, database: Path, sql: str) -> None:
    pid = worker_pid(sandbox)
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    result = sandbox.run(database, sql, 0.3)
    assert result.error_kind == "timeout" and 0.3 <= time.monotonic() - started < 2
    assert ended(pid)
    assert sandbox.run(database, sql, 5).rows is not None


def test_closing_a_stopped_worker_does_not_wait(sandbox: SqlSandbox) -> None:
    pid = worker_pid(sandbox)
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    sandbox.close()
    assert time.monotonic() - started < 2 and ended(pid)


def test_long_queries_and_large_results_fit_through_the_pipes(sandbox: SqlSandbox, database: Path) -> None:
    many = (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 90000) SELECT i, 'naïve ' || i FROM n"
    )
    rows = sandbox.run(database, many.ljust(900_000), 20).rows
    assert rows is not None and rows[-1] == (90_000, "naïve 90000") and len(rows) == 90_000
    wide = sandbox.run(database, "SELECT printf('%.*c', 5000000, 'x'), 'é'", 20).rows
    assert wide is not None and len(str(wide[0][0])) == 5_000_000


@pytest.mark.parametrize(
    "answer",
    [
        b'{"columns": [], "double_quoted_text": fa\n',
        b"{}\n",
        b'7\n{"columns": ["a"], "double_quoted_text": false}\n',
        b'[{"a": 1}]\n{"columns": ["a"], "double_quoted_text": false}\n',
        b"[" * 100_000 + b'\n{"columns": ["a"], "double_quoted_text": false}\n',
        b"\xff\xfe\n{}\n",
    ],
    ids=["cut", "empty", "no row", "no blob", "deep", "binary"],
)
def test_an_answer_that_is_none_is_a_crash_of_the_worker(
    sandbox: SqlSandbox, database: Path, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = worker_pid(sandbox)
    with monkeypatch.context() as patched:
        patched.setattr(sqlite_process.Worker, "exchange", lambda *_: bytearray(answer))
        result = sandbox.run(database, "SELECT a FROM t", 5)
    assert result.error_kind == "crashed" and result.error is not None and "damaged" in result.error
    assert ended(pid)


def test_a_worker_that_never_stops_sending_is_ended(
    sandbox: SqlSandbox, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.sql.engines.sqlite.OVERHEAD_BYTES", -(32 << 20))
    many = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 90000) SELECT i FROM n"
    result = sandbox.run(database, many, 20, max_rows=90_000)
    assert result.error_kind == "crashed"


@pytest.mark.parametrize("seconds", [3_000_000, 1e300, float("inf")])
def test_any_time_limit_can_be_set(sandbox: SqlSandbox, database: Path, seconds: float) -> None:
    assert sandbox.run(database, "SELECT a FROM t", seconds).rows == [(1,)]


PARENT = """
import os, sys, time
from pathlib import Path
from finetune.sql.engines.sqlite import SqlSandbox
box, path, sql, holds_pipes = SqlSandbox(), *sys.argv[1:]
box.run(Path(path), "SELECT a FROM t", 5)
fork = os.fork() if holds_pipes == "True" else None
if fork == 0:
    time.sleep(60)
print(box._worker.pid, fork, flush=True)
box.run(Path(path), sql, 60) if sql else time.sleep(60)
"""


@linux_only
@pytest.mark.parametrize("sql", ["", ENDLESS], ids=["idle", "running"])
@pytest.mark.parametrize("holds_pipes", [True, False])
def test_the_worker_ends_with_its_parent_even_if_a_fork_holds_the_pipes(
    database: Path, sql: str, holds_pipes: bool
) -> None:
    command = [sys.executable, "-c", PARENT, str(database), sql, str(holds_pipes)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, fork = parent.stdout.readline().split()
    time.sleep(0.1)
    assert is_running(int(pid))
    parent.kill()
    parent.wait()
    try:
        assert ended(int(pid), seconds=0.5)  # by the kernel, not by the look for another parent each second
        assert fork == "None" or is_running(int(fork))
    finally:
        parent.stdout.close()
        if fork != "None":
            os.kill(int(fork), signal.SIGKILL)


ORPHAN = """
import os, sys
from finetune.sql.engines.confinement import end_with_parent
end_with_parent(os.getppid() + 1)
print("still here")
"""


def test_a_worker_whose_parent_is_gone_when_it_starts_ends_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")


def test_a_fork_of_the_parent_uses_a_worker_of_its_own(sandbox: SqlSandbox, database: Path) -> None:
    pid, folder = worker_pid(sandbox), sandbox._folder
    read, write = os.pipe()
    fork = os.fork()
    if fork == 0:
        rows = sandbox.run(database, "SELECT a + 1 FROM t", 5).rows
        os.write(write, f"{rows == [(2,)]} {worker_pid(sandbox) != pid}".encode())
        sandbox.close()
        os._exit(0)
    os.waitpid(fork, 0)
    assert os.read(read, 100) == b"True True"
    for end in (read, write):
        os.close(end)
    assert worker_pid(sandbox) == pid and folder is not None and folder.is_dir()
    assert sandbox.run(database, "SELECT a FROM t", 5).rows == [(1,)]
    assert worker_pid(sandbox) == pid


def test_databases_of_one_folder_share_a_worker(tmp_path: Path) -> None:
    paths = [tmp_path / db_id / f"{db_id}.sqlite" for db_id in ("bike", "car", "film")]
    for number, path in enumerate(paths):
        path.parent.mkdir()
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(f"CREATE TABLE t AS SELECT {number} AS a")
            connection.commit()
    with SqlSandbox() as sandbox:
        pids = set()
        for _ in range(2):
            for number, path in enumerate(paths):
                assert sandbox.run(path, "SELECT a FROM t", 5).rows == [(number,)]
                pids.add(worker_pid(sandbox))
        assert len(pids) == 1
        large = Limits(large_database_bytes=1 << 10)
    with SqlSandbox(large) as sandbox:
        assert sandbox.run(paths[0], "SELECT a FROM t", 5).rows == [(0,)]
        assert sandbox._worker is not None and sandbox._worker.limits.temp_bytes == 8 * large.temp_bytes
