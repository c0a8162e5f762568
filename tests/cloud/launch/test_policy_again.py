"""The policy where a job is placed again, days after its launch: by today's prices, fetched by the real SkyPilot."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.budget.newest_prices import priced_again
from finetune.cloud.catalog.csv_file import VMS, prices_of, read_clouds
from finetune.cloud.catalog.offers import SNAPSHOT, Catalog
from finetune.machine.gpus import MACHINES
from tests.helpers.catalog_fixture import lay_out_catalog
from tests.helpers.sky_home import SkyWorker, fake_gcloud_home

ROOT = Path(__file__).resolve().parents[3]
POLICY = "finetune.cloud.launch.policy.CostPolicy"
Json = dict[str, Any]


class Published:
    """A server with the catalog of today. text: what it has; status: of its answers; asked: how often."""

    def __init__(self, text: str) -> None:
        self.text, self.status, self.asked = text, 200, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked += 1
                self.send_response(outer.status)
                self.end_headers()
                self.wfile.write(outer.text.encode())

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"


def with_gpu_spot(text: str, gpu: str, region: str, factor: float) -> str:
    """The catalog with other spot prices of a GPU in a region."""
    lines = []
    for line in text.splitlines():
        cells = line.split(",")
        if f",{gpu},1" in line and f",{region}," in line and not cells[0] and cells[-1]:
            cells[-1] = str(round(float(cells[-1]) * factor, 5))
        lines.append(",".join(cells))
    assert lines != text.splitlines()
    return "\n".join(lines) + "\n"


@pytest.fixture
def published() -> Iterator[Published]:
    server = Published((SNAPSHOT / VMS).read_text(encoding="utf-8"))
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def worker(tmp_path: Path, published: Published) -> Iterator[SkyWorker]:
    """Its catalog was fetched an hour ago: SkyPilot itself would keep it for six more."""
    env = fake_gcloud_home(tmp_path) | {"FT_CATALOG_URL": published.url}
    lay_out_catalog(tmp_path, fetched=datetime.now(UTC) - timedelta(hours=1))
    with SkyWorker(env, ROOT) as running:
        yield running


def spot_task(ceiling: float) -> Json:
    task: Json = yaml.safe_load((ROOT / "sky" / "train_spot.yaml").read_text(encoding="utf-8"))
    task["resources"]["max_hourly_cost"] = ceiling
    task["resources"]["any_of"] = [
        {"accelerators": MACHINES[gpu].accelerators, "instance_type": MACHINES[gpu].machine, "use_spot": True}
        for gpu in ("A100", "L4", "T4")
    ]
    return task


def reached(answer: Json) -> set[tuple[str, str]]:
    assert "error" not in answer, answer
    return {(machine["gpu"], machine["zone"]) for machine in answer["reachable"]}


def usd_by_place(text: str) -> dict[tuple[str, str], float]:
    """Today's price of each spot machine in each zone, by our own code."""
    rows = prices_of(text.encode(), "test")
    catalog = Catalog("test", False, None, rows, read_clouds(SNAPSHOT))
    return {
        (gpu, offer.zone): offer.usd_per_hour
        for gpu in ("A100", "L4", "T4")
        for offer in catalog.offers(gpu, machine=MACHINES[gpu].machine, spot=True)
    }


@pytest.mark.parametrize("ceiling", [0.3, 0.4, 0.75, 1.4, 1.7, 2.5])
def test_no_machine_is_placed_above_the_ceiling_by_then(
    worker: SkyWorker, published: Published, ceiling: float
) -> None:
    """Prices of two GPUs rise in the regions that were cheapest; the list of the launch is shortened by today's."""
    sent = worker.ask("reachable", spot_task(ceiling), policy=POLICY, request="JOBS_LAUNCH")
    at_launch, asked = reached(sent), published.asked
    assert at_launch
    for gpu, region in (("L4", "us-central1"), ("T4", "us-east4"), ("A100", "me-west1")):
        published.text = with_gpu_spot(published.text, gpu, region, 1.6)
    again = worker.ask("reachable", sent["sent"], policy=POLICY, request="JOBS_LAUNCH_CLUSTER")
    usd = usd_by_place(published.text)
    risen = {place for place in at_launch if usd[place] > ceiling}
    if risen == at_launch:
        assert again["code"] == "launch.all_refused"
        return
    assert reached(again) == at_launch - risen
    assert published.asked == asked + 1, "fetched again, though SkyPilot's copy was an hour old"
    table = json.loads(again["sent"]["envs"]["FINETUNE_PRICES"])
    here = {(offer["gpu"], offer["zone"]): offer["usd_per_hour"] for offer in table["offers"]}
    assert here == {place: pytest.approx(usd[place], abs=1e-5) for place in at_launch - risen}, (
        "today's prices for the job"
    )


def test_a_price_that_has_risen_everywhere_places_nothing(worker: SkyWorker, published: Published) -> None:
    task = spot_task(0.75)
    task["resources"]["any_of"] = task["resources"]["any_of"][2:]
    sent = worker.ask("reachable", task, policy=POLICY, request="JOBS_LAUNCH")["sent"]
    for region in {line.split(",")[6] for line in published.text.splitlines() if ",T4,1" in line}:
        published.text = with_gpu_spot(published.text, "T4", region, 6.0)
    again = worker.ask("launch", sent, policy=POLICY, request="JOBS_LAUNCH_CLUSTER")
    assert again["error"] == "UserRequestRejectedByPolicy" and "tried" not in again


@pytest.mark.parametrize("fault", ["status", "text"])
def test_a_catalog_that_cannot_be_fetched_again_leaves_the_known_one_or_places_nothing(
    worker: SkyWorker, published: Published, fault: str
) -> None:
    sent = worker.ask("reachable", spot_task(0.4), policy=POLICY, request="JOBS_LAUNCH")
    if fault == "status":
        published.status = 500
        assert reached(worker.ask("reachable", sent["sent"], policy=POLICY, request="JOBS_LAUNCH_CLUSTER")) == reached(
            sent
        )
        return
    whole, published.text = published.text, "<html>"  # SkyPilot keeps whatever is sent
    refused = worker.ask("reachable", sent["sent"], policy=POLICY, request="JOBS_LAUNCH_CLUSTER")
    assert refused["error"] == "UserRequestRejectedByPolicy", refused
    published.text = whole
    assert reached(worker.ask("reachable", sent["sent"], policy=POLICY, request="JOBS_LAUNCH_CLUSTER")) == reached(sent)


@pytest.mark.parametrize("ceiling", [0.4, 1.4, 2.5])
def test_the_machine_prices_itself_as_the_policy_does(worker: SkyWorker, published: Published, ceiling: float) -> None:
    """The same prices, and the same offers above the ceiling, from the same catalog."""
    sent = worker.ask("reachable", spot_task(ceiling), policy=POLICY, request="JOBS_LAUNCH")["sent"]
    table = json.loads(sent["envs"]["FINETUNE_PRICES"])
    for gpu, region in (("L4", "us-central1"), ("T4", "us-east4"), ("A100", "me-west1")):
        published.text = with_gpu_spot(published.text, gpu, region, 1.6)
    newest = priced_again(table, table, prices_of(published.text.encode(), "test"), datetime.now(UTC))
    usd = usd_by_place(published.text)
    for offer in newest["offers"]:
        expected = usd[offer["gpu"], offer["zone"]]
        assert offer["usd_per_hour"] == pytest.approx(expected, abs=1e-5)
        assert ("too_dear" in offer) == (expected > ceiling)
    placed = worker.ask("reachable", sent, policy=POLICY, request="JOBS_LAUNCH_CLUSTER")
    if "error" not in placed:
        assert reached(placed) == {(o["gpu"], o["zone"]) for o in newest["offers"] if "too_dear" not in o}
