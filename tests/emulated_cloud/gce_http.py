"""The HTTP side of the emulated Google Cloud: routes, injected faults, and the format of Google's answers."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Json = dict[str, Any]


class ApiError(Exception):
    """An error as an answer. status: HTTP status; reason: Google's short name of it, such as quotaExceeded."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason, self.message = status, reason, message

    def body(self) -> Json:
        detail = {
            "message": self.message,
            "domain": "usageLimits" if self.status in (403, 429) else "global",
            "reason": self.reason,
        }
        return {"error": {"code": self.status, "message": self.message, "errors": [detail]}}


def not_found(what: str) -> ApiError:
    """what: the resource, by its path."""
    return ApiError(404, "notFound", f"The resource '{what}' was not found")


@dataclass(frozen=True)
class Call:
    """A request. at: seconds since the epoch; body: the decoded JSON, {} without one."""

    at: float
    method: str
    path: str
    query: dict[str, str]
    body: Json


@dataclass
class Fault:
    """An error instead of the real answer. times: how often, None: always; until: seconds since the epoch."""

    where: re.Pattern[str]
    error: ApiError
    times: int | None = None
    until: float | None = None

    def strikes(self, call: Call) -> bool:
        if self.until is not None and call.at > self.until:
            return False
        if self.times == 0 or not self.where.search(f"{call.method} {call.path}"):
            return False
        if self.times is not None:
            self.times -= 1
        return True


@dataclass
class Faults:
    """Faults that a test injects. latency: seconds added to every answer."""

    latency: float = 0.0
    planned: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(
        self,
        where: str,
        status: int,
        reason: str,
        message: str = "",
        *,
        times: int | None = None,
        seconds: float | None = None,
    ) -> None:
        """Args:
        where: a regular expression to search for in "METHOD /path", such as r"bulkInsert" or r"^GET .*/instances".
        status, reason: such as 503 backendError, 429 rateLimitExceeded, 403 forbidden.
        times, seconds: how often, and for how long from now; with neither, until `clear`.
        """
        until = time.time() + seconds if seconds is not None else None
        error = ApiError(status, reason, message or f"{reason}, injected by a test")
        with self.lock:
            self.planned.append(Fault(re.compile(where), error, times, until))

    def clear(self) -> None:
        with self.lock:
            self.planned.clear()
            self.latency = 0.0

    def check(self, call: Call) -> None:
        """Raises the ApiError of a fault that applies to the call."""
        if self.latency:
            time.sleep(self.latency)
        with self.lock:
            for fault in self.planned:
                if fault.strikes(call):
                    raise fault.error


Handler = Callable[..., Json | str]
"""Takes the call and the named parts of its route; returns the answer's JSON, or a file's text, or raises ApiError."""


def route(method: str, pattern: str) -> tuple[str, re.Pattern[str]]:
    """pattern: a path with {names}, each of which matches one segment."""
    parts = re.split(r"\{(\w+)\}", pattern)
    return method, re.compile(
        "".join(f"(?P<{part}>[^/:]+)" if at % 2 else re.escape(part) for at, part in enumerate(parts))
    )


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a client that disconnects is normal."""


class ApiServer:
    """Serves routes in its own threads until `stop`. calls: all requests, in order; defects: those that it could not answer,
    because they are not implemented or because the emulation has a bug."""

    def __init__(
        self, address: tuple[str, int], routes: list[tuple[tuple[str, re.Pattern[str]], Handler]], faults: Faults
    ) -> None:
        self.routes, self.faults = routes, faults
        self.calls: list[Call] = []
        self.defects: list[str] = []
        self._server = _Server(address, self._handler())
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, call: Call) -> tuple[int, Json | str]:
        self.calls.append(call)
        try:
            self.faults.check(call)
            for (method, pattern), handler in self.routes:
                found = pattern.fullmatch(call.path) if method == call.method else None
                if found:
                    return 200, handler(call, **{name: unquote(text) for name, text in found.groupdict().items()})
            raise ApiError(501, "notImplemented", f"the emulated Google Cloud does not know {call.method} {call.path}")
        except ApiError as error:
            if error.status == HTTPStatus.NOT_IMPLEMENTED:
                self.defects.append(error.message)
            return error.status, error.body()
        except Exception as error:
            self.defects.append(f"{call.method} {call.path}: {error!r}")
            return 500, ApiError(500, "internalError", f"emulated cloud: {error!r}").body()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handling(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                parts = urlsplit(self.path)
                query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                call = Call(time.time(), self.command, parts.path, query, json.loads(data) if data.strip() else {})
                status, body = outer.answer(call)
                text = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(status)
                kind = "text/plain" if isinstance(body, str) else "application/json"
                self.send_header("Content-Type", f"{kind}; charset=UTF-8")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(text)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = handle_one

            def log_message(self, *_: object) -> None: ...

        return Handling
