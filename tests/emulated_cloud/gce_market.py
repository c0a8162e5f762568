"""What the emulated cloud has to give: stock by zone and machine, quotas by region and for the whole project."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

EXHAUSTED = "ZONE_RESOURCE_POOL_EXHAUSTED"
EXHAUSTED_WITH_DETAILS = "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS"
QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
GPUS_ALL_REGIONS = "GPUS_ALL_REGIONS"
PLENTY = 1000.0
ACCELERATORS = {
    "nvidia-tesla-a100": "A100",
    "nvidia-a100-80gb": "A100-80GB",
    "nvidia-l4": "L4",
    "nvidia-tesla-t4": "T4",
    "nvidia-tesla-v100": "V100",
    "nvidia-h100-80gb": "H100",
    "nvidia-h200-141gb": "H200",
}
"""Google's names of GPUs -> SkyPilot's."""
BUILT_IN = {
    "a2-highgpu-1g": ("A100", 1),
    "a2-ultragpu-1g": ("A100-80GB", 1),
    "g2-standard-4": ("L4", 1),
    "g2-standard-8": ("L4", 1),
}
"""Machine types whose GPU need not be asked for."""


@dataclass(frozen=True)
class Wish:
    """A machine that somebody wants. gpu: "" without one."""

    zone: str
    machine_type: str
    gpu: str
    gpus: int
    spot: bool

    @property
    def region(self) -> str:
        return self.zone.rpartition("-")[0]

    @property
    def quota(self) -> str:
        """The regional quota that it counts against, "" for none."""
        name = self.gpu.replace("-", "_").removesuffix("GB") + ("GB" if self.gpu.endswith("GB") else "")
        return f"{'PREEMPTIBLE_' if self.spot else ''}NVIDIA_{name}_GPUS" if self.gpu else ""


@dataclass(frozen=True)
class Stock:
    """How many machines there are of a kind; None as a part of the kind stands for any."""

    count: int
    zone: str | None
    machine_type: str | None
    gpu: str | None
    spot: bool | None
    code: str

    def covers(self, wish: Wish) -> bool:
        pairs = (
            (self.zone, wish.zone),
            (self.machine_type, wish.machine_type),
            (self.gpu, wish.gpu),
            (self.spot, wish.spot),
        )
        return all(mine in (None, theirs) for mine, theirs in pairs)


@dataclass
class Market:
    """Everything is in stock and within quota until a test says otherwise; the newest word on a machine counts."""

    stocks: list[Stock] = field(default_factory=list)
    quotas: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    """Region (or "global") -> metric -> limit."""

    def set_stock(
        self,
        count: int,
        *,
        zone: str | None = None,
        machine_type: str | None = None,
        gpu: str | None = None,
        spot: bool | None = None,
        code: str = EXHAUSTED,
    ) -> None:
        """So many machines of that kind in each zone, those that run included. code: what a refusal is called."""
        self.stocks.insert(0, Stock(count, zone, machine_type, gpu, spot, code))

    def set_quota(self, metric: str, limit: float, region: str = "global") -> None:
        """metric: such as NVIDIA_T4_GPUS or PREEMPTIBLE_NVIDIA_A100_GPUS of a region, GPUS_ALL_REGIONS of the project."""
        self.quotas[region][metric] = limit

    def reset(self) -> None:
        self.stocks.clear()
        self.quotas.clear()

    def limit(self, metric: str, region: str) -> float:
        return self.quotas.get(region, {}).get(metric, PLENTY)

    def refusal(self, wish: Wish, number: int, running: Iterable[Wish]) -> tuple[str, str] | None:
        """Google's code and message if `number` machines more are not to be had beside the `running` ones."""
        running = list(running)
        for metric, region, used in (
            (
                wish.quota,
                wish.region,
                sum(r.gpus for r in running if r.quota == wish.quota and r.region == wish.region),
            ),
            (GPUS_ALL_REGIONS if wish.gpu else "", "global", sum(r.gpus for r in running)),
        ):
            limit = self.limit(metric, region)
            if metric and used + number * wish.gpus > limit:
                where = "globally" if region == "global" else f"in region {region}"
                return QUOTA_EXCEEDED, f"Quota '{metric}' exceeded.  Limit: {limit:.1f} {where}."
        stock = next((stock for stock in self.stocks if stock.covers(wish)), None)
        if stock is not None and sum(r.zone == wish.zone and stock.covers(r) for r in running) + number > stock.count:
            return stock.code, (
                f"The zone 'projects/test/zones/{wish.zone}' does not have enough resources available to fulfill the request.  "
                f"Try a different zone, or try again later."
            )
        return None
