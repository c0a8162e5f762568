"""The metadata server of one emulated machine, at its true address inside the machine's own network."""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.helpers.metadata_server import MetadataServer, etag

ADDRESS = "169.254.169.254"
CLONE_NEWNET = 0x40000000


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """The socket is bound already."""
        self.server_name, self.server_port = ADDRESS, 80

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


class MachineMetadata:
    """values: what it knows under instance/; `set` changes one and answers whoever waits for it."""

    def __init__(self, **values: str) -> None:
        self.state = MetadataServer(**values)
        self._server: ThreadingHTTPServer | None = None

    def set(self, key: str, value: str) -> None:
        self.state.set(key, value)

    def start(self, init: int) -> None:
        """Listens in the network namespace of process `init`, whose lo has the address."""
        listening = socket_inside(init)
        self._server = _Server((ADDRESS, 80), self._handler(), bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = listening
        self._server.server_bind()
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        server, self._server = self._server, None
        if server:
            server.shutdown()
            server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        state = self.state

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, text = state.answer(self.path, self.headers)
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


def socket_inside(init: int) -> socket.socket:
    """A listening socket in another network namespace: a thread enters it, makes the socket, and ends."""
    made: list[socket.socket] = []
    failed: list[OSError] = []

    def enter() -> None:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            namespace = os.open(f"/proc/{init}/ns/net", os.O_RDONLY)
            try:
                if libc.setns(namespace, CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
            finally:
                os.close(namespace)
            listening = socket.socket()
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((ADDRESS, 80))
            listening.listen(16)
            made.append(listening)
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]
