"""What the rented machine that we run on costs an hour, from the price table that the launch policy handed over.

The table travels as the environment variable FINETUNE_PRICES; machine set-up keeps a copy of it in the home folder, for
jobs that come later by `sky exec`. Where a fact about the machine is not known (its zone, whether it is spot), the dearest
price that it could have counts.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.gpus import GPUS
from finetune.hardware import nvidia_driver

VARIABLE = "FINETUNE_PRICES"
KEPT = Path(".finetune") / "prices.json"
"""In the home folder; written by tools/machine_setup.sh."""
METADATA_SECONDS = 1.0


@dataclass(frozen=True)
class Machine:
    """This machine as far as it can be told; None is unknown."""

    zone: str | None
    spot: bool | None
    gpu: str | None  # as in finetune.gpus.GPUS


@dataclass(frozen=True)
class MachinePrice:
    """US dollars per hour for the whole machine, and where the figure comes from."""

    usd_per_hour: float
    basis: str


def machine_price() -> MachinePrice | None:
    """The price of this machine; None where no price table came with the launch, such as on a laptop.

    Asks the metadata server for at most METADATA_SECONDS a question. Raises UserError for a table that cannot be read.
    """
    table = _table()
    return price_in(table, this_machine()) if table is not None else None


def price_in(table: dict[str, Any], machine: Machine) -> MachinePrice:
    """The dearest price among the table's offers that this machine may be; the ceiling itself when it is none of them."""
    fits = [
        offer["usd_per_hour"]
        for offer in table["offers"]
        if machine.zone in (None, offer["zone"])
        and machine.spot in (None, offer["spot"])
        and machine.gpu in (None, offer["gpu"])
    ]
    unknown = [name for name, value in vars(machine).items() if value is None]
    if not fits:
        dearest = max(offer["usd_per_hour"] for offer in table["offers"])
        price = max(dearest, table["ceiling_usd_per_hour"] or 0.0)
        return MachinePrice(price, "the ceiling of the launch, because this machine is not in its price table")
    doubt = f" (the dearest that fits: {', '.join(unknown)} unknown)" if unknown and len(set(fits)) > 1 else ""
    return MachinePrice(max(fits), table["basis"] + doubt)


def this_machine() -> Machine:
    """Zone, spot and GPU, from SkyPilot's environment, Google's metadata server and nvidia-smi."""
    driver = nvidia_driver()
    preemptible = _metadata("scheduling/preemptible")
    return Machine(
        zone=_zone(),
        spot=None if preemptible is None else preemptible.upper() == "TRUE",
        gpu=gpu_of(driver.gpu.name) if driver and driver.gpu else None,
    )


def gpu_of(name: str) -> str | None:
    """The name in GPUS for what nvidia-smi calls a GPU, such as 'Tesla V100-SXM2-16GB'."""
    words = name.upper().replace("-", " ").split()
    for known in sorted(GPUS, key=len, reverse=True):  # A100-80GB before A100
        if all(word in words for word in known.upper().split("-")):
            return known
    return None


def wall_hours(price: MachinePrice | None, *, max_run_usd: float | None, max_hours: float | None) -> float | None:
    """Hours for which a run may go on from now: what its dollars buy at this price, less the machine's uptime, which is
    on the meter too, but never more than max_hours. None: no limit."""
    limits = [] if max_hours is None else [max_hours]
    if price is not None and max_run_usd is not None:
        limits.append(max(0.0, max_run_usd / price.usd_per_hour - _uptime_hours()))
    return min(limits, default=None)


def _table() -> dict[str, Any] | None:
    text, place = os.environ.get(VARIABLE), VARIABLE
    if not text:
        kept = Path.home() / KEPT
        if not kept.is_file():
            return None
        text, place = kept.read_text(encoding="utf-8"), str(kept)
    try:
        table = json.loads(text)
        offers = [
            {**offer, "usd_per_hour": float(offer["usd_per_hour"])}
            for offer in table["offers"]
            if {"zone", "spot", "gpu"} <= set(offer)
        ]
        ceiling = table["ceiling_usd_per_hour"]
        checked = {"basis": str(table["basis"]), "ceiling_usd_per_hour": None if ceiling is None else float(ceiling)}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{place}: not a price table of our launch policy ({error!r}); launch again") from error
    if not offers:
        raise UserError(f"{place}: a price table without offers; launch again")
    return {**checked, "offers": offers}


def _zone() -> str | None:
    try:
        zone = json.loads(os.environ.get("SKYPILOT_CLUSTER_INFO", "{}")).get("zone")
    except (ValueError, AttributeError):
        zone = None
    if zone:
        return str(zone)
    answer = _metadata("zone")  # projects/NUMBER/zones/us-central1-a
    return answer.rsplit("/", 1)[-1] if answer else None


def _metadata(key: str) -> str | None:
    """One value of Google's metadata server; None off Google Cloud."""
    host = os.environ.get("GCE_METADATA_HOST", "169.254.169.254")
    request = urllib.request.Request(  # a fixed scheme and host
        f"http://{host}/computeMetadata/v1/instance/{key}", headers={"Metadata-Flavor": "Google"}
    )
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=METADATA_SECONDS) as response:
            return str(response.read().decode()).strip()
    except (urllib.error.URLError, OSError, ValueError):
        return None


def _uptime_hours() -> float:
    try:
        return float(Path("/proc/uptime").read_text(encoding="ascii").split()[0]) / 3600
    except (OSError, ValueError, IndexError):
        return 0.0
