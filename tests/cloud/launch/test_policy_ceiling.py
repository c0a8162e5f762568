"""Whatever is out of stock, the real SkyPilot under our policy never reaches a machine above the ceiling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.cloud.catalog.csv_file import read_clouds, read_prices
from finetune.cloud.catalog.machine_types import NOT_ON_DEMAND
from finetune.cloud.catalog.offers import Catalog, Offer
from finetune.machine.gpus import MACHINES
from tests.helpers.catalog_fixture import CATALOG, lay_out_catalog, shared_catalog
from tests.helpers.sky_home import SkyWorker, fake_gcloud_home

ROOT = Path(__file__).resolve().parents[3]
POLICY = "finetune.cloud.launch.policy.CostPolicy"
KINDS = [
    (name, spot) for name, one in MACHINES.items() for spot in (True, False) if spot or one.machine not in NOT_ON_DEMAND
]
GRID = [0.1, 0.25, 0.31, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 6.0, 10.0]
"""US dollars per hour; the tests marked repeat add every price of the catalog, a cent less and a cent more."""
FEW = [0.1, 0.31, 0.8, 1.5, 3.0, 10.0]


@pytest.fixture
def prices(worker: SkyWorker) -> Catalog:
    """The prices of the fixture, read by our own code."""
    folder = Path(worker.env["HOME"]) / CATALOG
    return Catalog("test", True, None, read_prices(folder)[0], read_clouds(folder))


def offers(name: str, spot: bool, catalog: Catalog) -> list[Offer]:
    one = MACHINES[name]
    return catalog.offers(one.gpu.name, machine=one.machine, count=one.count, spot=spot)


def task(name: str, spot: bool, ceiling: float, **envs: str) -> dict[str, Any]:
    return {
        "name": "proof",
        "run": "true",
        "workdir": ".",
        "envs": {"CONFIG": "configs/mistral_7b_qlora.yaml", "MAX_RUN_USD": "25", **envs},
        "resources": {
            "infra": "gcp",
            "accelerators": MACHINES[name].accelerators,
            "instance_type": MACHINES[name].machine,
            "use_spot": spot,
            "disk_size": 200,
            "max_hourly_cost": ceiling,
        },
    }


def places(machines: list[dict[str, Any]]) -> set[tuple[str, bool]]:
    return {(machine["zone"], machine["spot"]) for machine in machines}


def check_reach(
    worker: SkyWorker, gpu: str, spot: bool, ceilings: list[float], catalog: Catalog, *, all_of: bool
) -> None:
    """No machine above a ceiling is reached; with all_of, all allowed ones are."""
    sold = offers(gpu, spot, catalog)
    price = {offer.zone: offer.usd_per_hour for offer in sold}
    for ceiling in ceilings:
        allowed = {(offer.zone, spot) for offer in sold if offer.usd_per_hour <= ceiling and not offer.anomalies}
        answer = worker.ask("reachable", task(gpu, spot, ceiling), policy=POLICY)
        if not allowed:
            assert answer["error"] == "UserRequestRejectedByPolicy", (gpu, spot, ceiling, answer)
            assert "nothing was launched" in answer["message"]
            continue
        reached = places(answer["reachable"])
        assert reached and all(price[zone] <= ceiling for zone, _ in reached), (gpu, spot, ceiling, reached)
        assert not all_of or reached == allowed, (gpu, spot, ceiling)


@pytest.mark.parametrize(("gpu", "spot"), KINDS)
def test_no_zone_above_the_ceiling_can_ever_be_reached(
    worker: SkyWorker, prices: Catalog, gpu: str, spot: bool
) -> None:
    sold = sorted(offer.usd_per_hour for offer in offers(gpu, spot, prices))
    middle = sold[len(sold) // 2]
    check_reach(worker, gpu, spot, [*FEW, middle, middle - 0.0001], prices, all_of=True)


@pytest.mark.parametrize("path", sorted((ROOT / "sky").rglob("*.yaml")), ids=lambda path: path.stem)
def test_no_task_of_sky_reaches_a_machine_above_its_ceiling(worker: SkyWorker, prices: Catalog, path: Path) -> None:
    request = "JOBS_LAUNCH" if path.stem == "train_spot" else "CLUSTER_LAUNCH"
    answer = worker.ask("reachable", path, policy=POLICY, request=request)
    ceiling = yaml.safe_load(path.read_text(encoding="utf-8"))["resources"]["max_hourly_cost"]
    assert answer["reachable"]
    for machine in answer["reachable"]:
        where = {name: machine[name] for name in ("machine", "count", "spot", "zone")}
        [offer] = prices.offers(machine["gpu"], **where | {"count": int(machine["count"])})
        assert offer.usd_per_hour <= ceiling and not offer.anomalies, machine


@pytest.mark.parametrize("name", [name for name, one in MACHINES.items() if one.machine in NOT_ON_DEMAND])
def test_a_machine_that_is_not_sold_on_demand_is_never_launched_so(worker: SkyWorker, name: str) -> None:
    """SkyPilot's catalog has an on-demand price for each, often that of flex-start."""
    wanted = task(name, False, 1000.0, FINETUNE_TRUST_PRICES="1")
    answer = worker.ask("reachable", wanted, policy=POLICY)
    assert (answer["error"], answer["code"]) == ("UserRequestRejectedByPolicy", "launch.not_on_demand"), answer
    del wanted["resources"]["use_spot"]
    wanted["resources"]["ordered"] = [{"use_spot": True}, {"use_spot": False}]
    reached = worker.ask("reachable", wanted, policy=POLICY)["reachable"]
    assert reached and all(machine["spot"] for machine in reached)


def test_several_gpus_of_a_kind_in_one_task_have_their_own_prices(worker: SkyWorker, prices: Catalog) -> None:
    names = ("L4", "L4:2", "L4:4", "T4", "T4:2")
    wanted = task("L4", True, 0.9)
    wanted["resources"] = {key: wanted["resources"][key] for key in ("infra", "disk_size", "max_hourly_cost")} | {
        "any_of": [
            {"accelerators": MACHINES[name].accelerators, "instance_type": MACHINES[name].machine, "use_spot": True}
            for name in names
        ]
    }
    cost = {(o.gpu, o.count, o.zone): o.usd_per_hour for name in names for o in offers(name, True, prices)}
    answer = worker.ask("reachable", wanted, policy=POLICY)
    reached = {(machine["gpu"], machine["count"], machine["zone"]) for machine in answer["reachable"]}
    assert {count for _, count, _ in reached} == {1, 2} and max(cost[one] for one in reached) <= 0.9
    table = json.loads(answer["sent"]["envs"]["FINETUNE_PRICES"])["offers"]
    assert {(o["gpu"], o["count"], o["zone"]): o["usd_per_hour"] for o in table} == {
        one: pytest.approx(cost[one], abs=1e-5) for one in reached
    }


def test_price_anomalies_are_reached_only_on_request(worker: SkyWorker, prices: Catalog) -> None:
    anomalous = {offer.zone for offer in offers("A100", False, prices) if offer.anomalies}
    assert anomalous, "the fixture has no price anomaly"
    careful = worker.ask("reachable", task("A100", False, 10.0), policy=POLICY)
    trusting = worker.ask("reachable", task("A100", False, 10.0, FINETUNE_TRUST_PRICES="1"), policy=POLICY)
    assert not anomalous & {zone for zone, _ in places(careful["reachable"])}
    assert anomalous <= {zone for zone, _ in places(trusting["reachable"])}


@pytest.mark.parametrize("ceiling", [0.4, *(pytest.param(usd, marks=pytest.mark.repeat) for usd in (1.0, 3.7))])
def test_the_provisioner_requests_nothing_above_the_ceiling(worker: SkyWorker, prices: Catalog, ceiling: float) -> None:
    """What the real provisioner requests, zone after zone, when nothing is in stock."""
    wanted = task("T4", True, ceiling)
    wanted["resources"].pop("accelerators")
    wanted["resources"].pop("instance_type")
    wanted["resources"]["any_of"] = [
        {"accelerators": f"{gpu}:1", "instance_type": MACHINES[gpu].machine, "use_spot": spot}
        for gpu in ("A100", "L4", "T4", "V100")
        for spot in (True, False)
    ]
    price = {(o.gpu, o.zone, o.spot): o.usd_per_hour for gpu in ("A100", "L4", "T4", "V100") for s in (True, False)
             for o in offers(gpu, s, prices)}  # fmt: skip
    answer = worker.ask("launch", wanted, policy=POLICY)
    tried = [price[machine["gpu"], machine["zone"], machine["spot"]] for machine in answer["tried"]]
    assert len(tried) >= 3 and max(tried) <= ceiling
    assert {machine["disk_gb"] for machine in answer["tried"]} == {200}, "the disk that was priced is the one asked for"
    assert {machine["disk_type"] for machine in answer["tried"]} == {"pd-balanced"}


def test_a_stock_out_fails_over_to_the_next_allowed_candidate(worker: SkyWorker) -> None:
    wanted = task("T4", True, 1.0)
    order = worker.ask("launch", wanted, policy=POLICY)["tried"]
    first, second = order[0], next(machine for machine in order if machine["region"] != order[0]["region"])
    gone = [[machine["zone"], "T4", True] for machine in order if machine["region"] == first["region"]]
    launched = worker.ask("launch", wanted, policy=POLICY, stocked_out=gone)["launched"]
    assert (launched["region"], launched["zone"]) == (second["region"], second["zone"])


def test_without_spot_quota_the_on_demand_machine_is_the_next(worker: SkyWorker, prices: Catalog) -> None:
    wanted = task("A100", True, 4.5)
    del wanted["resources"]["use_spot"]
    wanted["resources"]["ordered"] = [{"use_spot": True}, {"use_spot": False}]
    spot_zones = [[offer.zone, "A100", True] for offer in offers("A100", True, prices)]
    launched = worker.ask("launch", wanted, policy=POLICY, stocked_out=spot_zones)["launched"]
    assert launched["spot"] is False and launched["region"].startswith("us-")


@pytest.mark.repeat
@pytest.mark.parametrize(("gpu", "spot"), KINDS)
def test_every_price_of_the_snapshot_as_a_ceiling(worker: SkyWorker, prices: Catalog, gpu: str, spot: bool) -> None:
    cents = {round(offer.usd_per_hour + step, 2) for offer in offers(gpu, spot, prices) for step in (-0.01, 0.01)}
    exact = {offer.usd_per_hour for offer in offers(gpu, spot, prices)}
    check_reach(worker, gpu, spot, sorted({*GRID, *cents, *exact}), prices, all_of=True)


@pytest.mark.repeat
def test_the_whole_slice_of_the_real_catalog(tmp_path: Path) -> None:
    """Every region of the shared catalog; SkyPilot gets fewer candidates than regions, so not every allowed one is reached."""
    shared = shared_catalog()
    if shared is None:
        pytest.skip("../shared is not here")
    env = fake_gcloud_home(tmp_path)
    lay_out_catalog(tmp_path, source=shared)
    catalog = Catalog("test", True, None, read_prices(shared)[0], read_clouds(shared))
    with SkyWorker(env, ROOT) as worker:
        for gpu in ("A100", "L4", "T4", "V100", "A100-80GB"):
            for spot in (True, False):
                check_reach(worker, gpu, spot, GRID, catalog, all_of=False)
