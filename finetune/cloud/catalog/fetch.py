"""Fetches SkyPilot's published price catalog where SkyPilot is not installed: on a machine that prices itself again.

The same file from the same places as SkyPilot (read_catalog in its catalog/common.py), and believed only if it is whole. It is
bounded in seconds and bytes, because nothing waits for it and nothing may fail for lack of it.
"""

from __future__ import annotations

import http.client
import os
import threading
import time
import urllib.error
import urllib.request

from finetune.cloud.catalog.csv_file import SCHEMA, VMS, PriceRows, prices_of
from finetune.errors import UserError, first_line

URLS = tuple(
    f"{place}/{SCHEMA}/{VMS}"
    for place in (
        "https://raw.githubusercontent.com/skypilot-org/skypilot-catalog/master/catalogs",
        "https://skypilot-catalog.s3.us-east-1.amazonaws.com/catalogs",
    )
)
"""SkyPilot 0.14's HOSTED_CATALOG_DIR_URL and its mirror (skylet/constants.py); the mirror is asked if the first has none."""
VARIABLE = "FINETUNE_CATALOG_URL"
"""Environment variable with the address of the file instead, for machines that reach a mirror and not the internet."""
SECONDS = 10.0
"""For all of it: names, connections, both places, every byte. The file has about 2 MB."""
MOST_BYTES = 64 << 20
CHUNK_BYTES = 1 << 16
REMEDY = "the prices of the launch count"


def fetch_prices(urls: tuple[str, ...] | None = None, seconds: float = SECONDS) -> PriceRows:
    """The newest prices of Google Cloud. urls: instead of VARIABLE's or URLS. seconds: after which it gives up, whatever a server
    does.

    Raises UserError if no place has the file in time, and for one that is cut off or not as `csv_file.read_prices` expects it.
    """
    places = urls or ((os.environ[VARIABLE],) if os.environ.get(VARIABLE) else URLS)
    answer: list[bytes] = []
    faults: list[str] = []
    ends = time.monotonic() + seconds

    def ask() -> None:
        for url in places:
            try:
                answer.append(_download(url, ends))
                return
            except (OSError, ValueError, http.client.HTTPException) as error:
                faults.append(_why(error))

    asking = threading.Thread(
        target=ask, name="price catalog", daemon=True
    )  # a name server may hold it longer than a timeout
    asking.start()
    asking.join(max(0.0, ends - time.monotonic()))
    if not answer:
        why = f"no answer in {seconds:g} s" if asking.is_alive() or not faults else faults[-1]
        raise UserError(f"SkyPilot's catalog could not be fetched ({why}); {REMEDY}", code="catalog.not_fetched")
    return prices_of(answer[0], "SkyPilot's catalog, as fetched", REMEDY)


def _download(url: str, ends: float) -> bytes:
    """ends: in monotonic seconds. Raises OSError, ValueError or HTTPException unless the file comes whole before that."""
    request = urllib.request.Request(url, headers={"User-Agent": "finetune"})
    with urllib.request.urlopen(request, timeout=_left(ends)) as response:
        parts, size = [], 0
        while part := response.read1(CHUNK_BYTES):
            parts.append(part)
            size += len(part)
            if size > MOST_BYTES:
                raise ValueError(f"more than {MOST_BYTES >> 20} MiB")
            _left(ends)
        announced = response.headers.get("Content-Length")
        if announced is not None and announced != str(size):
            raise ValueError(f"cut off after {size} of {announced[:20]} bytes")
        return b"".join(parts)


def _left(ends: float) -> float:
    left = ends - time.monotonic()
    if left <= 0:
        raise TimeoutError("too slow")
    return left


def _why(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP status {error.code}"
    reason = getattr(error, "reason", None)  # of URLError
    return first_line(reason if isinstance(reason, Exception) else error)
