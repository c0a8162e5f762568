"""Whatever is out of stock, the real SkyPilot under our policy never reaches a machine above the ceiling."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.cloud.catalog.csv_file import read_clouds, read_prices
from finetune.cloud.catalog.offers import SNAPSHOT, Catalog, Offer
from finetune.machine.gpus import GPUS
from tests.helpers.catalog_fixture import lay_out_catalog, shared_catalog
from tests.helpers.sky_home import SkyWorker, fake_gcloud_home

ROOT = Path(__file__).resolve().parents[3]
POLICY = "finetune.cloud.launch.policy.CostPolicy"
KINDS = [(gpu, spot) for gpu in ("A100", "L4", "T4", "V100", "A100-80GB") for spot in (True, False)]
GRID = [0.1, 0.25, 0.31, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 6.0, 10.0]
"""US dollars per hour; the tests marked repeat add every price of the catalog, a cent less and a cent more."""
FEW = [0.1, 0.31, 0.8, 1.5, 3.0, 10.0]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SkyWorker]:
    home = tmp_path_factory.mktemp("home")
    env = fake_gcloud_home(home)
    lay_out_catalog(home)
    with SkyWorker(env, ROOT) as running:
        yield running


def snapshot() -> Catalog:
    """The prices of the fixture, read by our own code."""
    return Catalog("test", True, None, read_prices(SNAPSHOT)[0], read_clouds(SNAPSHOT))


def offers(gpu: str, spot: bool, catalog: Catalog | None = None) -> list[Offer]:
    return (catalog or snapshot()).offers(gpu, machine=GPUS[gpu].machine, spot=spot)


def task(gpu: str, spot: bool, ceiling: float, **envs: str) -> dict[str, Any]:
    return {
        "name": "proof",
        "run": "true",
        "workdir": ".",
        "envs": {"CONFIG": "configs/mistral_7b_qlora.yaml", "MAX_RUN_USD": "25", **envs},
        "resources": {
            "infra": "gcp",
            "accelerators": f"{gpu}:1",
            "instance_type": GPUS[gpu].machine,
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
def test_no_zone_above_the_ceiling_can_ever_be_reached(worker: SkyWorker, gpu: str, spot: bool) -> None:
    prices = sorted(offer.usd_per_hour for offer in offers(gpu, spot))
    middle = prices[len(prices) // 2]
    check_reach(worker, gpu, spot, [*FEW, middle, middle - 0.0001], snapshot(), all_of=True)


def test_price_anomalies_are_reached_only_on_request(worker: SkyWorker) -> None:
    anomalous = {offer.zone for offer in offers("A100", False) if offer.anomalies}
    assert anomalous, "the fixture has no price anomaly"
    careful = worker.ask("reachable", task("A100", False, 10.0), policy=POLICY)
    trusting = worker.ask("reachable", task("A100", False, 10.0, FINETUNE_TRUST_PRICES="1"), policy=POLICY)
    assert not anomalous & {zone for zone, _ in places(careful["reachable"])}
    assert anomalous <= {zone for zone, _ in places(trusting["reachable"])}


@pytest.mark.parametrize("ceiling", [0.4, *(pytest.param(usd, marks=pytest.mark.repeat) for usd in (1.0, 3.7))])
def test_the_provisioner_requests_nothing_above_the_ceiling(worker: SkyWorker, ceiling: float) -> None:
    """What the real provisioner requests, zone after zone, when nothing is in stock."""
    wanted = task("T4", True, ceiling)
    wanted["resources"].pop("accelerators")
    wanted["resources"].pop("instance_type")
    wanted["resources"]["any_of"] = [
        {"accelerators": f"{gpu}:1", "instance_type": GPUS[gpu].machine, "use_spot": spot}
        for gpu in ("A100", "L4", "T4", "V100")
        for spot in (True, False)
    ]
    price = {(o.gpu, o.zone, o.spot): o.usd_per_hour for gpu in ("A100", "L4", "T4", "V100") for s in (True, False)
             for o in offers(gpu, s)}  # fmt: skip
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


def test_without_spot_quota_the_on_demand_machine_is_the_next(worker: SkyWorker) -> None:
    wanted = task("A100", True, 4.5)
    del wanted["resources"]["use_spot"]
    wanted["resources"]["ordered"] = [{"use_spot": True}, {"use_spot": False}]
    spot_zones = [[offer.zone, "A100", True] for offer in offers("A100", True)]
    launched = worker.ask("launch", wanted, policy=POLICY, stocked_out=spot_zones)["launched"]
    assert launched["spot"] is False and launched["region"].startswith("us-")


@pytest.mark.repeat
@pytest.mark.parametrize(("gpu", "spot"), KINDS)
def test_every_price_of_the_snapshot_as_a_ceiling(worker: SkyWorker, gpu: str, spot: bool) -> None:
    cents = {round(offer.usd_per_hour + step, 2) for offer in offers(gpu, spot) for step in (-0.01, 0.01)}
    exact = {offer.usd_per_hour for offer in offers(gpu, spot)}
    check_reach(worker, gpu, spot, sorted({*GRID, *cents, *exact}), snapshot(), all_of=True)


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
        for gpu, spot in KINDS:
            check_reach(worker, gpu, spot, GRID, catalog, all_of=False)
