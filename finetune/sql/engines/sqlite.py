"""Runs untrusted, model-written SQL against a SQLite file, and returns rows or an error.

One query costs about a third of a millisecond, because all queries share one worker process (`sql/engines/sqlite_worker.py`),
which is restarted after it had to be killed. The guarantees, each covered by a test:

- Nothing is written to the database, nor beside it (`sql/engines/sqlite_file.py`), and an authorizer allows a statement only to
  read: no writes, no ATTACH (which creates files), TEMP tables, transactions, PRAGMA (also not as a table-valued function),
  VACUUM INTO or load_extension. Only one statement runs, of a megabyte at most.
- Time: the parent kills the worker after `timeout_seconds` of wall-clock time, because nothing inside the worker could
  interrupt a single long function call. A CPU limit ends the worker too. A worker that does not read its request counts as one
  that does not answer it.
- Memory: RLIMIT_AS limits the worker, and no text or BLOB may exceed the size limit of a result. Results are limited in
  rows and bytes, also in the parent. Large sorts and groups are written to a private folder, in files that RLIMIT_FSIZE limits.
  Few files may be open, and there are no core dumps. All limits grow with the size of the database (`Limits`).
- The worker runs isolated (`python -I -S`), in its own session, in `/`, without the parent's environment, and ends
  when the parent ends, for whatever reason, even if another process holds its pipes. Each query gets a fresh connection, so none
  can affect another.
- A second layer below SQLite, where the kernel has it (`sql/engines/confinement.py`; `finetune doctor` shows it): if a flaw in
  SQLite executes code in the worker, that code can read the databases of this session and nothing else (Landlock), write only to
  the private folder (Landlock), and open no socket, start no program and touch no other process (seccomp).

NOT covered: such code where neither layer is there (it could read this user's files and reach the network), or where it attacks
the kernel itself; what the query reads (all of the database, its schema table included); random() and date('now'), which make
results differ between runs; the load of one core until the timeout; RLIMIT_AS on macOS, which does not honour it; Windows.
"""

import json
import os
import shutil
import signal
import sqlite3
import tempfile
import time
import weakref
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from finetune.errors import LONGEST_MESSAGE, UserError, shortened
from finetune.sql.ddl.in_sqlite import shown_statements
from finetune.sql.engines import sqlite_file
from finetune.sql.engines.base import ErrorKind, Limits, QueryResult
from finetune.sql.engines.sqlite_file import SqliteFile
from finetune.sql.engines.sqlite_process import Worker, WorkerEnded, start_of_last_line
from finetune.sql.lexer import too_long
from finetune.sql.text import double_quotes_as_names, on_one_line

OVERHEAD_BYTES = 1 << 20
"""What an answer may have besides the JSON text of its rows and the comma and line end of each."""
RUNS_TRIED = 3
"""How often a query is run because the database changed under it."""
SMALL_BYTES = 256 << 10
LAYOUT_LIMIT = 5000
"""Databases of one folder that a worker may read."""


class SqliteEngine:
    """SQLite, in a worker process: see `Engine`."""

    dialect = "sqlite"
    suffix = ".sqlite"

    def check(self, database: Path) -> None:
        sqlite_file.check_sqlite_file(database)

    def copy(self, database: Path, target: Path) -> None:
        sqlite_file.copy(database, target)

    def files(self, database: Path) -> list[Path]:
        return sqlite_file.files(database)

    def schema(self, database: Path) -> str:
        return ddl_of_database(database)

    def open(self, limits: Limits = Limits()) -> "SqlSandbox":  # noqa: B008 (frozen)
        return SqlSandbox(limits)


class SqlSandbox:
    """Runs queries one after the other in a worker process. Use it in a `with` statement, from one thread."""

    def __init__(self, limits: Limits = Limits()) -> None:  # noqa: B008 (frozen)
        self.limits = limits
        self._worker: Worker | None = None
        self._owner = os.getpid()
        self._folder: Path | None = None
        self._remove_folder: Callable[[], object] | None = None
        self._readable: set[Path] = set()
        self._copies: dict[Path, tuple[SqliteFile, Path]] = {}
        self._found: dict[Path, SqliteFile] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the worker and remove the private folder. The next `run` starts anew."""
        self._stop()
        if self._remove_folder is not None:
            self._remove_folder()
        self._forget_folder()

    def run(
        self,
        database: Path,
        sql: str,
        timeout_seconds: float,
        max_rows: int | None = None,
        *,
        double_quoted_text: bool = True,
    ) -> QueryResult:
        """Run one query on one SQLite file; the next query may use another file.

        Any failure of the query is returned as an error in the result. A file that is missing, corrupt or not a SQLite
        file raises UserError, because that is not the query's fault; so does one that another program keeps changing.
        timeout_seconds: grows with the database, like all limits. max_rows: None for the sandbox's limit.

        SQLite reads "France" as the text 'France' if there is no such column. Spider's gold queries and the published
        scores rely on that, so it is on by default; but then a misspelt column is a constant instead of an error, and
        count("nmae") counts rows. `QueryResult.double_quoted_text` reports it. With `double_quoted_text=False` a
        double-quoted word is always a name, as in the SQL standard, and such a query fails.
        """
        if problem := too_long(sql):
            return _failure("too_large", problem, 0.0)
        names_only = double_quotes_as_names(sql)
        request = {
            "sql": sql if double_quoted_text else names_only,
            "names_only": names_only if double_quoted_text and names_only != sql else None,
        }
        for _ in range(RUNS_TRIED):
            found = self._in_one_file(database)
            result = self._run_on(found, database, request, timeout_seconds, max_rows)
            if found.is_unchanged():
                if isinstance(result, UserError):
                    raise result
                return result
        raise UserError(
            f"{database}: changed while it was read; close the program that writes to the database",
            code="sql.database_in_use",
        )

    def _run_on(
        self, found: SqliteFile, database: Path, query: dict[str, Any], timeout_seconds: float, max_rows: int | None
    ) -> QueryResult | UserError:
        """The query's result, or the error that blames the database. database: its name in the error."""
        factor = self.limits.factor(found.bytes)
        limits, seconds = _grown(self.limits, factor), timeout_seconds * factor
        rows = limits.max_rows if max_rows is None else max_rows
        request = query | {"uri": found.uri, "timeout_seconds": seconds, "max_rows": rows}
        message = json.dumps(request).encode() + b"\n"
        most = limits.max_result_bytes + 2 * rows + OVERHEAD_BYTES
        started = time.monotonic()
        for last in (False, True):
            worker = self._worker_for(found.file, limits)
            started = time.monotonic()
            try:
                received = worker.exchange(message, started + seconds, most)
                break
            except TimeoutError:
                self._stop()
                return _failure("timeout", f"no answer within {seconds:g} seconds", time.monotonic() - started)
            except WorkerEnded as ended:
                if ended.had_begun or last:
                    return self._died(time.monotonic() - started)
                self._stop()  # it had died before; the query has not been tried
            except BaseException:  # Ctrl-C: a pending answer must not be read as that of the next query
                self._stop()
                raise
        try:
            return self._result(received, database, time.monotonic() - started)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self._stop()
            return _failure("crashed", f"the SQL worker's answer is damaged ({type(error).__name__})", 0.0)

    def _result(self, received: bytearray, database: Path, seconds: float) -> QueryResult | UserError:
        start = start_of_last_line(received)
        answer = json.loads(received[start:])
        if answer.get("error_kind") == "bad_database":
            message = f"{database}: corrupt, or not a SQLite file ({answer['error']})"
            return UserError(message, code="sql.database_corrupt")
        if answer.get("error_kind") == "in_use":
            message = f"{database}: {answer['error']}; close the program that writes to the database"
            return UserError(message, code="sql.database_in_use")
        if "error" in answer:
            if answer["error_kind"] == "too_large":
                self._stop()  # memory ran short; use a fresh worker
            return _failure(answer["error_kind"], shortened(answer["error"], LONGEST_MESSAGE), seconds)
        body = f"[{received[:start].decode()}]"
        rows = list(map(tuple, _decode_rows(body) if "{" in body else json.loads(body)))
        return QueryResult(rows, tuple(answer["columns"]), None, None, seconds, answer["double_quoted_text"])

    def second_layer(self) -> tuple[str, ...]:
        """The layers of `confinement.py` that hold in a worker here, for example ("Landlock 7", "seccomp")."""
        self._stop()
        self._worker = Worker(self.limits, self._readable, self._private_folder())
        return self._worker.layers

    # The files ----------------------------------------------------------------------------------------------

    def _in_one_file(self, database: Path) -> SqliteFile:
        """The database in a single file: itself, or a private copy with its log folded in, renewed after each change."""
        found = self._found.get(database)
        if found is None or not found.is_as_found(database):
            found = self._found[database] = sqlite_file.find(database)
        if found.whole and not (found.bytes <= SMALL_BYTES and self._is_closed_to_the_worker(found.file)):
            return found
        folder = self._private_folder()
        known, copied = self._copies.get(found.file, (None, folder / f"{len(self._copies)}.sqlite"))
        if known != found:
            try:
                sqlite_file.copy(database, copied)
            except OSError as error:
                raise UserError(
                    f"{copied.parent}: the database {database} cannot be copied to it ({error.strerror or error}); set TMPDIR "
                    "to a folder with enough space",
                    code="disk.error",
                ) from None
            self._copies[found.file] = (found, copied)
        return sqlite_file.find(copied)

    def _private_folder(self) -> Path:
        """A folder for copies and temporary files that only this user can read, removed at the end."""
        self._leave_to_parent()
        if (
            self._folder is not None and not self._folder.is_dir()
        ):  # removed by a program that tidies up temporary files
            self.close()
        if self._folder is None:
            try:
                self._folder = Path(tempfile.mkdtemp(prefix="finetune-sql.")).resolve()
            except OSError as error:
                raise UserError(
                    f"{tempfile.gettempdir()}: no folder can be made in it ({error.strerror}); set TMPDIR to another one",
                    code="disk.error",
                ) from None
            self._remove_folder = weakref.finalize(self, _remove, self._folder, self._owner)
        return self._folder

    def _forget_folder(self) -> None:
        self._folder = self._remove_folder = None
        self._readable.clear()
        self._copies.clear()

    # The worker ---------------------------------------------------------------------------------------------

    def _worker_for(self, file: Path, limits: Limits) -> Worker:
        """A worker with exactly these limits that may read this file."""
        folder, worker = self._private_folder(), self._worker
        if worker is not None and worker.limits == limits and worker.is_running():
            open_to_it = not worker.layers or file in worker.readable or file.parent == folder
            if open_to_it:
                return worker
        if file not in self._readable and file.parent != folder:
            self._readable |= set(_databases_beside(file))
        self._stop()
        self._worker = Worker(limits, self._readable, folder)
        return self._worker

    def _is_closed_to_the_worker(self, file: Path) -> bool:
        """Whether it takes another worker to read this file: a copy of a small one costs less."""
        worker = self._worker
        return worker is not None and worker.is_running() and bool(worker.layers) and file not in worker.readable

    def _stop(self) -> int | None:
        """End the worker. The next query starts a new one. Returns its exit status."""
        self._leave_to_parent()
        worker, self._worker = self._worker, None
        return worker.stop() if worker is not None else None

    def _leave_to_parent(self) -> None:
        """In a process that was forked off: leave worker and folder to the process that made them."""
        if self._owner == os.getpid():
            return
        if self._worker is not None:
            self._worker.disown()
        self._owner, self._worker = os.getpid(), None
        self._forget_folder()

    def _died(self, seconds: float) -> QueryResult:
        status = self._stop()
        if status == -signal.SIGXCPU:
            return _failure("timeout", "the query used up its CPU time", seconds)
        return _failure("crashed", f"the SQL worker ended during the query (status {status})", seconds)


def ddl_of_database(path: Path) -> str:
    """The CREATE TABLE and CREATE VIEW statements of a SQLite file in order of creation, one per line, without comments.

    Raises UserError for a file that is missing, corrupt or not a SQLite file, and for one without tables.
    """
    try:
        with sqlite_file.readable(path) as uri, closing(sqlite3.connect(uri, uri=True)) as connection:
            found = [on_one_line(sql) for sql in shown_statements(connection)]
    except sqlite3.Error as error:
        raise UserError(f"{path}: corrupt, or not a SQLite file ({error})", code="sql.database_corrupt") from None
    if not any(sql.upper().startswith(("CREATE TABLE", "CREATE VIRTUAL")) for sql in found):
        raise UserError(f"{path}: the database has no tables", code="sql.no_tables")
    return "\n".join(f"{sql};" for sql in found)


def _databases_beside(file: Path) -> list[Path]:
    """The file, and the other databases of a folder <db_id>/<db_id><suffix>, so that each folder needs one worker only."""
    found = [file]
    if file.parent.name == file.stem:
        with suppress(OSError):
            for entry in sorted(os.scandir(file.parent.parent), key=lambda entry: entry.name)[:LAYOUT_LIMIT]:
                other = Path(entry.path, entry.name + file.suffix)
                if other.is_file():
                    found.append(other.resolve())
    return found


def _grown(limits: Limits, factor: int) -> Limits:
    """The limits for a database that is `factor` times as large, with at most half of the machine's memory."""
    if factor == 1:
        return limits
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    grown = limits.times(factor)
    return replace(grown, memory_bytes=max(limits.memory_bytes, min(grown.memory_bytes, half)))


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _failure(kind: ErrorKind, message: str, seconds: float) -> QueryResult:
    return QueryResult(None, (), message, kind, seconds)


def _decode_rows(body: str) -> Any:
    return json.loads(body, object_hook=_blob)


def _blob(value: dict[str, str]) -> bytes:
    return bytes.fromhex(value["blob"])
