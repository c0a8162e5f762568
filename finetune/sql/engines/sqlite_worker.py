"""The child process of `sqlite.SqlSandbox`: `python -I -S sql/engines/sqlite_worker.py LIMITS`. Standard library only.

Reads one JSON object per line from stdin: uri, sql, names_only, timeout_seconds, max_rows. Writes one JSON array per row,
then one JSON object that ends the answer, with the columns or the error. BLOBs are encoded as {"blob": "<hex>"}.
"""

import contextlib
import json
import math
import os
import queue
import resource
import sqlite3
import sys
import threading
import time
from typing import Any

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
    sqlite3.SQLITE_CANTOPEN: "bad_database",
}


class TooLarge(Exception):
    """The answer exceeds a size limit."""


def main() -> None:
    limits = json.loads(sys.argv[1])
    limit_resources(limits["memory_bytes"])
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=read_requests, args=(requests,), daemon=True).start()
    send({"ready": True})
    while True:
        request = requests.get()
        allow_cpu_seconds(request["timeout_seconds"])
        send(answer(request, limits["max_result_bytes"]))


def limit_resources(memory_bytes: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 16,
        resource.RLIMIT_CORE: 0,
    }
    for which, value in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS refuses RLIMIT_AS
            resource.setrlimit(which, (value, value))


def allow_cpu_seconds(seconds: float) -> None:
    """Set the CPU limit to the time used so far plus this query's time. SIGXCPU ends a runaway worker."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(time.process_time() + seconds) + 1
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def read_requests(requests: "queue.SimpleQueue[dict[str, Any]]") -> None:
    """Runs in its own thread, so that this process ends with its parent, even during a query."""
    for line in sys.stdin.buffer:
        requests.put(json.loads(line))
    os._exit(0)


def send(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def answer(request: dict[str, Any], max_result_bytes: int) -> dict[str, Any]:
    denied: list[str] = []
    try:
        connection = open_read_only(request["uri"], denied, max_result_bytes)
        try:
            return send_rows(connection, request, max_result_bytes)
        finally:
            connection.close()
    except (TooLarge, MemoryError) as error:
        return failure("too_large", str(error) or "the query ran out of memory")
    except Exception as error:
        if "one statement at a time" in str(error):
            return failure("forbidden", "more than one statement")
        if denied:
            return failure("forbidden", f"{denied[0]} is not allowed: a query may only read")
        kind = ERROR_KINDS.get(getattr(error, "sqlite_errorcode", 0) & 0xFF, "sql_error")
        return failure(kind, str(error))


def failure(kind: str, message: str) -> dict[str, Any]:
    return {"error_kind": kind, "error": " ".join(message.split())}


def open_read_only(uri: str, denied: list[str], max_result_bytes: int) -> sqlite3.Connection:
    """A fresh connection, so that no query can affect the next one."""
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, cached_statements=0)
    connection.text_factory = lambda raw: raw.decode("utf-8", "backslashreplace")
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute("PRAGMA trusted_schema = OFF")
    if sys.version_info >= (3, 12):  # some builds of SQLite disable it
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_DQS_DML, True)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, max_result_bytes)
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
        sys.stdout.write(text + "\n")
    return {"columns": [column[0] for column in cursor.description], "double_quoted_text": double_quoted_text}


def prepares(connection: sqlite3.Connection, sql: str) -> bool:
    try:
        connection.execute("EXPLAIN " + sql).close()
    except sqlite3.Error:
        return False
    return True


if __name__ == "__main__":
    main()
