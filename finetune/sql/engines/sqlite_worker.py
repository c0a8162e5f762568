"""The child process of `sqlite.SqlSandbox`. Standard library only, and `confinement.py`.

Reads JSON objects from stdin, one per line: first the settings (parent, memory_bytes, temp_bytes, max_result_bytes,
readable), then one request for each query (uri, sql, names_only, timeout_seconds, max_rows). Answers each with an empty line when
it begins, one JSON array per row with a comma between them, and one JSON object that ends the answer, with the columns or the
error. BLOBs are encoded as {"blob": "<hex>"}; a path is the text of its bytes in Latin-1, so that no locale can change it.
"""

import contextlib
import json
import math
import os
import resource
import select
import sqlite3
import sys
import threading
import time
from typing import Any

from finetune.sql.engines.confinement import confine, end_with_parent

READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
FORBIDDEN_FUNCTIONS = {"load_extension", "fts3_tokenizer", "readfile", "writefile", "edit"}
PRAGMAS_OF_FULL_TEXT_SEARCH = {"data_version", "page_size"}
CHANGING = {sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE}
ACTION_NAMES = {
    sqlite3.SQLITE_INSERT: "INSERT",
    sqlite3.SQLITE_UPDATE: "UPDATE",
    sqlite3.SQLITE_DELETE: "DELETE",
    sqlite3.SQLITE_ATTACH: "ATTACH",
    sqlite3.SQLITE_DETACH: "DETACH",
    sqlite3.SQLITE_PRAGMA: "PRAGMA",
    sqlite3.SQLITE_TRANSACTION: "a transaction",
    sqlite3.SQLITE_SAVEPOINT: "a transaction",
}
ERROR_KINDS = {
    sqlite3.SQLITE_TOOBIG: "too_large",
    sqlite3.SQLITE_NOMEM: "too_large",
    sqlite3.SQLITE_CORRUPT: "bad_database",
    sqlite3.SQLITE_NOTADB: "bad_database",
    sqlite3.SQLITE_IOERR: "bad_database",
    sqlite3.SQLITE_BUSY: "in_use",
    sqlite3.SQLITE_LOCKED: "in_use",
}
WRITING_FAILED = {
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_TRUNCATE,
    sqlite3.SQLITE_IOERR_FSYNC,
    sqlite3.SQLITE_IOERR_DELETE,
    25 << 8 | sqlite3.SQLITE_IOERR,  # SQLITE_IOERR_GETTEMPPATH, which Python does not name
}
"""Only temporary files are written, so these errors are about them."""
ENDED_PARENT_SECONDS = 1.0
LONGEST_SECONDS = 1e9
LONGEST_VALUE_BYTES = 1_000_000_000
"""SQLite's own default limit (SQLITE_MAX_LENGTH)."""


class TooLarge(Exception):
    """The answer exceeds a size limit."""


def main() -> None:
    settings = json.loads(sys.stdin.buffer.readline())
    end_with_parent(settings["parent"])
    limit_resources(settings["memory_bytes"], settings["temp_bytes"])
    time.localtime()  # the C library reads the time zone once
    layers = confine((path.encode("latin-1") for path in settings["readable"]), os.environb[b"SQLITE_TMPDIR"])
    threading.Thread(target=watch_parent, args=(settings["parent"],), daemon=True).start()
    send({"ready": True, "layers": layers})
    for line in sys.stdin.buffer:
        os.write(1, b"\n")  # if this process dies from now on, the query may be the reason
        request = json.loads(line)
        allow_cpu_seconds(request["timeout_seconds"])
        send(answer(request, settings))


def limit_resources(memory_bytes: int, temp_bytes: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: temp_bytes,
        resource.RLIMIT_NOFILE: 16,
        resource.RLIMIT_CORE: 0,
    }
    for which, value in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS refuses RLIMIT_AS
            resource.setrlimit(which, (value, value))


def allow_cpu_seconds(seconds: float) -> None:
    """Set the CPU limit to the time used so far plus this query's time. SIGXCPU ends a runaway worker."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(time.process_time() + min(seconds, LONGEST_SECONDS)) + 1
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def watch_parent(parent: int) -> None:
    """Ends this process with its parent, even during a query: when nothing can write to stdin any more, or, where the kernel does
    not do it (see confinement.end_with_parent), when this process has another parent."""
    stdin = select.poll()
    stdin.register(0, 0)  # reports the end of the pipe only
    while not stdin.poll(ENDED_PARENT_SECONDS * 1000) and os.getppid() == parent:
        pass
    os._exit(0)


def send(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def answer(request: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    denied: list[str] = []
    connection = None
    try:
        connection = open_read_only(request["uri"], denied, settings)
        return send_rows(connection, request, settings["max_result_bytes"])
    except (TooLarge, MemoryError) as error:
        return failure("too_large", str(error) or "the query ran out of memory")
    except Exception as error:
        if "one statement at a time" in str(error):
            return failure("forbidden", "more than one statement")
        if denied:
            return failure("forbidden", f"{denied[0]} is not allowed: a query may only read")
        return database_failure(error, opened=connection is not None, temp_bytes=settings["temp_bytes"])
    finally:
        if connection is not None:
            connection.close()


def database_failure(error: Exception, *, opened: bool, temp_bytes: int) -> dict[str, Any]:
    """The failure for an error of SQLite. opened: whether the database was open, so that other files are meant."""
    code = getattr(error, "sqlite_errorcode", 0)
    primary = code & 0xFF
    if code == sqlite3.SQLITE_IOERR_NOMEM:
        return failure("too_large", "the query ran out of memory")
    if primary == sqlite3.SQLITE_FULL or code in WRITING_FAILED:
        return failure(
            "too_large", f"the query needs a temporary file of more than {temp_bytes >> 20:,} MiB, or the disk is full"
        )
    if primary == sqlite3.SQLITE_CANTOPEN:
        more = "the query needs more temporary files than it may open"
        return failure("too_large", more) if opened else failure("bad_database", str(error))
    return failure(ERROR_KINDS.get(primary, "sql_error"), str(error))


def failure(kind: str, message: str) -> dict[str, Any]:
    return {"error_kind": kind, "error": " ".join(message.split())}


def open_read_only(uri: str, denied: list[str], settings: dict[str, Any]) -> sqlite3.Connection:
    """A fresh connection, so that no query can affect the next one."""
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, cached_statements=0)
    connection.text_factory = lambda raw: raw.decode("utf-8", "backslashreplace")
    connection.execute(f"PRAGMA temp_store = {'FILE' if settings['temp_bytes'] else 'MEMORY'}")
    connection.execute("PRAGMA trusted_schema = OFF")
    if sys.version_info >= (3, 12):  # some builds of SQLite disable it
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_DQS_DML, True)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, min(settings["max_result_bytes"], LONGEST_VALUE_BYTES))
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)

    def authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
        refusal = refused(action, first, second)
        if refusal is None:
            return sqlite3.SQLITE_OK
        denied.append(refusal)
        return sqlite3.SQLITE_DENY

    connection.set_authorizer(authorize)
    return connection


def refused(action: int, first: str | None, second: str | None) -> str | None:
    """The forbidden action that the statement tried, or None. Codes: https://sqlite.org/c3ref/c_alter_table.html."""
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in FORBIDDEN_FUNCTIONS:
        return f"the function {second}"
    if action in READING:
        return None
    if action == sqlite3.SQLITE_PRAGMA and first in PRAGMAS_OF_FULL_TEXT_SEARCH and second is None:
        return None
    if action in CHANGING and first in ("sqlite_master", "sqlite_temp_master"):
        # SQLite reports this UPDATE to the authorizer, without executing it, when a query opens json_each or a virtual table.
        return None if action == sqlite3.SQLITE_UPDATE else "changing the schema"
    return ACTION_NAMES.get(action, "changing the schema")


def send_rows(connection: sqlite3.Connection, request: dict[str, Any], max_result_bytes: int) -> dict[str, Any]:
    double_quoted_text = request["names_only"] is not None and not prepares(connection, request["names_only"])
    cursor = connection.execute(request["sql"])
    if cursor.description is None:
        return failure("sql_error", "no SQL statement to run")
    encode = json.JSONEncoder(default=lambda blob: {"blob": blob.hex()}).encode
    rows = sent = 0
    for row in cursor:
        text = encode(row)
        rows, sent = rows + 1, sent + len(text)
        if rows > request["max_rows"]:
            raise TooLarge(f"the result has more than {request['max_rows']:,} rows")
        if sent > max_result_bytes:
            raise TooLarge(f"the result is larger than {max_result_bytes:,} bytes")
        sys.stdout.write(f"{text}\n" if rows == 1 else f",{text}\n")
    return {"columns": [column[0] for column in cursor.description], "double_quoted_text": double_quoted_text}


def prepares(connection: sqlite3.Connection, sql: str) -> bool:
    try:
        connection.execute("EXPLAIN " + sql).close()
    except sqlite3.Error:
        return False
    return True
