"""The hourly price of the cloud machine that we run on.

The price comes from the launch policy's price table. The launch passes it in the environment variable FINETUNE_PRICES; machine
set-up keeps a copy in the home folder for jobs that are started later with `sky exec`. A newer table, which
budget/newest_prices.py makes of it on the machine, takes its place. If a fact about the machine is unknown (its zone, whether it
is spot), the highest price that it could have counts.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from finetune.errors import UserError, first_line
from finetune.machine import metadata
from finetune.machine.billed_time import MachineTime, machine_age
from finetune.machine.gpus import GPUS
from finetune.machine.hardware import nvidia_driver
from finetune.runtime.files import parse_json, read_text

VARIABLE = "FINETUNE_PRICES"
KEPT = Path(".finetune") / "prices.json"
"""In the home folder; written by on_machine/setup.sh."""
NEWEST = Path(".finetune") / "newest_prices.json"
"""In the home folder: {"launch": hash of the launch's table as text, "table": that table at newer prices}."""
LARGEST_LIMIT = 1_000_000
"""Largest MAX_RUN_USD (US dollars) and MAX_HOURS (hours): above that it is a slip of the keyboard."""
PLAUSIBLE_USD_PER_HOUR = (1e-4, 1e6)
"""Smallest and largest hourly price that is believed. Google's cheapest GPU machines cost cents, and its largest some hundred
dollars; the bounds keep hours = dollars / price finite."""


@dataclass(frozen=True)
class Machine:
    """What is known of this machine; None is unknown."""

    zone: str | None
    spot: bool | None
    gpu: str | None  # as in finetune.machine.gpus.GPUS
    gpus: int | None = None  # how many


@dataclass(frozen=True)
class MachinePrice:
    """US dollars per hour for the whole machine, and where the figure comes from."""

    usd_per_hour: float
    basis: str


@dataclass(frozen=True)
class Ceilings:
    """Limits that must not be exceeded; None: no such limit.

    run_usd: US dollars, hours: billed machine hours, both of a whole run with all its attempts. usd_per_hour: US dollars per
    machine hour; it is enforced when a machine is chosen (`finetune plan`), not while a run trains.
    """

    run_usd: float | None = None
    hours: float | None = None
    usd_per_hour: float | None = None


def parse_limit(text: str) -> Decimal | None:
    """A limit as people type it, such as 25 or 0.5; None unless it is a number above 0 and up to LARGEST_LIMIT."""
    if len(text) <= 40 and re.fullmatch(r"[0-9]+(\.[0-9]+)?", text, re.ASCII) and 0 < Decimal(text) <= LARGEST_LIMIT:
        return Decimal(text)
    return None


def machine_price() -> MachinePrice | None:
    """The price of this machine; None if no price table came with the launch, such as on a laptop.

    Queries the metadata server; without one each query takes about a second. Raises UserError for a table that cannot be read.
    """
    table = _table()
    return price_in(table, this_machine()) if table is not None else None


def dearest_usd_per_hour() -> float | None:
    """The highest hourly price of the machines on which the launch may continue after this one, in US dollars; None without a
    price table. Raises UserError for a table that cannot be read."""
    table = _table()
    return max(offer["usd_per_hour"] for offer in table["offers"]) if table is not None else None


@dataclass(frozen=True)
class TooDear:
    """Why this machine is above `max_hourly_cost` by the newest prices. everywhere: so is every other machine of the launch."""

    reason: str
    everywhere: bool


def too_dear() -> TooDear | None:
    """Whether this machine is above the ceiling of its launch by now; None if not, or if nothing newer than the launch is known.
    If a fact about the machine is unknown, only if each machine that it may be is. Raises UserError like `machine_price`."""
    table = _table()
    if table is None:
        return None
    machine = this_machine()
    fits = _fitting(table, machine)
    if not fits or not all(offer.get("too_dear") for offer in fits):
        return None
    price = price_in(table, machine)
    return TooDear(
        f"above max_hourly_cost ({fits[0]['too_dear']}): ${price.usd_per_hour:g}/h, {price.basis}",
        all(offer.get("too_dear") for offer in table["offers"]),
    )


def provisioned() -> bool:
    """Whether our launch policy started this machine, so that it is billed from its boot."""
    return _table_text() is not None


def price_in(table: dict[str, Any], machine: Machine) -> MachinePrice:
    """The highest price among the table's offers that match this machine; the ceiling itself if none does."""
    fits = _fitting(table, machine)
    unknown = [name for name in ("zone", "spot", "gpu") if getattr(machine, name) is None]
    if not fits:
        dearest = max(offer["usd_per_hour"] for offer in table["offers"])
        price = max(dearest, table["ceiling_usd_per_hour"] or 0.0)
        return MachinePrice(price, "the ceiling of the launch, because this machine is not in its price table")
    prices = {offer["usd_per_hour"] for offer in fits}
    caveat = f" (the dearest that fits: {', '.join(unknown)} unknown)" if unknown and len(prices) > 1 else ""
    dearest_fit = max(fits, key=lambda offer: float(offer["usd_per_hour"]))
    return MachinePrice(dearest_fit["usd_per_hour"], str(dearest_fit.get("basis") or table["basis"]) + caveat)


def _fitting(table: dict[str, Any], machine: Machine) -> list[dict[str, Any]]:
    return [
        offer
        for offer in table["offers"]
        if machine.zone in (None, offer["zone"])
        and machine.spot in (None, offer["spot"])
        and machine.gpu in (None, offer["gpu"])
        and machine.gpus in (None, offer.get("count", machine.gpus))
    ]


def this_machine() -> Machine:
    """Zone, spot and GPUs, from SkyPilot's environment, Google's metadata server and nvidia-smi."""
    driver = nvidia_driver()
    gpu = driver.gpu if driver else None
    preemptible = metadata.value("scheduling/preemptible")
    return Machine(
        zone=_zone(),
        spot=None if preemptible is None else preemptible.upper() == "TRUE",
        gpu=gpu_of(gpu.name) if gpu else None,
        gpus=gpu.count if gpu else None,
    )


def facts() -> dict[str, str | bool | int | None]:
    """For the ledger: zone, spot, gpu and gpus as in `this_machine`, Google's id and name of the machine; None is unknown."""
    return {**vars(this_machine()), "id": metadata.value("id"), "name": metadata.value("name")}


def gpu_of(name: str) -> str | None:
    """The name in GPUS for a GPU name of nvidia-smi, such as 'Tesla V100-SXM2-16GB'; None if it is not known."""
    words = name.upper().replace("-", " ").split()
    for known in sorted(GPUS.values(), key=lambda gpu: len(gpu.words), reverse=True):  # A100-80GB before A100
        if set(known.words) <= set(words):
            return known.name
    return None


def wall_hours(price: MachinePrice | None, ceilings: Ceilings, *, of_machine: bool = False) -> float | None:
    """Hours for which a run may continue from now: what its dollars buy at this price, less the machine's boot, set-up and idle
    hours that no run has been billed for, but at most its hours. None: no limit. of_machine: the dollars are for the machine,
    so that all its uptime counts, whoever has paid for it."""
    limits = [] if ceilings.hours is None else [ceilings.hours]
    if price is not None and ceilings.run_usd is not None:
        used = machine_age() or 0.0 if of_machine else MachineTime(provisioned=True).seconds()
        limits.append(max(0.0, ceilings.run_usd / price.usd_per_hour - used / 3600))
    return min(limits, default=None)


def _table_text() -> tuple[str, str] | None:
    """The price table as text, and where it was found."""
    text = os.environ.get(VARIABLE)
    if text:
        return text, VARIABLE
    kept = Path.home() / KEPT
    try:
        return read_text(kept), str(kept)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{kept}: not readable ({first_line(error)}); launch again", code="price.bad_table") from error


def launch_table() -> tuple[dict[str, Any], str] | None:
    """The price table of the launch, and a hash of its text; None if no table came with the launch. Raises UserError for one that
    cannot be read."""
    found = _table_text()
    if found is None:
        return None
    text, place = found
    try:
        table = _checked(parse_json(text))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{place}: not a price table of our launch policy ({error!r}); launch again", code="price.bad_table"
        ) from error
    if not table["offers"]:
        raise UserError(f"{place}: a price table without offers; launch again", code="price.bad_table")
    return table, hashlib.sha256(text.encode(errors="replace")).hexdigest()


def _table() -> dict[str, Any] | None:
    found = launch_table()
    return None if found is None else newest_table(found[1]) or found[0]


def newest_table(launch: str) -> dict[str, Any] | None:
    """The newer table that was made of a launch's; None if there is none that can be used. launch: hash of the launch's."""
    try:
        kept = parse_json(read_text(Path.home() / NEWEST))
        table = _checked(kept["table"])
        return table if kept["launch"] == launch and table["offers"] else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _checked(table: Any) -> dict[str, Any]:
    """Raises ValueError, KeyError or TypeError for anything that is no price table."""
    offers = [
        {**offer, "usd_per_hour": _believable(offer["usd_per_hour"])}
        for offer in table["offers"]
        if {"zone", "spot", "gpu"} <= set(offer)
    ]
    ceiling = table["ceiling_usd_per_hour"]
    return {
        **table,
        "basis": str(table["basis"]),
        "ceiling_usd_per_hour": None if ceiling is None else _believable(ceiling),
        "offers": offers,
    }


def _believable(value: Any) -> float:
    """US dollars per hour. Raises ValueError for a price at which a run would cost nothing, or that is no number."""
    usd = float(value)
    lowest, highest = PLAUSIBLE_USD_PER_HOUR
    if isinstance(value, bool) or not lowest <= usd <= highest:
        raise ValueError(f"a price of {usd:g} US dollars per hour")
    return usd


def _zone() -> str | None:
    try:
        zone = parse_json(os.environ.get("SKYPILOT_CLUSTER_INFO", "{}")).get("zone")
    except (ValueError, AttributeError):
        zone = None
    if zone:
        return str(zone)
    answer = metadata.value("zone")  # projects/NUMBER/zones/us-central1-a
    return answer.rsplit("/", 1)[-1] if answer else None
