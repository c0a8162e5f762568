"""What the emulated cloud can provide: stock by zone and machine, quotas by region and for the whole project."""

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
    "g2-standard-24": ("L4", 2),
    "g2-standard-48": ("L4", 4),
    "a3-highgpu-1g": ("H100", 1),
}
"""Machine types with a built-in GPU."""


@dataclass(frozen=True)
class MachineRequest:
    """The machine that a request asks for. gpu: "" without one."""

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
        """The regional quota that it counts against; "" without a GPU."""
        name = self.gpu.replace("-", "_").removesuffix("GB") + ("GB" if self.gpu.endswith("GB") else "")
        return f"{'PREEMPTIBLE_' if self.spot else ''}NVIDIA_{name}_GPUS" if self.gpu else ""


@dataclass(frozen=True)
class Stock:
    """How many machines there are of a kind; a part of the kind that is None matches any value."""

    count: int
    zone: str | None
    machine_type: str | None
    gpu: str | None
    spot: bool | None
    code: str

    def covers(self, request: MachineRequest) -> bool:
        pairs = (
            (self.zone, request.zone),
            (self.machine_type, request.machine_type),
            (self.gpu, request.gpu),
            (self.spot, request.spot),
        )
        return all(mine in (None, theirs) for mine, theirs in pairs)


@dataclass
class Market:
    """Everything is in stock and within quota until a test sets a limit; the newest setting for a machine applies."""

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
        """Limits the machines of that kind in each zone, running ones included. code: Google's error code of a refusal."""
        self.stocks.insert(0, Stock(count, zone, machine_type, gpu, spot, code))

    def set_quota(self, metric: str, limit: float, region: str = "global") -> None:
        """metric: for example NVIDIA_T4_GPUS or PREEMPTIBLE_NVIDIA_A100_GPUS of a region, GPUS_ALL_REGIONS of the project."""
        self.quotas[region][metric] = limit

    def reset(self) -> None:
        self.stocks.clear()
        self.quotas.clear()

    def limit(self, metric: str, region: str) -> float:
        return self.quotas.get(region, {}).get(metric, PLENTY)

    def refusal(
        self, request: MachineRequest, number: int, running: Iterable[MachineRequest]
    ) -> tuple[str, str] | None:
        """Google's code and message if `number` more machines are not available beside the `running` ones; None if they are."""
        running = list(running)
        for metric, region, used in (
            (
                request.quota,
                request.region,
                sum(r.gpus for r in running if r.quota == request.quota and r.region == request.region),
            ),
            (GPUS_ALL_REGIONS if request.gpu else "", "global", sum(r.gpus for r in running)),
        ):
            limit = self.limit(metric, region)
            if metric and used + number * request.gpus > limit:
                where = "globally" if region == "global" else f"in region {region}"
                return QUOTA_EXCEEDED, f"Quota '{metric}' exceeded.  Limit: {limit:.1f} {where}."
        stock = next((stock for stock in self.stocks if stock.covers(request)), None)
        if (
            stock is not None
            and sum(r.zone == request.zone and stock.covers(r) for r in running) + number > stock.count
        ):
            return stock.code, (
                f"The zone 'projects/test/zones/{request.zone}' does not have enough resources available to fulfill the request. "
                f" Try a different zone, or try again later."
            )
        return None
