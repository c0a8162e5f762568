"""The client of the metadata server: as Google documents it, and with misbehaving servers and networks."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from finetune.machine import metadata
from finetune.machine.metadata import NO_RESPONSE, Client, value
from tests.helpers.metadata_server import PREFIX, MetadataServer, etag


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MetadataServer]:
    with MetadataServer() as server:
        monkeypatch.setenv(metadata.HOST_VARIABLE, server.host)
        yield server


def test_the_fake_server_refuses_what_google_refuses(server: MetadataServer) -> None:
    def status(path: str, headers: dict[str, str]) -> int:
        connection = http.client.HTTPConnection(server.host, timeout=5)
        connection.request("GET", path, headers=headers)
        return connection.getresponse().status

    flavor = {"Metadata-Flavor": "Google"}
    assert status(f"{PREFIX}zone", flavor) == 200
    assert status(f"{PREFIX}zone", {}) == 403
    assert status(f"{PREFIX}zone", flavor | {"X-Forwarded-For": "10.0.0.1"}) == 403
    assert status(f"{PREFIX}nonsense", flavor) == 404


def test_a_value(server: MetadataServer) -> None:
    assert value("scheduling/preemptible") == "TRUE"
    assert value("nonsense") is None
    assert Client().ask("id") == metadata.Answer(200, server.values["id"], etag(server.values["id"]))


def test_a_response_is_delayed_until_the_value_changes(server: MetadataServer) -> None:
    threading.Timer(0.3, server.set, ("preempted", "TRUE")).start()
    began = time.monotonic()
    answer = Client().ask("preempted", last_etag=etag("FALSE"), wait_seconds=30)
    assert (answer.value, answer.etag) == ("TRUE", etag("TRUE"))
    assert 0.2 < time.monotonic() - began < 5


def test_a_change_before_the_request_is_reported_at_once(server: MetadataServer) -> None:
    server.set("preempted", "TRUE")
    began = time.monotonic()
    assert Client().ask("preempted", last_etag=etag("FALSE"), wait_seconds=30).value == "TRUE"
    assert time.monotonic() - began < 5


def test_when_nothing_changes_the_current_value_comes_after_the_timeout(server: MetadataServer) -> None:
    began = time.monotonic()
    assert Client().ask("preempted", last_etag=etag("FALSE"), wait_seconds=1).value == "FALSE"
    assert 0.9 < time.monotonic() - began < 5


def test_cancel_ends_a_request_and_all_later_ones(server: MetadataServer) -> None:
    client = Client()
    threading.Timer(0.3, client.cancel).start()
    began = time.monotonic()
    assert client.ask("preempted", last_etag=etag("FALSE"), wait_seconds=60) == NO_RESPONSE
    assert time.monotonic() - began < 5
    assert client.ask("preempted") == NO_RESPONSE


def test_faults_are_returned_as_answers(server: MetadataServer) -> None:
    server.break_next(503, 0)
    assert Client().ask("zone").status == 503
    assert Client().ask("zone") == NO_RESPONSE  # dropped
    assert value("zone")
    server.stop()
    assert Client().ask("zone") == NO_RESPONSE


@pytest.mark.parametrize("host", ["127.0.0.1:9", "127.0.0.1:port", "no.such.host.invalid", "["])
def test_outside_of_google_cloud_there_is_no_response(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(metadata.HOST_VARIABLE, host)
    assert Client().ask("zone") == NO_RESPONSE and value("zone") is None


def test_a_proxy_is_never_used(server: MetadataServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert value("zone")


@contextmanager
def raw_server(reply: bytes) -> Iterator[str]:
    """Sends these bytes on the first connection, whatever the request."""
    connections: list[socket.socket] = []

    def serve() -> None:
        connection, _ = listener.accept()
        connections.append(connection)
        connection.recv(4096)
        connection.sendall(reply)
        if reply:
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()
    for connection in connections:
        connection.close()


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nTRUE",  # another cloud's server: no Metadata-Flavor
        b"HTTP/1.1 200 OK\r\nMetadata-Flavor: Google\r\nContent-Length: 400\r\n\r\nTRUE",  # cut off
        b"\x00\x01garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nMetadata-Flavor: Google\r\nContent-Length: 2\r\n\r\n\xff\xfe",
        b"",  # never responds
    ],
)
def test_another_server_counts_as_no_response(reply: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with raw_server(reply) as host:
        monkeypatch.setenv(metadata.HOST_VARIABLE, host)
        began = time.monotonic()
        assert Client().ask("preempted") == NO_RESPONSE
        assert time.monotonic() - began < metadata.LATE_SECONDS + 2
