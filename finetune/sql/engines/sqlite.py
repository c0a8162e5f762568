"""Runs untrusted, model-written SQL against a SQLite file, and returns rows or an error.

One query costs about a millisecond, because all queries share one worker process (`sql/engines/sqlite_worker.py`), which is
restarted after it had to be killed. The guarantees, each covered by a test:

- The file is opened read-only, and an authorizer allows a statement only to read: no writes, no ATTACH (which creates
  files), TEMP tables, transactions, PRAGMA (also not as a table-valued function), VACUUM INTO or load_extension. Only one
  statement runs.
- Time: the parent kills the worker after `timeout_seconds` of wall-clock time, because nothing inside the worker could
  interrupt a single long function call. A CPU limit ends the worker too.
- Memory: RLIMIT_AS limits the worker, and no text or BLOB may exceed the size limit of a result. Results are limited in
  rows and bytes. RLIMIT_FSIZE is 0, few files may be open, and there are no core dumps.
- The worker runs isolated (`python -I -S`), in its own session, in `/`, without the parent's environment, and ends
  when the parent ends, for whatever reason. Each query gets a fresh connection, so none can affect another.

NOT covered: a vulnerability in SQLite itself that executes arbitrary code (there is no seccomp, no namespace and no other
user, so such code could read this user's files and reach the network); what the query reads (all of the database, its
schema table included); random() and date('now'), which make results differ between runs; the load of one core until the
timeout; RLIMIT_AS on macOS, which does not honour it; Windows.
"""

import json
import os
import selectors
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from finetune.errors import UserError
from finetune.sql.ddl.in_sqlite import shown_statements
from finetune.sql.engines.base import MAX_ROWS, MEMORY_BYTES, RESULT_BYTES, ErrorKind, QueryResult
from finetune.sql.text import double_quotes_as_names, on_one_line

SQLITE_HEADER = b"SQLite format 3\x00"
"""The first 16 bytes of every SQLite 3 file (https://sqlite.org/fileformat.html)."""
WORKER = Path(__file__).with_name("sqlite_worker.py")
START_SECONDS = 30.0
READ_BYTES = 1 << 16


class SqliteEngine:
    """SQLite, in a worker process: see `Engine`."""

    dialect = "sqlite"
    suffix = ".sqlite"

    def check(self, database: Path) -> None:
        log = database.with_name(f"{database.name}-wal")
        if log.exists() and log.stat().st_size:  # a copy of the file alone would lack these changes
            raise UserError(
                f"{database}: some changes are only in {log.name} so far; close the program that writes to the database",
                code="sql.database_in_use",
            )

    def schema(self, database: Path) -> str:
        return ddl_of_database(database)

    def open(self, *, memory_bytes: int = MEMORY_BYTES, max_result_bytes: int = RESULT_BYTES) -> "SqlSandbox":
        return SqlSandbox(memory_bytes=memory_bytes, max_result_bytes=max_result_bytes)


class SqlSandbox:
    """Runs queries one after the other in a worker process. Use it in a `with` statement, from one thread."""

    def __init__(self, *, memory_bytes: int = MEMORY_BYTES, max_result_bytes: int = RESULT_BYTES) -> None:
        """memory_bytes: limit of the worker's address space. max_result_bytes: limit of a result as JSON, and of any value."""
        self._limits = {"memory_bytes": memory_bytes, "max_result_bytes": max_result_bytes}
        self._worker: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the worker. The next `run` starts a new one."""
        if self._worker is None:
            return
        self._worker.kill()
        self._worker.wait()
        for pipe in (self._worker.stdin, self._worker.stdout):
            if pipe is not None:
                pipe.close()
        self._worker = None

    def run(
        self,
        database: Path,
        sql: str,
        timeout_seconds: float,
        max_rows: int = MAX_ROWS,
        *,
        double_quoted_text: bool = True,
    ) -> QueryResult:
        """Run one query on one SQLite file; the next query may use another file.

        Any failure of the query is returned as an error in the result. A file that is missing, corrupt or not a SQLite
        file raises UserError, because that is not the query's fault.

        SQLite reads "France" as the text 'France' if there is no such column. Spider's gold queries and the published
        scores rely on that, so it is on by default; but then a misspelt column is a constant instead of an error, and
        count("nmae") counts rows. `QueryResult.double_quoted_text` reports it. With `double_quoted_text=False` a
        double-quoted word is always a name, as in the SQL standard, and such a query fails.
        """
        names_only = double_quotes_as_names(sql)
        request = {
            "uri": read_only_uri(database),
            "sql": sql if double_quoted_text else names_only,
            "names_only": names_only if double_quoted_text and names_only != sql else None,
            "timeout_seconds": timeout_seconds,
            "max_rows": max_rows,
        }
        if self._worker is None or self._worker.poll() is not None:
            self._start()
        started = time.monotonic()
        try:
            *lines, end = self._exchange(request, started + timeout_seconds)
        except TimeoutError:
            self.close()
            message = f"no answer within {timeout_seconds:g} seconds"
            return _failure("timeout", message, time.monotonic() - started)
        except (EOFError, BrokenPipeError):
            return self._died(time.monotonic() - started)
        except BaseException:  # Ctrl-C: a pending answer must not be read as that of the next query
            self.close()
            raise
        seconds = time.monotonic() - started
        answer = json.loads(end)
        if answer.get("error_kind") == "bad_database":
            raise UserError(
                f"{database}: corrupt, or not a SQLite file ({answer['error']})", code="sql.database_corrupt"
            )
        if "error" in answer:
            if answer["error_kind"] == "too_large":
                self.close()  # memory ran short; use a fresh worker
            return _failure(answer["error_kind"], answer["error"], seconds)
        rows = [tuple(row) for row in json.loads(b"[" + b",".join(lines) + b"]", object_hook=_blob)]
        return QueryResult(rows, tuple(answer["columns"]), None, None, seconds, answer["double_quoted_text"])

    def _start(self) -> None:
        self.close()
        environment = {"PATH": os.defpath, "MALLOC_ARENA_MAX": "1"}  # one arena, because each reserves address space
        if "LD_LIBRARY_PATH" in os.environ:  # some Python builds need it to find their own library
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        self._worker = subprocess.Popen(
            [sys.executable, "-I", "-S", str(WORKER), json.dumps(self._limits)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
        try:
            self._exchange(None, time.monotonic() + START_SECONDS)
        except (EOFError, TimeoutError):
            self.close()
            memory = self._limits["memory_bytes"] >> 20
            raise UserError(
                f"the SQL worker did not start with {memory} MiB of memory; give it more, and check that "
                f"`{sys.executable} -c 'import sqlite3'` works",
                code="sql.worker_failed",
            ) from None

    def _exchange(self, request: dict[str, Any] | None, deadline: float) -> list[bytes]:
        """Send the request, if any, and read the lines of the answer up to the JSON object that ends it.

        Raises TimeoutError after the deadline, and EOFError or BrokenPipeError if the worker has died.
        """
        assert self._worker is not None and self._worker.stdin is not None and self._worker.stdout is not None
        if request is not None:
            self._worker.stdin.write(json.dumps(request).encode() + b"\n")
            self._worker.stdin.flush()
        output = self._worker.stdout.fileno()
        received = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while not _is_complete(received):
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not selector.select(remaining):
                    raise TimeoutError
                chunk = os.read(output, READ_BYTES)
                if not chunk:
                    raise EOFError
                received += chunk
        return bytes(received).splitlines()

    def _died(self, seconds: float) -> QueryResult:
        assert self._worker is not None
        status = self._worker.wait()
        self.close()
        if status == -signal.SIGXCPU:
            return _failure("timeout", "the query used up its CPU time", seconds)
        return _failure("crashed", f"the SQL worker ended during the query (status {status})", seconds)


def ddl_of_database(path: Path) -> str:
    """The CREATE TABLE and CREATE VIEW statements of a SQLite file in order of creation, one per line, without comments.

    Raises UserError for a file that is missing, corrupt or not a SQLite file, and for one without tables.
    """
    uri = read_only_uri(path)
    try:
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            found = [on_one_line(sql) for sql in shown_statements(connection)]
    except sqlite3.Error as error:
        raise UserError(f"{path}: corrupt, or not a SQLite file ({error})", code="sql.database_corrupt") from None
    if not any(sql.upper().startswith(("CREATE TABLE", "CREATE VIRTUAL")) for sql in found):
        raise UserError(f"{path}: the database has no tables", code="sql.no_tables")
    return "\n".join(f"{sql};" for sql in found)


def read_only_uri(database: Path) -> str:
    """The URI with which SQLite opens the file without writing to it. Raises UserError if it is not a SQLite file.

    ``immutable`` avoids locks and extra files, but would ignore a write-ahead log or journal beside the file.
    """
    check_sqlite_file(database)
    path = database.resolve()
    has_log = any(path.with_name(path.name + suffix).exists() for suffix in ("-wal", "-journal"))
    return path.as_uri() + ("?mode=ro" if has_log else "?mode=ro&immutable=1")


def check_sqlite_file(path: Path) -> None:
    """Raise a UserError that names the file unless it exists and begins with SQLite's header."""
    if not path.exists():
        raise UserError(f"{path}: no such database file", code="sql.database_missing")
    if not path.is_file():
        raise UserError(f"{path}: expected a SQLite file, found a folder", code="sql.database_missing")
    try:
        with path.open("rb") as file:
            header = file.read(len(SQLITE_HEADER))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", code="file.unreadable") from None
    if header != SQLITE_HEADER:
        raise UserError(
            f"{path}: not a SQLite file" + ("; it is empty" if not header else ""), code="sql.database_corrupt"
        )


def _failure(kind: ErrorKind, message: str, seconds: float) -> QueryResult:
    return QueryResult(None, (), message, kind, seconds)


def _is_complete(received: bytearray) -> bool:
    if not received.endswith(b"\n"):
        return False
    start_of_last_line = received.rfind(b"\n", 0, len(received) - 1) + 1
    return received.startswith(b"{", start_of_last_line)


def _blob(value: dict[str, str]) -> bytes:
    return bytes.fromhex(value["blob"])
