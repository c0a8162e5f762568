"""Google's metadata server as far as our code asks it, on a port of this machine.

As documented at https://docs.cloud.google.com/compute/docs/metadata/querying-metadata: a question without
`Metadata-Flavor: Google`, or one that was forwarded, is refused with 403; every answer carries the header and an ETag;
`wait_for_change=true` holds the answer back until the value's ETag is not `last_etag` (without it: not the present one), or for
`timeout_sec`, then the present value comes.

    with MetadataServer() as server:            # GCE_METADATA_HOST=server.host
        server.set("preempted", "TRUE")
"""

from __future__ import annotations

import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

PREFIX = "/computeMetadata/v1/instance/"
VALUES = {
    "id": "4520031799277581759",
    "name": "train-1",
    "zone": "projects/123456789/zones/us-central1-a",
    "scheduling/preemptible": "TRUE",
    "preempted": "FALSE",
    "maintenance-event": "NONE",
}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


class MetadataServer:
    """values: what it knows under instance/. asked: the paths of all questions so far."""

    def __init__(self, **values: str) -> None:
        self.values = VALUES | values
        self.asked: list[str] = []
        self._changed = threading.Condition()
        self._broken: list[int] = []
        self._port = 0
        self._server: _Server | None = None

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._port}"

    def set(self, key: str, value: str) -> None:
        with self._changed:
            self.values[key] = value
            self._changed.notify_all()

    def forget(self, *keys: str) -> None:
        for key in keys:
            self.values.pop(key, None)

    def break_next(self, *statuses: int) -> None:
        """The next questions get these HTTP statuses instead of an answer; 0 drops the line."""
        with self._changed:
            self._broken += statuses

    def start(self) -> None:
        """On the same port as before, if there was one."""
        self._server = _Server(("127.0.0.1", self._port), self._handler())
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Held back questions are dropped, too."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            with self._changed:
                self._changed.notify_all()

    def __enter__(self) -> MetadataServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def answer(self, path: str, headers: Any) -> tuple[int, str]:
        """Status and text for a question; waits where the question asks for it. Status 0: no answer, the line is dropped."""
        self.asked.append(path)
        parts = urlsplit(path)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        if headers.get("Metadata-Flavor") != "Google" or headers.get("X-Forwarded-For"):
            return 403, 'Missing required header "Metadata-Flavor": "Google"'
        with self._changed:
            if self._broken:
                return self._broken.pop(0), ""
            key = parts.path.removeprefix(PREFIX)
            if key not in self.values or not parts.path.startswith(PREFIX):
                return 404, ""
            if query.get("wait_for_change", "").lower() == "true":
                server = self._server
                self._wait(key, query.get("last_etag") or etag(self.values[key]), float(query.get("timeout_sec", 3600)))
                if self._server is not server:
                    return 0, ""
            return (self._broken.pop(0), "") if self._broken else (200, self.values[key])

    def _wait(self, key: str, known: str, seconds: float) -> None:
        server, until = self._server, time.monotonic() + seconds
        while etag(self.values[key]) == known and self._server is server and not self._broken:
            if not self._changed.wait(max(0.0, until - time.monotonic())):
                return

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, text = outer.answer(self.path, self.headers)
                if status == 0:
                    self.close_connection = True
                    return
                self.send_response(status)
                self.send_header("Metadata-Flavor", "Google")
                self.send_header("Content-Type", "application/text")
                self.send_header("Content-Length", str(len(text)))
                if status == 200:
                    self.send_header("ETag", etag(text))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None: ...

        return Handler


def etag(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()[:16]
