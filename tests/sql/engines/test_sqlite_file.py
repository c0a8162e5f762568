"""A database is read and copied with all of its committed rows, and nothing is written beside it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from finetune.sql.engines import sqlite_file
from finetune.sql.engines.sqlite import SqliteEngine, SqlSandbox
from tests.helpers.data_examples import jsonl_source, row, run_prepare, write_jsonl
from tests.helpers.errors import raises

ROWS = [(1,), (2,)]
CRASHES = """
import os, sqlite3, sys
path, journal_mode = sys.argv[1:]
db = sqlite3.connect(path, isolation_level=None)
db.execute(f"PRAGMA journal_mode = {journal_mode}")
db.execute("CREATE TABLE t (a)")
db.execute("INSERT INTO t VALUES (1)")
db.execute("PRAGMA wal_checkpoint") if journal_mode == "wal" else db.execute("PRAGMA cache_size = 1")
db.execute("INSERT INTO t VALUES (2)")
db.execute("BEGIN")
db.execute("INSERT INTO t WITH RECURSIVE n(i) AS (SELECT 3 UNION ALL SELECT i + 1 FROM n WHERE i < 3000) SELECT i FROM n")
os._exit(0)
"""
"""A program that dies in its third transaction, which has written to the log or, before the journal is undone, to the file."""


def crashed(path: Path, journal_mode: str) -> None:
    subprocess.run([sys.executable, "-S", "-c", CRASHES, path, journal_mode], check=True)


def plain(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("CREATE TABLE t AS SELECT 1 AS a UNION SELECT 2")


def wal_mode(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE t AS SELECT 1 AS a UNION SELECT 2")


def empty_log(path: Path) -> None:
    wal_mode(path)
    sqlite_file.beside(path, "-wal").touch()


def empty_log_of_another_mode(path: Path) -> None:
    plain(path)
    sqlite_file.beside(path, "-wal").touch()


def index_left_over(path: Path) -> None:
    empty_log(path)
    sqlite_file.beside(path, "-shm").write_bytes(bytes(32768))


def unfolded_log(path: Path) -> None:
    crashed(path, "wal")
    assert sqlite_file.beside(path, "-wal").stat().st_size


def log_without_index(path: Path) -> None:
    unfolded_log(path)
    sqlite_file.beside(path, "-shm").unlink()


def cut_log(path: Path) -> None:
    log_without_index(path)
    with sqlite_file.beside(path, "-wal").open("r+b") as log:
        log.truncate(log.seek(0, os.SEEK_END) - 100)


def hot_journal(path: Path) -> None:
    crashed(path, "delete")
    assert sqlite_file.beside(path, "-journal").stat().st_size


def hot_journal_and_empty_log(path: Path) -> None:
    hot_journal(path)
    sqlite_file.beside(path, "-wal").touch()


def finished_journal(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = PERSIST")
        db.execute("CREATE TABLE t AS SELECT 1 AS a UNION SELECT 2")
    assert sqlite_file.beside(path, "-journal").stat().st_size


def empty_journal(path: Path) -> None:
    plain(path)
    sqlite_file.beside(path, "-journal").touch()


def journal_that_is_a_folder(path: Path) -> None:
    plain(path)
    sqlite_file.beside(path, "-journal").mkdir()


def journal_that_is_a_pipe(path: Path) -> None:
    plain(path)
    os.mkfifo(sqlite_file.beside(path, "-journal"))


STATES = [
    plain,
    wal_mode,
    empty_log,
    empty_log_of_another_mode,
    index_left_over,
    unfolded_log,
    log_without_index,
    cut_log,
    hot_journal,
    hot_journal_and_empty_log,
    finished_journal,
    empty_journal,
    journal_that_is_a_folder,
    journal_that_is_a_pipe,
]
"""The states in which programs leave a database, each with the rows 1 and 2 committed."""

ODD_NAMES = [
    'it\'s 100% "new" #1?.sqlite',
    "täg é\n.sqlite",
    "a%2Fb.sqlite",
    os.fsdecode(b"caf\xe9.sqlite"),
    "-x;y&z=1.db",
]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[SqlSandbox]:
    with SqlSandbox() as box:
        yield box


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Size, time of the last change and content of every file below a folder, and its own time of change."""
    found = {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
    }
    return found | {".": (0, folder.stat().st_mtime_ns, b"")}


@pytest.mark.parametrize(
    ("made", "name"),
    [
        *((made, "shop.sqlite") for made in STATES),
        *itertools.product([plain, empty_log, log_without_index, hot_journal], ODD_NAMES),
    ],
)
def test_all_committed_rows_are_read_and_copied_and_the_folder_is_not_written(
    sandbox: SqlSandbox, tmp_path: Path, made: Callable[[Path], None], name: str
) -> None:
    path, other = tmp_path / "theirs" / name, tmp_path / "links" / "link.db"
    path.parent.mkdir()
    other.parent.mkdir()
    made(path)
    other.symlink_to(path)
    before = snapshot(path.parent)
    copies = [tmp_path / "copy1.sqlite", tmp_path / "copy2.sqlite"]
    for file, copied in zip((path, other), copies, strict=True):
        for sql in ("SELECT a FROM t ORDER BY a", "SELECT 1 + count(*) FROM t WHERE a = 9 OR a = 1"):
            result = sandbox.run(file, sql, 5)
            assert result.rows in (ROWS, [(2,)]), result
        assert SqliteEngine().schema(file).startswith("CREATE TABLE t")
        SqliteEngine().check(file)
        SqliteEngine().copy(file, copied)
    assert snapshot(path.parent) == before
    assert [entry.name for entry in other.parent.iterdir()] == [other.name]
    assert copies[0].read_bytes() == copies[1].read_bytes()
    assert sorted(found.name for found in tmp_path.iterdir()) == ["copy1.sqlite", "copy2.sqlite", "links", "theirs"]
    with closing(sqlite3.connect(copies[0])) as db:
        assert db.execute("SELECT a FROM t ORDER BY a").fetchall() == ROWS
    if made in (plain, wal_mode):  # as it was before there were logs to fold
        assert shutil.copyfile(path, tmp_path / "raw").read_bytes() == copies[1].read_bytes()


READS = """
import json, os, sys
from pathlib import Path
from finetune.sql.engines.sqlite import SqliteEngine, SqlSandbox
with SqlSandbox() as sandbox:
    for path in map(Path, sys.argv[1:]):
        result = sandbox.run(path, "SELECT a FROM t ORDER BY a", 5)
        print(json.dumps([result.rows, result.error, SqliteEngine().schema(path)[:14], os.access(path.parent, os.W_OK)]))
"""


def test_a_folder_that_may_only_be_read_is_enough(tmp_path: Path) -> None:
    as_user = []
    if os.getuid() == 0:  # root writes everywhere, unless it gives up that right
        if shutil.which("setpriv") is None:
            pytest.skip("root needs setpriv to become like any user")
        as_user = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    paths = [tmp_path / made.__name__ / "shop.sqlite" for made in STATES]
    for made, path in zip(STATES, paths, strict=True):
        path.parent.mkdir()
        made(path)
        for file in path.parent.iterdir():
            file.chmod(0o444)
        path.parent.chmod(0o555)
    try:
        done = subprocess.run(
            [*as_user, sys.executable, "-c", READS, *paths], capture_output=True, text=True, check=False
        )
    finally:
        for path in paths:
            path.parent.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        [[[1], [2]], None, "CREATE TABLE t", False]
    ] * len(paths)


def test_rows_that_a_living_program_adds_are_seen(sandbox: SqlSandbox, tmp_path: Path) -> None:
    path = tmp_path / "live.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("CREATE TABLE t AS SELECT 1 AS a")
        assert sandbox.run(path, "SELECT a FROM t", 5).rows == [(1,)]
        writer.execute("INSERT INTO t VALUES (2)")
        writer.execute("BEGIN")
        writer.execute("INSERT INTO t VALUES (3)")  # not committed
        assert sandbox.run(path, "SELECT a FROM t", 5).rows == ROWS
        writer.execute("COMMIT")
        assert sandbox.run(path, "SELECT count(*) FROM t", 5).rows == [(3,)]
    assert sandbox.run(path, "SELECT count(*) FROM t", 5).rows == [(3,)]


def test_a_transaction_of_a_living_program_is_not_undone(sandbox: SqlSandbox, tmp_path: Path) -> None:
    path = tmp_path / "live.sqlite"
    plain(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("INSERT INTO t VALUES (3)")
        before = snapshot(tmp_path)
        assert sandbox.run(path, "SELECT a FROM t", 5).rows == ROWS
        assert snapshot(tmp_path) == before
        writer.execute("COMMIT")
    assert sandbox.run(path, "SELECT count(*) FROM t", 5).rows == [(3,)]


def test_a_database_that_is_locked_is_not_the_querys_fault(
    sandbox: SqlSandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "LOCK_SECONDS", 0.1)
    path = tmp_path / "live.sqlite"
    plain(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("PRAGMA cache_size = 1")
        writer.execute("BEGIN EXCLUSIVE")
        writer.execute("INSERT INTO t SELECT hex(randomblob(9000)) FROM t a, t b, t c")
        for read in (lambda: sandbox.run(path, "SELECT a FROM t", 5), lambda: SqliteEngine().schema(path)):
            with raises("sql.database_in_use", match=r"live\.sqlite: another program has locked it"):
                read()


def test_a_file_that_changes_during_a_query_is_read_again(
    sandbox: SqlSandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "live.sqlite"
    plain(path)
    sandbox.close()  # the next worker may read the file, so that it is not copied
    run_on, changes = sandbox._run_on, iter(["INSERT INTO t VALUES (3)"])

    def changed_meanwhile(*arguments: object) -> object:
        result = run_on(*arguments)  # type: ignore[arg-type]
        with closing(sqlite3.connect(path, isolation_level=None)) as writer:
            for change in changes:
                writer.execute(change)
        return result

    monkeypatch.setattr(sandbox, "_run_on", changed_meanwhile)
    assert sandbox.run(path, "SELECT count(*) FROM t", 5).rows == [(3,)]
    changes = iter(["INSERT INTO t VALUES (4)"] * 9)

    def changed_always(*arguments: object) -> object:
        result = run_on(*arguments)  # type: ignore[arg-type]
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 10))
        return result

    monkeypatch.setattr(sandbox, "_run_on", changed_always)
    with raises("sql.database_in_use", match=r"live\.sqlite: changed while it was read"):
        sandbox.run(path, "SELECT count(*) FROM t", 5)


def test_a_file_that_changes_all_the_time_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "live.sqlite"
    unfolded_log(path)
    copyfile, changes = shutil.copyfile, [1, 2]

    def changed_meanwhile(source: Path, target: Path) -> object:
        if changes:
            os.utime(path, ns=(0, path.stat().st_mtime_ns + changes.pop()))
        return copyfile(source, target)

    monkeypatch.setattr("shutil.copyfile", changed_meanwhile)
    monkeypatch.setattr("time.sleep", lambda _: None)
    sqlite_file.copy(path, tmp_path / "copy.sqlite")  # it rests after the second change
    with closing(sqlite3.connect(tmp_path / "copy.sqlite")) as db:
        assert db.execute("SELECT a FROM t ORDER BY a").fetchall() == ROWS
    changes += range(1, 100)
    with raises("sql.database_in_use", match="changes while it is copied"):
        sqlite_file.copy(path, tmp_path / "other.sqlite")


def test_small_databases_in_no_common_folder_share_a_worker(sandbox: SqlSandbox, tmp_path: Path) -> None:
    workers = set()
    for number in range(4):
        plain(tmp_path / f"{number}.sqlite")
        assert sandbox.run(tmp_path / f"{number}.sqlite", "SELECT a FROM t ORDER BY a", 5).rows == ROWS
        assert sandbox._worker is not None
        workers.add(sandbox._worker.pid)
    assert len(workers) <= 2


def test_a_path_that_is_too_long_for_sqlite_is_read_from_a_copy(sandbox: SqlSandbox, tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*["d" * 200] * 3)
    folder.mkdir(parents=True)
    plain(tmp_path / "short.sqlite")
    path = folder / "shop.sqlite"
    (tmp_path / "short.sqlite").rename(path)
    assert sandbox.run(path, "SELECT a FROM t ORDER BY a", 5).rows == ROWS
    assert SqliteEngine().schema(path).startswith("CREATE TABLE t")


@pytest.mark.parametrize("name", ["x" * 300 + ".sqlite", "shop.sqlite/shop.sqlite", "\0.sqlite"])
def test_a_name_that_no_file_can_have_is_one_line(sandbox: SqlSandbox, tmp_path: Path, name: str) -> None:
    plain(tmp_path / "shop.sqlite")
    code = "file.unreadable" if len(name) > 200 else "sql.database_missing"
    for read in (lambda: sandbox.run(tmp_path / name, "SELECT 1", 5), lambda: SqliteEngine().schema(tmp_path / name)):
        with raises(code):
            read()


def test_something_that_is_not_a_file_is_not_opened(sandbox: SqlSandbox, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.sqlite")
    with raises("sql.database_missing", match="found something else"):
        sandbox.run(tmp_path / "pipe.sqlite", "SELECT 1", 5)


def test_private_copies_and_temporary_files_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = tmp_path / "tmp"
    private.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(private))
    unfolded_log(tmp_path / "shop.sqlite")
    with SqlSandbox() as sandbox:
        assert sandbox.run(tmp_path / "shop.sqlite", "SELECT a FROM t", 5).rows == ROWS
        [folder] = private.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700 and [path.name for path in folder.iterdir()] == ["0.sqlite"]
    SqliteEngine().schema(tmp_path / "shop.sqlite")
    assert not list(private.iterdir())
    abandoned = SqlSandbox()
    abandoned.run(tmp_path / "shop.sqlite", "SELECT a FROM t", 5)
    del abandoned
    assert not list(private.iterdir())


def test_without_a_place_for_private_copies_the_error_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    plain(tmp_path / "shop.sqlite")
    with raises("disk.error", match="nowhere: no folder can be made"), SqlSandbox() as sandbox:
        sandbox.run(tmp_path / "shop.sqlite", "SELECT 1", 5)


def test_two_databases_that_differ_in_their_logs_are_different(tmp_path: Path) -> None:
    paths = [tmp_path / name / "shop.sqlite" for name in ("one", "two", "three")]
    for path in paths:
        path.parent.mkdir()
    unfolded_log(paths[0])
    for path in paths[1:]:
        for file in SqliteEngine().files(paths[0]):
            shutil.copyfile(file, path.with_name(file.name))
    with closing(sqlite3.connect(paths[1], isolation_level=None)) as writer:
        writer.execute("PRAGMA wal_autocheckpoint = 0")
        writer.execute("DELETE FROM t")
        contents = [[file.read_bytes() for file in SqliteEngine().files(path)] for path in paths]
    assert contents[0][0] == contents[1][0]
    assert contents[0] != contents[1] and contents[0] == contents[2]


@pytest.mark.parametrize("made", [empty_log, unfolded_log, hot_journal], ids=lambda made: made.__name__)
def test_prepare_copies_the_whole_database_and_leaves_the_users_folder_alone(
    tmp_path: Path, made: Callable[[Path], None]
) -> None:
    path = tmp_path / "databases" / "shop" / "shop.sqlite"
    path.parent.mkdir(parents=True)
    made(path)
    before = snapshot(tmp_path / "databases")
    rows = [
        row(number, sql=f"SELECT a FROM t WHERE a = {number}", schema="CREATE TABLE t (a);", split=split)
        for number, split in enumerate(["train", "test"], 1)
    ]
    source = jsonl_source(write_jsonl(tmp_path / "rows.jsonl", rows), databases=str(tmp_path / "databases"))
    prepared = [run_prepare([source], tmp_path / name, val_fraction=0) for name in ("one", "two")]
    assert snapshot(tmp_path / "databases") == before
    copies = [data.folder / "databases" / "shop" / "shop.sqlite" for data in prepared]
    assert [[file.name for file in copy.parent.iterdir()] for copy in copies] == [["shop.sqlite"]] * 2
    assert copies[0].read_bytes() == copies[1].read_bytes()
    assert prepared[0].manifest_hash == prepared[1].manifest_hash
    with SqlSandbox() as sandbox:
        assert sandbox.run(copies[0], "SELECT a FROM t ORDER BY a", 5).rows == ROWS
