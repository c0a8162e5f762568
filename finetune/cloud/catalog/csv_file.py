"""Reads the files of SkyPilot's price catalog: their location, download time and content.

Does not import SkyPilot, which takes seconds; reading the file takes a fraction of one.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import NamedTuple

from finetune.errors import UserError
from finetune.runtime.files import read_bytes

SCHEMA = "v8"
"""SkyPilot 0.14's version of the catalog (CATALOG_SCHEMA_VERSION in its skylet/constants.py)."""
VMS = "gcp/vms.csv"
ACCELERATORS = "common/accelerators.csv"
COLUMNS = (
    *("InstanceType", "vCPUs", "MemoryGiB", "AcceleratorName", "AcceleratorCount"),
    *("Region", "AvailabilityZone", "Price", "SpotPrice"),
)
REMEDY = "delete the file; `sky gpus list --cloud gcp` fetches it again"


class Row(NamedTuple):
    """A host, or GPUs, in one zone. Prices in US dollars per hour, None if not sold. vcpus and memory_gib: of hosts only."""

    region: str
    zone: str
    usd: float | None
    spot_usd: float | None
    vcpus: float
    memory_gib: float

    def price(self, spot: bool) -> float | None:
        return self.spot_usd if spot else self.usd


@dataclass(frozen=True)
class PriceRows:
    """All rows by product, then by zone. A GPU machine costs the sum of its host's and its GPUs' row in a zone."""

    hosts: dict[str, dict[str, Row]] = field(default_factory=dict)
    gpus: dict[tuple[str, int], dict[str, Row]] = field(default_factory=dict)


def skypilot_folder() -> Path:
    """The folder of SkyPilot's catalog: under SKY_RUNTIME_DIR if that is set, else under the home directory."""
    return Path(os.environ.get("SKY_RUNTIME_DIR", "~")).expanduser() / ".sky" / "catalogs" / SCHEMA


def read_prices(folder: Path) -> tuple[PriceRows, datetime | None]:
    """The prices of Google Cloud in a catalog folder, and when SkyPilot fetched them, None if unknown.

    Raises FileNotFoundError if there is no file, and UserError with file and line if it is truncated, lacks a column or has an
    invalid price: an incomplete price list may lack the prices that matter.
    """
    path = folder / VMS
    content = _read(path)
    return prices_of(content, str(path)), _fetched(folder, content)


def prices_of(content: bytes, path: str, remedy: str = REMEDY) -> PriceRows:
    """The prices in the content of such a file. path, remedy: for messages. Raises UserError like `read_prices`."""
    rows = PriceRows()
    for place, values in _lines(path, content, remedy):
        try:
            _add(rows, values)
        except ValueError as error:
            raise UserError(f"{place}: {error}; {remedy}", code="catalog.corrupt") from None
    if not rows.hosts and not rows.gpus:
        raise UserError(f"{path}: holds no prices; {remedy}", code="catalog.corrupt")
    return rows


def read_clouds(folder: Path) -> dict[str, list[str]]:
    """GPU name -> the clouds that have it, from a catalog folder; empty if there is no such file."""
    try:
        text = _read(folder / ACCELERATORS).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return {}
    try:
        return {row[0]: re.findall(r"'([^']*)'", row[1]) for row in csv.reader(io.StringIO(text)) if len(row) == 2}
    except csv.Error:  # a NUL character, or a cell without an end
        return {}


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(
            f"{path}: not readable ({error.strerror}); fix that, or {REMEDY}", code="file.unreadable"
        ) from error


def _lines(path: str, content: bytes, remedy: str) -> Iterator[tuple[str, list[str]]]:
    """(file and line, values of COLUMNS) of each row."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: line {content[: error.start].count(10) + 1}: not UTF-8; {remedy}", code="catalog.corrupt"
        ) from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        if not text.strip():
            raise UserError(f"{path}: empty; {remedy}", code="catalog.corrupt")
        header = next(reader)
        missing = [name for name in COLUMNS if name not in header]
        if missing:
            raise UserError(f"{path}: line 1: no column {', '.join(missing)}; {remedy}", code="catalog.corrupt")
        if not text.endswith(("\n", "\r")):  # the last digits of a price may be missing
            last = len(text.splitlines())
            raise UserError(
                f"{path}: line {last}: the file is truncated, its last line has no line end; {remedy}",
                code="catalog.corrupt",
            )
        indices = [header.index(name) for name in COLUMNS]
        for row in filter(None, reader):  # skips empty lines
            if len(row) != len(header):
                raise UserError(
                    f"{path}: line {reader.line_num}: {len(row)} values for {len(header)} columns; {remedy}",
                    code="catalog.corrupt",
                )
            yield f"{path}: line {reader.line_num}", [row[index] for index in indices]
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: {error}; {remedy}", code="catalog.corrupt") from None


def _add(rows: PriceRows, values: list[str]) -> None:
    """Add a row, given as values of COLUMNS. Raises ValueError for an invalid value."""
    host, vcpus, memory, gpu, count, region, zone, usd, spot_usd = values
    if not region or not zone:
        raise ValueError("no Region or no AvailabilityZone")
    row = Row(
        region,
        zone,
        _number("Price", usd),
        _number("SpotPrice", spot_usd),
        _number("vCPUs", vcpus) or 0.0,
        _number("MemoryGiB", memory) or 0.0,
    )
    if host:
        _add_row(rows.hosts.setdefault(host, {}), row)
    if gpu:
        number = _number("AcceleratorCount", count)
        if not number or number != int(number):
            raise ValueError(f"AcceleratorCount is {count!r}, expected a whole number")
        _add_row(rows.gpus.setdefault((gpu, int(number)), {}), row)


def _add_row(zones: dict[str, Row], row: Row) -> None:
    """Add a row. The real catalog lists some products twice in a zone; if their prices differ, the higher one is used."""
    known = zones.get(row.zone)
    if known is not None:
        row = row._replace(usd=_higher(known.usd, row.usd), spot_usd=_higher(known.spot_usd, row.spot_usd))
    zones[row.zone] = row


def _higher(one: float | None, other: float | None) -> float | None:
    return max((usd for usd in (one, other) if usd is not None), default=None)


@cache
def _number(column: str, text: str) -> float | None:
    """A number of zero or more, None for an empty cell."""
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"{column} is {text!r}, expected a number of zero or more")
    return number


def _fetched(folder: Path, content: bytes) -> datetime | None:
    """When SkyPilot downloaded the file with this content; None if SkyPilot did not download it.

    SkyPilot writes the file's MD5 into .meta/ at a download. The file's own modification time is not reliable: SkyPilot updates
    it when a refresh fails. Another MD5, or none, means that the file was put there by hand.
    """
    note = folder / ".meta" / f"{VMS}.md5"
    try:
        if note.read_text(encoding="utf-8").strip() != hashlib.md5(content, usedforsecurity=False).hexdigest():
            return None
        return datetime.fromtimestamp(note.stat().st_mtime, UTC)
    except (OSError, ValueError):
        return None
