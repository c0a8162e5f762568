"""Fetching the newest catalog: whole and in time, or not at all, whatever the server does."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from finetune.cloud.catalog import fetch
from finetune.cloud.catalog.csv_file import SCHEMA, VMS
from finetune.cloud.catalog.fetch import URLS, VARIABLE, fetch_prices
from tests.helpers.catalog_fixture import HEADER, gpu, host, needs_skypilot
from tests.helpers.errors import raises

GOOD = "\n".join([HEADER, host("us-central1-a"), gpu("us-central1-a"), ""]).encode()
PAGE = b"<!DOCTYPE html>\n<html><body>404: Not Found</body></html>\n"
Answer = Callable[[BaseHTTPRequestHandler], object]


def sends(body: bytes, status: int = 200, length: int | None = None) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def trickles(handler: BaseHTTPRequestHandler) -> None:
    """A byte every tenth of a second: no single wait is long."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(GOOD)))
    handler.end_headers()
    for byte in GOOD:
        handler.wfile.write(bytes([byte]))
        time.sleep(0.1)


def says_nothing(_: BaseHTTPRequestHandler) -> None:
    time.sleep(3)


def unending(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(64):
        handler.wfile.write(b"x" * 65536)


def half_a_chunk(handler: BaseHTTPRequestHandler) -> None:
    """Ends at a line's end, so that the file alone does not show it."""
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"%x\r\n" % (2 * len(GOOD)) + GOOD)


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                answer(self)
            except OSError:
                pass  # the client has had enough

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/{SCHEMA}/{VMS}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_whole_file_is_read() -> None:
    with serving(sends(GOOD)) as url:
        rows = fetch_prices((url,))
    assert rows.gpus["A100", 1]["us-central1-a"].spot_usd == 1.0
    assert rows.hosts["a2-highgpu-1g"]["us-central1-a"].usd == 0.5


def test_the_mirror_is_asked_when_the_first_place_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(sends(PAGE, 429)) as first, serving(sends(GOOD)) as mirror:
        assert fetch_prices((first, mirror)).gpus
        monkeypatch.setenv(VARIABLE, mirror)
        assert fetch_prices().gpus


@pytest.mark.parametrize(
    ("answer", "code", "says"),
    [
        (sends(PAGE, 404), "catalog.not_fetched", "HTTP status 404"),
        (sends(b"", 500), "catalog.not_fetched", "HTTP status 500"),
        (sends(PAGE), "catalog.corrupt", "no column"),
        (sends(b""), "catalog.corrupt", "empty"),
        (sends(GOOD[:-5]), "catalog.corrupt", "truncated"),
        (sends(GOOD, length=2 * len(GOOD)), "catalog.not_fetched", "cut off"),
        (half_a_chunk, "catalog.not_fetched", "could not be fetched"),
        (sends(GOOD.replace(b"SpotPrice", b"Spot_Price")), "catalog.corrupt", "no column SpotPrice"),
        (sends(f"{HEADER}\n{gpu('us-central1-a', 'nan')}\n".encode()), "catalog.corrupt", "Price is 'nan'"),
        (sends(f"{HEADER}\n{gpu('us-central1-a', 3, -1)}\n".encode()), "catalog.corrupt", "SpotPrice is '-1'"),
        (sends(f"{HEADER}\n{gpu('us-central1-a', 'inf')}\n".encode()), "catalog.corrupt", "Price is 'inf'"),
        (sends(f"{HEADER}\n{host('us-central1-a')},9\n".encode()), "catalog.corrupt", "11 values for 10 columns"),
        (sends(f"{HEADER}\n".encode()), "catalog.corrupt", "holds no prices"),
        (sends(bytes(range(256)) * 8), "catalog.corrupt", "not UTF-8"),
    ],
)  # fmt: skip
def test_what_is_not_the_whole_file_is_not_believed(answer: Answer, code: str, says: str) -> None:
    with serving(answer) as url, raises(code, match=f"{says}.*the prices of the launch count"):
        fetch_prices((url,))


@pytest.mark.parametrize("answer", [trickles, says_nothing])
def test_a_slow_server_is_not_waited_for(answer: Answer) -> None:
    with serving(answer) as url:
        began = time.monotonic()
        with raises("catalog.not_fetched", match=r"no answer in 0\.5 s|too slow|timed out"):
            fetch_prices((url, url), seconds=0.5)
        assert time.monotonic() - began < 1.5


def test_a_file_without_end_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MOST_BYTES", 1 << 20)
    with serving(unending) as url, raises("catalog.not_fetched", match="more than 1 MiB"):
        fetch_prices((url,))


def test_nobody_there() -> None:
    with raises("catalog.not_fetched", match="refused"):
        fetch_prices(("http://127.0.0.1:9/vms.csv",))  # the discard port


@needs_skypilot
def test_the_places_are_those_of_skypilot() -> None:
    spec = find_spec("sky")  # its constants are read, because importing it takes seconds
    assert spec and spec.origin
    text = (Path(spec.origin).parent / "skylet" / "constants.py").read_text(encoding="utf-8")

    def constant(name: str) -> str:
        (value,) = re.findall(rf"^{name} = '([^']+)'", text, re.MULTILINE)
        return str(value)

    schema = constant("CATALOG_SCHEMA_VERSION")
    names = ("HOSTED_CATALOG_DIR_URL", "HOSTED_CATALOG_DIR_URL_S3_MIRROR")
    assert tuple(f"{constant(name)}/{schema}/{VMS}" for name in names) == URLS
