"""A client of Google's metadata server, which tells a machine about itself.

https://docs.cloud.google.com/compute/docs/metadata/querying-metadata: plain HTTP at a link-local address. A request carries the
header `Metadata-Flavor: Google`, and so does a genuine response; `wait_for_change` delays the response until the value changes.
"""

from __future__ import annotations

import http.client
import os
import socket
from dataclasses import dataclass
from urllib.parse import quote, urlencode

HOST_VARIABLE = "GCE_METADATA_HOST"
"""host or host:port of another server, as Google's own client libraries read it."""
HOST = "169.254.169.254"
FLAVOR = ("Metadata-Flavor", "Google")
CONNECT_SECONDS = 1.0
"""Outside of Google Cloud no server is there."""
LATE_SECONDS = 3.0
"""How late a response may be, for example on a busy machine."""
OK = 200


@dataclass(frozen=True)
class Answer:
    """status: of HTTP, 0 if no metadata server responded. value, etag: "" unless status is OK."""

    status: int
    value: str = ""
    etag: str = ""


NO_RESPONSE = Answer(0)


class Client:
    """Sends one request at a time; another thread may cancel it."""

    def __init__(self) -> None:
        self._connection: http.client.HTTPConnection | None = None
        self._cancelled = False

    def ask(self, key: str, *, last_etag: str = "", wait_seconds: int = 0) -> Answer:
        """The value of `instance/KEY`; with wait_seconds, as soon as its etag differs from last_etag, or after that time.

        Raises nothing: an `Answer` also stands for a busy server and a dropped connection.
        """
        path = f"/computeMetadata/v1/instance/{quote(key)}"
        if wait_seconds:
            query = {"wait_for_change": "true", "timeout_sec": wait_seconds} | (
                {"last_etag": last_etag} if last_etag else {}
            )
            path = f"{path}?{urlencode(query)}"
        try:
            return self._get(path, wait_seconds + LATE_SECONDS)
        except (OSError, http.client.HTTPException, ValueError):
            return NO_RESPONSE
        finally:
            self._connection = None

    def cancel(self) -> None:
        """Ends the current request and every later one with NO_RESPONSE."""
        self._cancelled = True
        connection = self._connection
        open_socket = connection.sock if connection else None
        if open_socket is not None:
            try:
                open_socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _get(self, path: str, timeout: float) -> Answer:
        connection = http.client.HTTPConnection(os.environ.get(HOST_VARIABLE) or HOST, timeout=CONNECT_SECONDS)
        try:
            connection.connect()
            connection.sock.settimeout(timeout)
            self._connection = connection
            if self._cancelled:
                return NO_RESPONSE
            connection.request("GET", path, headers=dict([FLAVOR]))
            response = connection.getresponse()
            text = response.read().decode("utf-8").strip()
            if response.status != OK:
                return Answer(response.status)
            if response.headers.get(FLAVOR[0]) != FLAVOR[1]:  # another cloud has its server at the same address
                return NO_RESPONSE
            return Answer(OK, text, response.headers.get("ETag", ""))
        finally:
            connection.close()


def value(key: str) -> str | None:
    """One value, such as `zone`; None if the server does not know it, or outside of Google Cloud, after one second at most."""
    answer = Client().ask(key)
    return answer.value if answer.status == OK else None
