"""Questions to Google's metadata server, which tells a machine about itself.

https://docs.cloud.google.com/compute/docs/metadata/querying-metadata: plain HTTP at a link-local address; a question carries
`Metadata-Flavor: Google`, and so does a true answer; `wait_for_change` holds an answer back until the value is another one.
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
"""Off Google Cloud nobody is there."""
PATIENCE_SECONDS = 3.0
"""For which an answer may be late, as on a machine that is busy."""
OK = 200


@dataclass(frozen=True)
class Answer:
    """status: HTTP's, 0 where no metadata server answered. value, etag: "" unless status is OK."""

    status: int
    value: str = ""
    etag: str = ""


NO_RESPONSE = Answer(0)


class Client:
    """Asks one question at a time; another thread may hang up in the middle of one."""

    def __init__(self) -> None:
        self._connection: http.client.HTTPConnection | None = None
        self._hung_up = False

    def ask(self, key: str, *, last_etag: str = "", wait_seconds: int = 0) -> Answer:
        """The value of `instance/KEY`, at once; with wait_seconds as soon as it is not the one of last_etag, or after that time.

        Raises nothing: a server that is busy, or cuts the line, is an answer too.
        """
        path = f"/computeMetadata/v1/instance/{quote(key)}"
        if wait_seconds:
            query = {"wait_for_change": "true", "timeout_sec": wait_seconds} | (
                {"last_etag": last_etag} if last_etag else {}
            )
            path = f"{path}?{urlencode(query)}"
        try:
            return self._get(path, wait_seconds + PATIENCE_SECONDS)
        except (OSError, http.client.HTTPException, ValueError):
            return NO_RESPONSE
        finally:
            self._connection = None

    def cancel(self) -> None:
        """Ends the question that is being asked, and every later one, with nobody's answer."""
        self._hung_up = True
        connection = self._connection
        line = connection.sock if connection else None
        if line is not None:
            try:
                line.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _get(self, path: str, timeout: float) -> Answer:
        connection = http.client.HTTPConnection(os.environ.get(HOST_VARIABLE) or HOST, timeout=CONNECT_SECONDS)
        try:
            connection.connect()
            connection.sock.settimeout(timeout)
            self._connection = connection
            if self._hung_up:
                return NO_RESPONSE
            connection.request("GET", path, headers=dict([FLAVOR]))
            response = connection.getresponse()
            text = response.read().decode("utf-8").strip()
            if response.status != OK:
                return Answer(response.status)
            if response.headers.get(FLAVOR[0]) != FLAVOR[1]:  # another cloud's server lives at the same address
                return NO_RESPONSE
            return Answer(OK, text, response.headers.get("ETag", ""))
        finally:
            connection.close()


def value(key: str) -> str | None:
    """One value, such as `zone`; None off Google Cloud and where the server does not know. Off it takes a second at most."""
    answer = Client().ask(key)
    return answer.value if answer.status == OK else None
