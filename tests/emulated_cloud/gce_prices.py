"""What the emulated cloud's machines cost: the price catalog that SkyPilot's maintainers publish, whose prices may change."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from finetune.cloud.catalog.csv_file import SCHEMA, VMS
from tests.helpers.catalog_fixture import CATALOG

PATH = f"/catalogs/{SCHEMA}/{VMS}"
Row = dict[str, str]


def published(home: Path) -> PriceList:
    """What SkyPilot's catalog in a home folder says, as if it had never been otherwise."""
    return PriceList([(0.0, (home / CATALOG / VMS).read_text(encoding="utf-8"))])


@dataclass
class PriceList:
    """versions: (since when, in seconds since the epoch; the CSV file), oldest first."""

    versions: list[tuple[float, str]] = field(default_factory=list)

    @property
    def text(self) -> str:
        """As it is published now."""
        return self.versions[-1][1] if self.versions else ""

    def reset(self, text: str | None = None) -> None:
        """To these prices, or to the first ones, as if they had never been others."""
        self.versions[:] = [(0.0, text)] if text is not None else self.versions[:1]

    def change(self, covers: Callable[[Row], bool], column: str, usd: float) -> None:
        """Publishes a catalog with this price for the rows that are covered; machines cost it from now on."""
        rows = self.rows()
        changed = [row for row in rows if covers(row)]
        assert changed, "no row of the catalog has that price"
        for row in changed:
            row[column] = f"{usd:.6f}"
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self.versions.append((time.time(), file.getvalue()))

    def raise_spot_gpu(self, gpu: str, zone: str, usd: float) -> None:
        """usd: per hour of the GPU alone, on a spot machine of that zone."""
        self.change(
            lambda row: (
                row["AcceleratorName"] == gpu
                and not row["InstanceType"]
                and row["AcceleratorCount"] in ("1", "1.0")
                and row["AvailabilityZone"] == zone
            ),
            "SpotPrice",
            usd,
        )

    def rows(self, at: float | None = None) -> list[Row]:
        """Of the catalog at that time; without one, now."""
        text = next((text for since, text in reversed(self.versions) if at is None or since <= at), self.versions[0][1])
        return list(csv.DictReader(io.StringIO(text)))

    def spans(self, began: float, ended: float) -> list[tuple[float, float]]:
        """(begin, end) of the parts of a time in which no price changed."""
        marks = [began, *(since for since, _ in self.versions if began < since < ended), ended]
        return list(pairwise(marks))
