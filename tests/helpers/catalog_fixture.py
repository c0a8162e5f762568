"""A complete price catalog as SkyPilot lays it out, for tests that run the real SkyPilot without network, and for ours."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import pytest

from finetune.cloud.catalog.csv_file import VMS
from finetune.cloud.catalog.offers import SNAPSHOT

CATALOG = Path(".sky") / "catalogs" / "v8"
HEADER = "InstanceType,vCPUs,MemoryGiB,AcceleratorName,AcceleratorCount,GpuInfo,Region,AvailabilityZone,Price,SpotPrice"

IMAGES = """\
Tag,Region,OS,OSVersion,ImageId,CreationDate,BaseImageId
skypilot:custom-cpu-ubuntu-2204,,ubuntu,22.04,projects/sky-dev-465/global/images/skypilot-gcp-cpu-ubuntu-241030,20241030,
skypilot:custom-gpu-ubuntu-2204,,ubuntu,22.04,projects/sky-dev-465/global/images/skypilot-gcp-gpu-ubuntu-241030,20241030,
skypilot:custom-gpu-ubuntu-2204-cuda13,,ubuntu,22.04,projects/sky-dev-465/global/images/skypilot-gcp-gpu-ubuntu-260603,20260603,
skypilot:k80-debian-10,,debian,10,projects/deeplearning-platform-release/global/images/common-cu113-v20220701,20220701,
"""
"""The images that SkyPilot 0.14 takes by default for a CPU machine, for V100 and older, and for newer GPUs (clouds/gcp.py)."""
MEMORY_GB = {
    "A100": 40,
    "A100-80GB": 80,
    "L4": 24,
    "T4": 16,
    "V100": 16,
    "H100": 80,
    "H200": 141,
    "B200": 180,
    "A10": 24,
}
MEMORY_GB["RTXPRO6000"] = 96
QUOTAS = {"A100": "A100", "A100-80GB": "A100_80GB", "L4": "L4", "T4": "T4", "V100": "V100", "H100": "H100"}
"""GPU -> its part of the names of Google's quotas."""

needs_skypilot = pytest.mark.skipif(
    getattr(importlib.util.find_spec("sky"), "origin", None) is None,  # our folder sky/ alone has no origin
    reason="SkyPilot is not installed (extra `cloud`)",
)


def shared_catalog() -> Path | None:
    """The folder v8 of the shared slice of the catalog, with more regions and machines; None where it is not there."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "skypilot_catalog" / "v8"
    return folder if folder.is_dir() else None


def lay_out_catalog(
    home: Path, *, source: Path | None = None, fetched: datetime | None = None, more: Iterable[str] = ()
) -> None:
    """Write home/.sky/catalogs/v8 so that SkyPilot loads it without asking the network.

    source: another folder v8 for prices and GPU names (`shared_catalog`) instead of our snapshot. fetched: as if SkyPilot had
    downloaded it then; without it as if put there by hand, and SkyPilot never fetches a newer one. more: lines of prices besides.
    """
    folder = home / CATALOG
    shutil.copytree(source or SNAPSHOT, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
    with (folder / VMS).open("a", encoding="utf-8") as prices:
        prices.writelines(f"{line}\n" for line in more)
    (folder / "gcp" / "images.csv").write_text(IMAGES, encoding="utf-8")
    metadata = [f"{gpu},nvidia,{memory}" for gpu, memory in MEMORY_GB.items()]
    _write(folder / "common" / "metadata.csv", "GPU,Manufacturer,MemoryGB", metadata)
    quotas = [f"{gpu},NVIDIA_{code}_GPUS,PREEMPTIBLE_NVIDIA_{code}_GPUS" for gpu, code in QUOTAS.items()]
    quota_columns = "Accelerator,OnDemandInstanceCode,SpotInstanceCode"
    _write(folder / "gcp" / "accelerator_quota_mapping.csv", quota_columns, quotas)
    if fetched:
        note = folder / ".meta" / f"{VMS}.md5"
        note.parent.mkdir(parents=True)
        note.write_text(hashlib.md5((folder / VMS).read_bytes()).hexdigest(), encoding="utf-8")
        os.utime(note, (fetched.timestamp(), fetched.timestamp()))


def write_prices(home: Path, lines: list[str]) -> Path:
    """A vms.csv of these rows under home, and nothing else. Returns its path."""
    path = home / CATALOG / VMS
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, HEADER, lines)
    return path


def host(zone: str, usd: object = 0.5, spot: object = 0.2, machine: str = "a2-highgpu-1g") -> str:
    """A line of a host in a zone, the region taken from the zone's name."""
    return f"{machine},12.0,85.0,,,,{zone.rpartition('-')[0]},{zone},{usd},{spot}"


def gpu(zone: str, usd: object = 3.0, spot: object = 1.0, name: str = "A100", count: int = 1) -> str:
    """A line of GPUs in a zone."""
    return f",,,{name},{count},,{zone.rpartition('-')[0]},{zone},{usd},{spot}"


G4 = [
    *(
        host(zone, 1.2, 0.5, "g4-standard-48").replace("12.0,85.0", "48.0,180.0")
        for zone in ("us-central1-b", "us-east5-a")
    ),
    *(gpu(zone, 3.3, 1.4, "RTXPRO6000") for zone in ("us-central1-b", "us-east5-a")),
]
"""An RTX PRO 6000 at invented prices: no catalog that we have lists it, though SkyPilot 0.14 fetches its price."""


def price_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of a folder v8 as the csv module gives them."""
    with (folder / VMS).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, header: str, lines: list[str]) -> None:
    path.write_text("\n".join([header, *lines, ""]), encoding="utf-8")
