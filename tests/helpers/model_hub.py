"""A model hub on this computer: one model of one commit, answered as huggingface_hub asks."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAME, COMMIT = "some-org/tiny", "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """asked: method and path of every request."""

    url: str
    asked: list[str] = field(default_factory=list)


@contextmanager
def model_hub(folder: Path, address: tuple[str, int] = ("127.0.0.1", 0)) -> Iterator[Hub]:
    """folder: the files of the model, without folders below it."""
    hub = Hub("")
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    class Answers(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            resolve = f"/{NAME}/resolve/{COMMIT}/"
            if self.path.startswith(f"/api/models/{NAME}/revision/"):
                rows = [{"rfilename": name} for name in sorted(files)]
                self._send(json.dumps({"id": NAME, "sha": COMMIT, "siblings": rows}).encode(), "api", body)
            elif self.path.startswith(resolve) and (name := self.path.removeprefix(resolve).split("?")[0]) in files:
                self._send(files[name], hashlib.sha256(files[name]).hexdigest(), body)
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", "0")
                self.end_headers()

        def _send(self, content: bytes, tag: str, body: bool) -> None:
            self.send_response(200)
            for key, value in (("Content-Length", str(len(content))), ("ETag", f'"{tag}"'), ("X-Repo-Commit", COMMIT)):
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(address, Answers)
    hub.url = f"http://{server.server_address[0]!s}:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
