"""The scenarios that can run on a real project, what each costs at most, and why the others run on the emulated cloud only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune.cloud.catalog.disks import disk_usd_per_hour
from finetune.cloud.catalog.offers import Catalog, Offer
from finetune.cloud.gcloud.config import skypilot_setting
from finetune.cloud.launch.controller import CONTROLLER
from finetune.runtime.table import aligned

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Scenario:
    """One test of real_scenarios.py.

    task: a file of sky/, "" if no machine starts. minutes: after which its machines are taken down. spot: it asks for spot
    machines only. managed: a managed job, which also needs SkyPilot's controller.
    """

    test: str
    what: str
    task: str = ""
    minutes: int = 0
    spot: bool = False
    managed: bool = False


SCENARIOS = (
    Scenario("test_train_a100_as_typed", "sky launch sky/train_a100.yaml, autodown", "train_a100", 45),
    Scenario("test_the_order_of_the_plan", "sky launch --dryrun sky/train_cheapest.yaml"),
    Scenario("test_a_ceiling_below_every_price", "refused before anything starts"),
    Scenario(
        "test_preempted_twice", "sky jobs launch: with notice, without", "train_spot", 90, spot=True, managed=True
    ),
    Scenario("test_a_budget_that_runs_out", "stops at its budget, autodown", "train_t4", 60, spot=True),
    Scenario("test_looking_stopping_and_starting", "status, logs, stop, start, TensorBoard", "train_a100", 60),
)
NOT_HERE = (
    ("spot or on-demand machines out of stock", "stock-outs cannot be ordered from Google"),
    ("quota zero, login expired, bucket forbidden", "they are settings of your account, which a test does not change"),
    ("API errors: 503, 429, 403 for a while", "they cannot be ordered from Google"),
    ("network cut between laptop, machine and Google", "it would have to be cut for everything else here too"),
    ("preempted in the middle of an upload", "uploads take milliseconds there: too short to hit"),
    (
        "adapter byte-identical to an unpreempted run",
        "the job may move from an A100 to an L4, which rounds differently",
    ),
    ("the process hangs, the disk fills", "they need access inside the machine, which the emulated one gives"),
)


def alternatives(task: Path) -> Iterator[dict[str, Any]]:
    """The alternatives that a task allows, each with all its resource keys."""
    resources = yaml.safe_load(task.read_text(encoding="utf-8"))["resources"]
    for one in resources.get("any_of") or resources.get("ordered") or [{}]:
        yield resources | one


def admitted(task: Path, catalog: Catalog, *, spot_only: bool = False) -> list[Offer]:
    """The offers that our policy allows for a task, cheapest first: without a price anomaly, and not above its
    max_hourly_cost."""
    found: list[Offer] = []
    for one in alternatives(task):
        gpu, _, count = one["accelerators"].partition(":")
        spot = bool(one.get("use_spot"))
        if spot_only and not spot:
            continue
        machine, disk = one["instance_type"], one.get("disk_size", 256)
        tier = one.get("disk_tier", "medium")
        offers = catalog.offers(gpu, machine=machine, count=int(count or 1), spot=spot, disk_gib=disk, disk_tier=tier)
        found += [offer for offer in offers if not offer.anomalies and offer.usd_per_hour <= one["max_hourly_cost"]]
    return sorted(found, key=lambda offer: offer.usd_per_hour)


def consolidated() -> bool:
    """Whether the controller of managed jobs runs in the user's API server rather than on its own machine."""
    return bool(skypilot_setting("jobs", "controller", "consolidation_mode"))


def controller_usd_per_hour(catalog: Catalog) -> float:
    if consolidated():
        return 0.0
    machine, disk = CONTROLLER
    return (catalog.cpu_machine_usd(machine) or 0.0) + disk_usd_per_hour(disk, "medium", "")


@dataclass(frozen=True)
class Cost:
    """The cheapest and dearest machine (None: none starts), and the cost in US dollars at most."""

    scenario: Scenario
    cheapest: Offer | None
    dearest: Offer | None
    usd: float


def cost(scenario: Scenario, catalog: Catalog, root: Path = ROOT) -> Cost:
    if not scenario.task:
        return Cost(scenario, None, None, 0.0)
    offers = admitted(root / "sky" / f"{scenario.task}.yaml", catalog, spot_only=scenario.spot)
    assert offers, f"{scenario.task}: the catalog has no machine under its ceiling"
    hourly = offers[-1].usd_per_hour + (controller_usd_per_hour(catalog) if scenario.managed else 0.0)
    return Cost(scenario, offers[0], offers[-1], hourly * scenario.minutes / 60)


def table(costs: Sequence[Cost], project: str, source: str) -> str:
    """The table that is printed before anything starts."""
    head = ("scenario", "what", "dearest machine", "$/h from", "to", "minutes", "$ at most")
    rows = [head, *(_row(one) for one in costs)]
    rows.append(("all of them", "", "", "", "", "", f"{sum(one.usd for one in costs):.2f}"))
    return "\n".join(
        [
            f"On project {project}, in US dollars, estimated: the minutes after which machines are taken down x the dearest",
            f"machine that the task's ceiling allows (a managed job: and its controller). Prices: {source}; disks by list price.",
            "Not included: the bucket, traffic, external addresses, taxes.",
            "",
            *aligned(rows, "lllr"),
            "",
            "On the emulated cloud only (make cloud-test without GCP_PROJECT):",
            *(f"  {what}: {why}" for what, why in NOT_HERE),
        ]
    )


def _row(one: Cost) -> tuple[str, ...]:
    name = one.scenario.test.removeprefix("test_")
    if one.cheapest is None or one.dearest is None:
        return name, one.scenario.what, "none starts", "", "", "", "0.00"
    dearest = one.dearest
    kind = f"{dearest.gpu} {'spot' if dearest.spot else 'on demand'}, {dearest.zone}"
    prices = (f"{one.cheapest.usd_per_hour:.3f}", f"{dearest.usd_per_hour:.3f}")
    return name, one.scenario.what, kind, *prices, str(one.scenario.minutes), f"{one.usd:.2f}"
