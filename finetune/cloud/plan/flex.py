"""`finetune plan --flex`: what the run would cost with flex-start, and how to ask for it. Nothing is launched at these prices.

Flex-start (Dynamic Workload Scheduler): Google queues the request, starts the machine when there is one, and lets it run without
preemption for up to seven days. SkyPilot's catalog has no column for it. Its on-demand price of some GPUs is, in some regions, a
third to a half of that in the others; those are presumably the prices of flex-start, because SkyPilot takes the first entry of
Google's price list that names the GPU (get_gpu_price in its catalog/data_fetchers/fetch_gcp.py, which leaves the entries called
"DWS defined duration" out since they were noticed for G4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.cloud.catalog.disks import disk_usd_per_hour, local_ssd_usd_per_hour
from finetune.cloud.catalog.offers import Catalog
from finetune.cloud.plan.on_gpu import OnGpu
from finetune.cloud.plan.plan import Plan, RunCost, run_cost
from finetune.machine.gpus import MACHINES
from finetune.runtime.table import aligned

SHARE = 0.55
"""An on-demand price of a GPU below this share of its highest one counts as that of flex-start. In the catalog of 2026 they are
at 0.33 to 0.53 (H100, H200, A100-80GB, A100), list prices at 0.71 and more."""
LONGEST_HOURS = 168
"""Google's limit for a machine of flex-start: seven days."""


@dataclass(frozen=True)
class FlexRow:
    """A machine in its cheapest zone, at what are presumably the prices of flex-start: US dollars per hour, of the run."""

    on_gpu: OnGpu
    zone: str
    usd_per_hour: float
    cost: RunCost


def flex_rows(plan: Plan) -> list[FlexRow]:
    """Every machine of the plan on which the run is possible and that has such a price, cheapest run first."""
    on_gpus = {row.on_gpu.name: row.on_gpu for row in plan.rows if row.on_gpu.possible}
    found = []
    for on_gpu in on_gpus.values():
        prices = flex_prices(plan.catalog, on_gpu.name, plan.assumptions.disk_gib)
        if prices:
            usd, zone = min(prices)
            found.append(FlexRow(on_gpu, zone, usd, run_cost(on_gpu, usd, False, plan.assumptions)))
    return sorted(found, key=lambda row: row.cost.usd)


def flex_prices(catalog: Catalog, name: str, disk_gib: int) -> list[tuple[float, str]]:
    """(US dollars per hour of the whole machine, zone); the host at its list price, so that they are rather too high."""
    one = MACHINES[name]
    hosts = catalog.rows.hosts.get(one.machine, {})
    gpus = {zone: row for zone, row in catalog.rows.gpus.get((one.gpu.name, one.count), {}).items() if row.usd}
    highest = max((row.usd or 0.0 for row in gpus.values()), default=0.0)
    found = []
    for zone, row in gpus.items():
        host = hosts.get(zone)
        if host is None or host.usd is None or row.usd is None or row.usd >= SHARE * highest:
            continue
        disks = disk_usd_per_hour(disk_gib, "medium", row.region, one.machine)
        found.append((host.usd + row.usd + disks + local_ssd_usd_per_hour(one.machine, row.region), zone))
    return found


def flex_json(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "gpu": row.on_gpu.gpu.name,
            "count": row.on_gpu.count,
            "zone": row.zone,
            "usd_per_hour": round(row.usd_per_hour, 5),
            "hours": round(row.cost.hours, 3),
            "usd": round(row.cost.usd, 3),
        }
        for row in flex_rows(plan)
    ]


def render_flex(plan: Plan) -> str:
    """The table, and how to ask for such a machine."""
    rows = flex_rows(plan)
    if not rows:
        return "flex-start: the catalog has no price that looks like one for these GPUs"
    table = [("", "GPU", "zone", "hours", "$/h", "$ for the run")]
    table += [
        (
            f"{place}.",
            row.on_gpu.name,
            row.zone,
            f"{row.cost.hours:.1f}",
            f"{row.usd_per_hour:.3f}",
            f"{row.cost.usd:.2f}",
        )
        for place, row in enumerate(rows, start=1)
    ]
    best = MACHINES[rows[0].on_gpu.name]
    hours = min(LONGEST_HOURS, max(1, round(2 * rows[0].cost.hours + 0.5)))
    place = rows[0].zone.rpartition("-")[0]
    return "\n".join(
        [
            "flex-start (Dynamic Workload Scheduler), at what are presumably its prices, estimated hours:",
            *aligned(table, "lllrrr"),
            "presumably: on-demand prices of SkyPilot's catalog that are about half of those in other regions. A machine on",
            "demand costs the full price there; Google's page on Dynamic Workload Scheduler pricing has the right ones. To ask",
            f"for the first, in a task with `accelerators: {best.accelerators}`, `use_spot: false`, `infra: gcp/{place}`:",
            "  config:",
            "    gcp:",
            f"      managed_instance_group: {{run_duration: {hours * 3600}, provision_timeout: 3600}}  # seconds",
            "It needs the GPU's spot quota, waits in Google's queue, is not preempted, and ends after run_duration.",
            "Our launch policy counts the full price against max_hourly_cost and refuses what is not sold on demand, because",
            "SkyPilot knows no price of flex-start: launched without it (another folder), no ceiling in dollars holds.",
        ]
    )
