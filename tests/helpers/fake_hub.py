"""A Hugging Face hub of this process: what creating a repository and uploading a folder need, as the real one speaks it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_test_token_that_no_message_shows"


@dataclass
class FakeHub:
    """private: of each repository; files: name -> content, by repository. refuse: the status of every request but /whoami."""

    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refuse: int | None = None


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _answer(self, value: Any, status: int = 200) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _allowed(self) -> bool:
            status = 401 if self.headers.get("Authorization") != f"Bearer {TOKEN}" else hub.refuse
            if status:
                self._answer({"error": f"refused with {status}"}, status)
            return status is None

        def do_GET(self) -> None:
            if self._allowed() and self.path.startswith("/api/models/"):
                name = "/".join(self.path.split("/")[3:5]).partition("?")[0]
                self._answer({"id": name, "private": hub.private[name], "sha": "0" * 40, "siblings": []})

        def do_PUT(self) -> None:  # the store of large files, whose address is its own permission
            hub.blobs[self.path.rpartition("/")[2]] = self._body()
            self._answer({})

        def do_POST(self) -> None:
            body = self._body()
            if not self._allowed():
                return
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                known = name in hub.private
                hub.private.setdefault(name, asked.get("private", asked.get("visibility") == "private"))
                self._answer({"url": f"{hub.url}/{name}", "error": "exists"}, 409 if known else 200)
            elif self.path == "/api/validate-yaml":
                self._answer({"errors": [], "warnings": []})
            elif self.path.endswith("/info/lfs/objects/batch"):
                objects = json.loads(body)["objects"]
                actions = [{**o, "actions": {"upload": {"href": f"{hub.url}/blob/{o['oid']}"}}} for o in objects]
                self._answer({"transfer": "basic", "objects": actions})
            elif "/preupload/" in self.path:
                found = [
                    {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".gguf")) else "regular",
                     "shouldIgnore": False, "oid": None}
                    for f in json.loads(body)["files"]
                ]  # fmt: skip
                self._answer({"files": found})
            elif "/commit/" in self.path:
                self._commit("/".join(self.path.split("/")[3:5]), body)
            else:
                self._answer({"error": f"no {self.path}"}, 404)

        def _commit(self, name: str, body: bytes) -> None:
            files = hub.files.setdefault(name, {})
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.messages.append(value["summary"])
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
            self._answer({"commitUrl": f"{hub.url}/{name}/commit/1", "commitOid": "1" * 40, "success": True})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
