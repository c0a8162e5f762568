"""Google's APIs on this computer, for the real gcloud."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import threading
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class GoogleHandler(http.server.BaseHTTPRequestHandler):
    """Sends what `answer` says."""

    @abstractmethod
    def answer(self) -> tuple[int, Any]:
        """Status code and JSON for this request."""

    def do_GET(self) -> None:
        code, value = self.answer()
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def google_for_gcloud(handler: type[GoogleHandler], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The installed gcloud, logged in with a made-up token, asks `handler`. Skips the test where it is not installed."""
    if shutil.which("gcloud") is None:
        pytest.skip("gcloud is not installed")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    (folder / "token").write_text("made-up")
    for name in [name for name in os.environ if name.startswith("CLOUDSDK_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(folder))
    monkeypatch.setenv("CLOUDSDK_AUTH_ACCESS_TOKEN_FILE", str(folder / "token"))
    monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE", f"{address}/compute/v1/")
    monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE", f"{address}/storage/v1/")
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
