"""What a machine with a GPU costs on Google Cloud in each zone: host + GPU + disk, and which prices are anomalies.

The prices come from SkyPilot's catalog on this disk, and are the same as SkyPilot's own; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from statistics import median
from typing import NamedTuple

from finetune.cloud.catalog.csv_file import (
    ACCELERATORS,
    REMEDY,
    VMS,
    PriceRows,
    Row,
    read_clouds,
    read_prices,
    skypilot_folder,
)
from finetune.cloud.catalog.disks import disk_usd_per_hour, local_ssd_usd_per_hour
from finetune.cloud.catalog.machine_types import N1_LIMITS, NOT_ON_DEMAND, OWN_MACHINES, check_machine, fits
from finetune.errors import UserError
from finetune.runtime.installed import install_command

__all__ = ["Catalog", "Offer", "disk_usd_per_hour", "load_catalog", "refresh_catalog"]

SNAPSHOT = Path(__file__).parent / "snapshot" / "v8"
SNAPSHOT_SOURCE = (
    "OUR OLD SNAPSHOT of SkyPilot's catalog (commit 8427bbff, a day in 2026 that is not known, copied on 2026-11-22; "
    "8 regions), PRICES MAY HAVE CHANGED; `sky gpus list --cloud gcp` fetches current ones"
)
REFRESH_HOURS = 7
"""The age after which SkyPilot 0.14 fetches Google's prices again (_PULL_FREQUENCY_HOURS in its catalog/gcp_catalog.py)."""
IMPLAUSIBLE = 0.6
"""A price below this share of the median over all regions is an anomaly. List prices of one GPU differ by less: in Google's price
list of July 2026 an A100 machine in the most expensive region costs 1.6 times the cheapest."""


@dataclass(frozen=True)
class Offer:
    """One machine in one zone, in US dollars per hour: host and GPU by the catalog, the disk by list price."""

    gpu: str
    count: int
    machine: str
    region: str
    zone: str
    spot: bool
    host_usd: float
    gpu_usd: float
    disk_usd: float
    anomalies: tuple[str, ...] = ()  # one short clause, with the numbers, for each reason to doubt the price

    @property
    def usd_per_hour(self) -> float:
        return self.host_usd + self.gpu_usd + self.disk_usd


class _Pair(NamedTuple):
    """The two rows that make up a machine in one zone."""

    host: Row
    gpu: Row


@dataclass(frozen=True)
class Catalog:
    """source: where the prices come from and how old they are, as one line of text. fetched: None if unknown."""

    source: str
    is_snapshot: bool
    fetched: datetime | None
    rows: PriceRows = field(repr=False, compare=False)
    clouds: Mapping[str, list[str]] = field(repr=False, compare=False)  # GPU -> the clouds that have it

    def offers(
        self, gpu: str, *, machine: str, count: int = 1, spot: bool | None = None, disk_gib: int = 200,
        disk_tier: str = "medium", region: str | None = None, zone: str | None = None,
    ) -> list[Offer]:  # fmt: skip
        """One offer for every zone that sells the machine with its GPUs, cheapest first; spot None: spot and on-demand.

        gpu, region and zone are case-insensitive. A zone without a host or without such a price has no offer, and neither has a
        machine type on demand that Google does not sell so (machine_types.NOT_ON_DEMAND). Raises UserError
        for a GPU that is unknown or not on Google Cloud, a machine type that does not have it, a place that does not have it, and
        a disk that cannot be priced.
        """
        name = self.gpu_name(gpu)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UserError(
                f"{name}: expected a positive whole number of GPUs, found {count!r}", code="cloud.bad_gpu_count"
            )
        hosts = self.rows.hosts.get(machine, {})
        check_machine(name, count, machine, _size(hosts))
        gpus = self.rows.gpus.get((name, count), {})
        if not gpus or not hosts:
            raise UserError(
                f"{machine if gpus else f'{name}:{count}'}: {self._name} has no price for it", code="price.unknown"
            )
        _check_place(name, gpus.values(), region, zone)
        pairs = [_Pair(hosts[place], row) for place, row in gpus.items() if place in hosts]
        found = []
        kinds = (True, False) if spot is None else (spot,)
        for kind in kinds if machine not in NOT_ON_DEMAND else {True} & set(kinds):
            check = _price_check(pairs, kind)
            for pair in pairs:
                host_usd, gpu_usd = pair.host.price(kind), pair.gpu.price(kind)
                if host_usd is None or gpu_usd is None or not _is_in(pair.gpu, region, zone):
                    continue
                disk_usd = disk_usd_per_hour(disk_gib, disk_tier, pair.gpu.region, machine)
                disk_usd += local_ssd_usd_per_hour(machine, pair.gpu.region)
                place = (pair.gpu.region, pair.gpu.zone)
                found.append(Offer(name, count, machine, *place, kind, host_usd, gpu_usd, disk_usd, check(pair)))
        return sorted(found, key=lambda offer: (offer.usd_per_hour, offer.zone))

    def machines_for(self, gpu: str, count: int = 1) -> list[str]:
        """The priced machine types that can have `count` of the GPU, smallest first. Raises UserError as `offers` does."""
        name = self.gpu_name(gpu)
        sizes = {machine: _size(hosts) or (0.0, 0.0) for machine, hosts in self.rows.hosts.items()}
        return sorted((m for m in sizes if fits(name, count, m, sizes[m])), key=lambda m: (sizes[m], m))

    def counts_of(self, gpu: str) -> list[int]:
        """How many of the GPU a priced machine may have. Raises UserError as `offers` does."""
        name = self.gpu_name(gpu)
        return sorted(count for of, count in self.rows.gpus if of == name and self.machines_for(name, count))

    def size_of(self, machine: str) -> tuple[float, float] | None:
        """(vCPUs, GB of memory) of a machine type, None if it is not in the catalog."""
        return _size(self.rows.hosts.get(machine, {}))

    def cpu_machine_usd(self, machine: str, region: str | None = None, spot: bool = False) -> float | None:
        """US dollars per hour of a machine without GPU and disk, in its cheapest zone; None if there is no price."""
        rows = self.rows.hosts.get(machine, {}).values()
        prices = (row.price(spot) for row in rows if _is_in(row, region, None))
        return min((usd for usd in prices if usd is not None), default=None)

    @property
    def _name(self) -> str:
        return "our old snapshot of SkyPilot's catalog" if self.is_snapshot else "SkyPilot's catalog"

    def gpu_name(self, gpu: str) -> str:
        """The canonical name of a GPU. Raises UserError, with the GPUs of Google Cloud, for an unknown one."""
        wanted = str(gpu).strip().lower()
        sold = {name.lower(): name for name, _ in sorted(self.rows.gpus) if not name.startswith("tpu-")}
        if wanted in sold:
            return sold[wanted]
        known = {name.lower(): name for name in self.clouds}
        here = f"for Google Cloud {self._name} has {', '.join(sold.values())}"
        sold_without_price = {name.lower(): name for name in (*OWN_MACHINES, *N1_LIMITS)}
        if wanted in sold_without_price or "GCP" in self.clouds.get(known.get(wanted, ""), []):
            name = sold_without_price.get(wanted) or known[wanted]
            raise UserError(f"{name} is on Google Cloud, but its price is not known here; {here}", code="price.unknown")
        if wanted not in known:
            near = get_close_matches(wanted, sold, n=2) or get_close_matches(wanted, known, n=2)
            names = " or ".join((sold | known)[name] for name in near)
            raise UserError(
                f"unknown GPU {gpu!r}{f'; did you mean {names}?' if names else ''}; {here}", code="cloud.unknown_gpu"
            )
        name = known[wanted]
        raise UserError(
            f"{name} is not on Google Cloud, only on {', '.join(self.clouds[name])}; {here}",
            code="cloud.gpu_not_offered",
        )


def load_catalog(*, allow_snapshot: bool = True) -> Catalog:
    """SkyPilot's catalog on this disk, without network access; if there is none, our snapshot if that is allowed.

    Raises UserError for a corrupt catalog, and for a missing one if the snapshot is not allowed.
    """
    folder = skypilot_folder()
    try:
        rows, fetched = read_prices(folder)
    except FileNotFoundError:
        if not allow_snapshot:
            raise UserError(
                f"{folder / VMS}: no price catalog yet; `sky gpus list --cloud gcp` fetches it", code="catalog.missing"
            ) from None
        rows, fetched = read_prices(SNAPSHOT)
        return Catalog(SNAPSHOT_SOURCE, True, None, rows, read_clouds(SNAPSHOT))
    clouds = read_clouds(folder) or read_clouds(SNAPSHOT)
    return Catalog(f"SkyPilot's catalog, {_age(fetched)}", False, fetched, rows, clouds)


def refresh_catalog(hours: int = REFRESH_HOURS) -> None:
    """Let SkyPilot fetch its catalog if it is missing or older than so many hours. Imports SkyPilot, which takes seconds.

    A file put there by hand is not replaced. Without network an old file is kept, and SkyPilot reports that. Raises UserError if
    SkyPilot is not installed, and if it cannot fetch a missing file.
    """
    try:
        from sky.catalog import common
    except ImportError as error:
        raise UserError(
            f"SkyPilot cannot be imported ({error}); {install_command('cloud')}",
            code="install.missing_package",
        ) from None
    for name, age in ((VMS, hours), (ACCELERATORS, None)):
        try:
            len(common.read_catalog(name, pull_frequency_hours=age).columns)  # SkyPilot fetches it at the first access
        except OSError as error:
            place = skypilot_folder() / name
            raise UserError(
                f"{place}: SkyPilot could not fetch it; check the network ({error})", code="catalog.not_fetched"
            ) from None
        except ValueError as error:
            raise UserError(
                f"{skypilot_folder() / name}: SkyPilot could not read it ({error}); {REMEDY}", code="catalog.corrupt"
            ) from None


def _price_check(pairs: Iterable[_Pair], spot: bool) -> Callable[[_Pair], tuple[str, ...]]:
    """Returns a function that gives the anomalies of a machine's price in a zone, given all the zones that sell it.

    Two tests. Spot above on-demand in the same zone: one of the two is wrong, and it is unknown which, so both are anomalies. And
    a price below IMPLAUSIBLE of the median over the regions (of their zones that pass the first test). GPU and host are tested
    separately, because a correct host price would hide a GPU at half its price. A host's spot price alone is not tested, because
    those really differ that much (an N1 in asia-east1 at 0.58 of the median).
    """
    sound = [pair for pair in pairs if not _contradictions(pair)]
    parts: dict[str, Callable[[_Pair], float | None]] = {
        "GPU": lambda pair: pair.gpu.price(spot),
        "host": lambda pair: None if spot else pair.host.price(spot),
        "machine": lambda pair: _sum(pair.gpu.price(spot), pair.host.price(spot)),
    }
    medians = {name: _median(sound, usd_of) for name, usd_of in parts.items()}

    def check(pair: _Pair) -> tuple[str, ...]:
        anomalies = _contradictions(pair)
        for name, usd_of in parts.items():
            usd, (middle, regions) = usd_of(pair), medians[name]
            if usd is not None and (usd < IMPLAUSIBLE * middle or usd == 0):
                share = f"{usd / middle:.0%} of" if middle else "at"
                anomalies.append(f"{name} at ${usd:.4f}/h is {share} the median ${middle:.4f} of {regions} regions")
                break
        return tuple(anomalies)

    return check


def _contradictions(pair: _Pair) -> list[str]:
    return [
        f"{name} at ${row.spot_usd:.4f}/h spot is above ${row.usd:.4f}/h on demand in the same zone"
        for name, row in (("GPU", pair.gpu), ("host", pair.host))
        if row.spot_usd is not None and row.usd is not None and row.spot_usd > row.usd
    ]


def _median(pairs: Iterable[_Pair], usd_of: Callable[[_Pair], float | None]) -> tuple[float, int]:
    """(median over the regions, each with its cheapest zone; number of regions)."""
    regions: dict[str, float] = {}
    for pair in pairs:
        usd = usd_of(pair)
        if usd is not None:
            regions[pair.gpu.region] = min(usd, regions.get(pair.gpu.region, usd))
    return (median(regions.values()), len(regions)) if regions else (0.0, 0)


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def _check_place(gpu: str, rows: Iterable[Row], region: str | None, zone: str | None) -> None:
    """Raise UserError, naming the places that have the GPU, unless the region and zone have it."""
    rows = list(rows)
    if any(_is_in(row, region, zone) for row in rows):
        return
    if zone and region and any(_is_in(row, None, zone) for row in rows):
        raise UserError(f"zone {zone} is not in region {region}; name one of the two", code="cloud.zone_outside_region")
    within = [row.zone for row in rows if _is_in(row, region, None)] if region else []
    if zone and within:
        raise UserError(
            f"zone {zone}: no {gpu} there; in region {region} it is in {', '.join(sorted(within))}",
            code="cloud.gpu_not_in_place",
        )
    place = f"zone {zone}" if zone else f"region {region}"
    regions = ", ".join(sorted({row.region for row in rows}))
    raise UserError(f"{place}: no {gpu} there; the regions that have it: {regions}", code="cloud.gpu_not_in_place")


def _is_in(row: Row, region: str | None, zone: str | None) -> bool:
    return (not region or row.region == region.lower()) and (not zone or row.zone == zone.lower())


def _size(hosts: Mapping[str, Row]) -> tuple[float, float] | None:
    """(vCPUs, GB) of a machine type, None if it has no row."""
    return next(((row.vcpus, row.memory_gib) for row in hosts.values()), None)


def _age(fetched: datetime | None) -> str:
    if fetched is None:
        return "put there by hand, age unknown"
    days = (datetime.now().astimezone().date() - fetched.astimezone().date()).days
    ago = "today" if days <= 0 else f"{days} day{'s' * (days > 1)} ago"
    return f"fetched {fetched.astimezone():%Y-%m-%d} ({ago})"
