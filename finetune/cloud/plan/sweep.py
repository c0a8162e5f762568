"""What a sweep would cost: on one machine, one trial after the other, or on several at once, each with a set-up of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.cloud.plan.plan import Plan, Row
from finetune.errors import NotEstimated
from finetune.runtime.table import aligned

RELOAD_HOURS = 1.5 / 60
"""Until a trial that goes on trains again: imports, and the model from the local disk. Estimated."""
DECISION_HOURS = 15 / 3600
"""For a decision under the lease of a sweep in a bucket: 12 s of waiting until everyone sees a file. Estimated."""


@dataclass(frozen=True)
class SweepCost:
    """Estimated. hours: until the sweep ends. machine_hours: billed, of all machines together. usd: their price."""

    machines: int
    hours: float
    machine_hours: float
    usd: float
    row: Row


def sweep_costs(plan: Plan, allowed: Sequence[int], shares: Sequence[float]) -> list[SweepCost]:
    """By the number of machines, on the GPU that is the cheapest for one. plan: of one whole trial. allowed: how many trials
    train up to each comparison, and to the end. shares: of the training, up to each comparison. Raises NotEstimated if no machine
    is chosen for the trial."""
    rows = [row for row in plan.rows if row.chosen and row.offer and row.cost]
    if not rows:
        raise NotEstimated("no GPU of plan.gpus can train a trial; see `finetune plan CONFIG`", code="sweep.no_machine")
    set_up = plan.set_up.minutes / 60
    found = [[_cost(row, set_up, allowed, shares, machines) for machines in range(1, allowed[0] + 1)] for row in rows]
    return min(found, key=lambda costs: costs[0].usd)


def _cost(row: Row, set_up: float, allowed: Sequence[int], shares: Sequence[float], machines: int) -> SweepCost:
    """What preemptions cost grows with the work, as in the plan of one trial."""
    assert row.offer is not None and row.cost is not None
    work = row.on_gpu.work_hours + row.cost.lost_hours
    ends = [0.0, *shares, 1.0]
    each = [
        (count, (end - begin) * work + RELOAD_HOURS + DECISION_HOURS)
        for count, begin, end in zip(allowed, ends, ends[1:], strict=False)
    ]
    hours = set_up + sum(math.ceil(count / machines) * hours for count, hours in each)
    billed = machines * set_up + sum(count * hours for count, hours in each)
    return SweepCost(machines, hours, billed, billed * row.offer.usd_per_hour, row)


def render_sweep(costs: Sequence[SweepCost], trials: int, usd: float | None, budget: str = "--max-sweep-usd") -> str:
    """As text. usd: the budget, None without one. budget: what sets it."""
    first = costs[0]
    assert first.row.offer is not None
    kind = "spot" if first.row.spot else "on-demand"
    shown = [cost for cost in costs if cost.machines in (1, 2, 3, 4, 6, 8) or cost is costs[-1]]
    rows = [
        (
            str(cost.machines),
            f"{cost.hours:.1f}",
            f"{cost.machine_hours:.1f}",
            f"{cost.usd:.2f}",
            _verdict(cost, usd, budget),
        )
        for cost in shown
    ]
    cheapest = min(costs, key=lambda cost: cost.usd)
    return "\n".join(
        [
            f"{trials} trials on {first.row.on_gpu.name} {kind} in {first.row.offer.zone} at "
            f"${first.row.offer.usd_per_hour:.3f}/h, without scores (hours and dollars are estimated):",
            *aligned([("machines", "hours", "billed hours", "$", ""), *rows], "rrrrl"),
            f"cheapest: {cheapest.machines} machine{'s' * (cheapest.machines > 1)}, because each pays for its own set-up; more "
            "end sooner. `finetune launch --jobs sky/sweep.yaml` once for each, with the same RUN_NAME and SWEEP_WORKERS.",
        ]
    )


def sweep_json(costs: Sequence[SweepCost], trials: int, usd: float | None) -> dict[str, Any]:
    """As numbers. usd: the budget, None without one."""
    first = costs[0]
    assert first.row.offer is not None
    return {
        "trials": trials,
        "gpu": first.row.on_gpu.name,
        "spot": first.row.spot,
        "zone": first.row.offer.zone,
        "usd_per_hour": round(first.row.offer.usd_per_hour, 5),
        "basis": {"usd_per_hour": "catalog", "hours": "estimated", "usd": "estimated, without scores"},
        "rows": [
            {
                "machines": cost.machines,
                "hours": round(cost.hours, 3),
                "billed_hours": round(cost.machine_hours, 3),
                "usd": round(cost.usd, 3),
                "within_budget": None if usd is None else cost.usd <= usd,
            }
            for cost in costs
        ],
    }


def _verdict(cost: SweepCost, usd: float | None, budget: str) -> str:
    return "" if usd is None or cost.usd <= usd else f"above {budget} {usd:g}: the budget would end it"
