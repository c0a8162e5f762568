"""Opens and copies SQLite files without writing anything beside them.

A database can be more than its file. Rows that a program has committed may still be in the write-ahead log (`-wal`), and a
program that was killed may leave a rollback journal (`-journal`) that has to be undone. SQLite reads either only if it can write:
it makes an index of the log (`-shm`), or repairs the file. Therefore such a database is copied with its log or journal to a
private folder, and SQLite folds it into one file there. All other databases are opened as ``immutable``, which takes no locks and
makes no files; if the file changes during a query, the query is run again (https://sqlite.org/wal.html, "Read-Only Databases";
https://sqlite.org/fileformat2.html#the_rollback_journal).
"""

import os
import shutil
import sqlite3
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from finetune.errors import UserError

SQLITE_HEADER = b"SQLite format 3\x00"
"""The first 16 bytes of every SQLite 3 file (https://sqlite.org/fileformat.html)."""
LOG, JOURNAL = "-wal", "-journal"
MAX_PATH_BYTES = 500
"""SQLite does not open a file with a longer path (512 bytes with the name of a journal, MAX_PATHNAME of its os_unix.c)."""
LOCK_SECONDS = 5.0
"""How long another program may hold a lock before the database counts as in use; sqlite3.connect's default."""
COPIES_TRIED = 5

FileState = tuple[int, int, int] | None
"""Inode, size in bytes and time of the last change in nanoseconds; None if there is no such file."""


@dataclass(frozen=True)
class SqliteFile:
    """A database file as it was found at one moment: the file with symbolic links resolved, and the state of all its files."""

    file: Path
    states: tuple[FileState, FileState, FileState]
    whole: bool
    """Whether the file holds the complete database by itself, so that it can be read in place."""

    @property
    def bytes(self) -> int:
        """Size of the file and of its log."""
        return sum(state[1] for state in self.states[:2] if state)

    @cached_property
    def uri(self) -> str:
        return self.file.as_uri() + "?mode=ro&immutable=1"

    def is_unchanged(self) -> bool:
        """Whether the file (not its log, which is not read in place) is still the same."""
        return _state(self.file) == self.states[0]

    def is_as_found(self, path: Path) -> bool:
        """Whether `find(path)` would find the same again: a database without log and journal, of which nothing has changed."""
        try:
            return (
                self.whole
                and not any(self.states[1:])
                and (_state(path), _state(f"{self.file}{LOG}"), _state(f"{self.file}{JOURNAL}")) == self.states
            )
        except OSError:
            return False


def find(path: Path) -> SqliteFile:
    """The database as it is now. Raises UserError if it is not a SQLite file, or cannot be read."""
    check_sqlite_file(path)
    try:
        file = path.resolve()
        states = _states(file)
        log_has_content = bool(states[1] and states[1][1])
        whole = not log_has_content and not _must_be_rolled_back(file)
    except OSError as error:
        raise _unreadable(path, error) from None
    return SqliteFile(file, states, whole and len(os.fsencode(file)) <= MAX_PATH_BYTES)


def check_sqlite_file(path: Path) -> None:
    """Raise a UserError that names the file unless it exists and begins with SQLite's header."""
    try:
        if not path.exists():
            raise UserError(f"{path}: no such database file", code="sql.database_missing")
        if not path.is_file():
            found = "a folder" if path.is_dir() else "something else"
            raise UserError(f"{path}: expected a SQLite file, found {found}", code="sql.database_missing")
        with path.open("rb") as file:
            header = file.read(len(SQLITE_HEADER))
    except OSError as error:
        raise _unreadable(path, error) from None
    if header != SQLITE_HEADER:
        raise UserError(
            f"{path}: not a SQLite file" + ("; it is empty" if not header else ""), code="sql.database_corrupt"
        )


def files(path: Path) -> list[Path]:
    """The file, and its log and journal if there is anything in them."""
    found = find(path)
    names = [found.file, beside(found.file, LOG), beside(found.file, JOURNAL)]
    return [name for name, state in zip(names, found.states, strict=True) if name == found.file or (state and state[1])]


def copy(path: Path, target: Path) -> None:
    """Copy a database into one file, with all rows that are committed. The same files give the same bytes.

    Raises UserError if it cannot be read or is changing all the time, and OSError if the target cannot be written.
    """
    for attempt in range(COPIES_TRIED):
        time.sleep(0.05 * attempt)
        found = find(path)
        try:
            shutil.copyfile(found.file, target)
            for suffix, state in zip((LOG, JOURNAL), found.states[1:], strict=True):
                if state and state[1] and not found.whole:
                    shutil.copyfile(beside(found.file, suffix), beside(target, suffix))
            unchanged = _states(found.file) == found.states
        except FileNotFoundError as error:  # the other program has just folded its log
            if error.filename is None or not str(error.filename).startswith(str(found.file)):
                raise
            unchanged = False
        except PermissionError as error:
            if error.filename is not None and str(error.filename).startswith(str(found.file)):
                raise _unreadable(path, error) from None
            raise
        if unchanged:
            _fold(path, target)
            return
        for suffix in (LOG, JOURNAL):
            beside(target, suffix).unlink(missing_ok=True)
    raise _in_use(path, "it changes while it is copied")


@contextmanager
def readable(path: Path) -> Iterator[str]:
    """The URI with which SQLite reads the complete database: of the file itself, or of a private copy."""
    found = find(path)
    if found.whole:
        yield found.uri
        return
    with tempfile.TemporaryDirectory(prefix="finetune-sql.") as folder:
        whole = Path(folder) / "database.sqlite"
        copy(path, whole)
        yield find(whole).uri


def beside(file: Path, suffix: str) -> Path:
    return file.with_name(file.name + suffix)


def _fold(path: Path, copied: Path) -> None:
    """Let SQLite fold the log or journal beside a copy into it, so that one file remains."""
    if not any(beside(copied, suffix).exists() for suffix in (LOG, JOURNAL)):
        return
    try:
        with closing(sqlite3.connect(copied, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous = OFF")  # a copy that is not finished is never used
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        raise UserError(f"{path}: corrupt, or not a SQLite file ({error})", code="sql.database_corrupt") from None
    for suffix in (LOG, "-shm", JOURNAL):
        beside(copied, suffix).unlink(missing_ok=True)


def _must_be_rolled_back(file: Path) -> bool:
    """Whether a program that was killed during a transaction has left a journal; a living program's journal does not count.

    SQLite decides it, because only SQLite knows its locks. A read-only connection changes nothing.
    """
    journal = beside(file, JOURNAL)
    if _state(journal) is None:  # also a folder or a pipe, which would not answer
        return False
    try:
        with journal.open("rb") as opened:
            if opened.read(1) in (b"", b"\0"):  # finished: emptied, or overwritten with zeros
                return False
    except FileNotFoundError:
        return False
    if beside(file, LOG).exists():  # asking SQLite would make a -shm file; a copy is right in any case
        return True
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=LOCK_SECONDS)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        primary = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise _in_use(file, f"another program has locked it for {LOCK_SECONDS:g} seconds") from None
        return primary in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
    return False


def _states(file: Path) -> tuple[FileState, FileState, FileState]:
    return _state(file), _state(f"{file}{LOG}"), _state(f"{file}{JOURNAL}")


def _state(file: Path | str) -> FileState:
    try:
        found = os.stat(file)  # noqa: PTH116 (a Path costs more than the call, and this is asked before every query)
    except FileNotFoundError:
        return None
    return (found.st_ino, found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror or error})", code="file.unreadable")


def _in_use(path: Path, why: str) -> UserError:
    return UserError(f"{path}: {why}; close the program that writes to the database", code="sql.database_in_use")
