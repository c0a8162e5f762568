"""What could bypass the ceiling, or stop a launch needlessly: bare machine types, extra disks and nodes, existing clusters,
prices that change during the launch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune.cloud.catalog.csv_file import VMS
from finetune.cloud.catalog.offers import SNAPSHOT
from tests.helpers.catalog_fixture import CATALOG, lay_out_catalog, shared_catalog
from tests.helpers.sky_home import SkyWorker, fake_gcloud_home

ROOT = Path(__file__).resolve().parents[3]
POLICY = "finetune.cloud.launch.policy.CostPolicy"
T4 = {"infra": "gcp", "accelerators": "T4:1", "instance_type": "n1-highmem-8", "max_hourly_cost": 1.0, "disk_size": 200}
ENVS = {"CONFIG": "configs/mistral_7b_qlora.yaml", "MAX_RUN_USD": "25"}
TOO_BIG = {"OVERRIDES": "training.per_device_train_batch_size=16 training.gradient_checkpointing=false"}
Json = dict[str, Any]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SkyWorker]:
    home = tmp_path_factory.mktemp("home")
    lay_out_catalog(home)
    with SkyWorker(fake_gcloud_home(home), ROOT) as running:
        yield running


def ask(
    worker: SkyWorker, resources: Json, op: str = "reachable", request: str = "CLUSTER_LAUNCH", **task: Any
) -> Json:
    whole = {
        "name": "t",
        "run": "true",
        "workdir": ".",
        "resources": json.loads(json.dumps(resources)),
        "envs": ENVS,
    } | task
    return worker.ask(op, whole, policy=POLICY, request=request)


def refused(code: str, answer: Json) -> str:
    assert (answer["error"], answer["code"]) == ("UserRequestRejectedByPolicy", code), answer
    message: str = answer["message"]
    return message


@pytest.mark.parametrize("infra", ["gcp", None])
def test_a_machine_type_with_a_built_in_gpu_obeys_the_ceiling_too(worker: SkyWorker, infra: str | None) -> None:
    alone = {"infra": infra, "instance_type": "a2-highgpu-1g"}
    assert "3.71 would allow it" in refused(
        "launch.all_refused", ask(worker, alone | {"max_hourly_cost": 0.5, "disk_size": 200})
    )
    admitted = ask(worker, alone | {"max_hourly_cost": 3.8, "disk_size": 200})
    assert {one["usd_per_hour"] for one in admitted["reachable"]} == {3.67339}


@pytest.mark.parametrize(
    ("resources", "task", "code", "says"),
    [
        (
            {"infra": "gcp/us-central1", "volumes": [{"path": "/x", "storage_type": "instance"}]},
            {},
            "price.unknown",
            "resources.volumes",
        ),
        ({"use_spot": True, "job_recovery": "failover"}, {}, "launch.unbounded_recovery", "use EAGER_NEXT_REGION"),
    ],
)
def test_resources_with_costs_beyond_the_priced_machine(
    worker: SkyWorker, resources: Json, task: Json, code: str, says: str
) -> None:
    assert says in refused(code, ask(worker, T4 | resources, request="JOBS_LAUNCH", **task))


@pytest.mark.parametrize("name", ["MAX_RUN_USD", "MAX_HOURS"])
@pytest.mark.parametrize("text", ["1e3", " 25 ", "1_000", ".5", "24h", ""])
def test_a_number_that_the_job_would_refuse_is_refused_before_the_launch(
    worker: SkyWorker, name: str, text: str
) -> None:
    assert f"envs.{name}" in refused("launch.bad_value", ask(worker, T4, envs=ENVS | {name: text}))


@pytest.mark.parametrize(("resources", "envs"), [({"accelerators": "t4"}, {}), ({}, {"FINETUNE_PRICES": "{}"})])
def test_memory_is_checked_however_the_gpu_is_expressed(worker: SkyWorker, resources: Json, envs: Json) -> None:
    assert "does not fit" in refused("launch.all_refused", ask(worker, T4 | resources, envs=ENVS | TOO_BIG | envs))


CONFLICT = {"OVERRIDES": "training.per_device_train_batch_size=4 training.gradient_accumulation_steps=4"}
"""In a config with an effective batch of 16."""


def test_a_machine_whose_gpus_contradict_the_batch_size_is_refused(worker: SkyWorker) -> None:
    four = {"accelerators": "T4:4", "instance_type": "n1-highmem-16"}
    one = {"accelerators": "T4:1", "instance_type": "n1-highmem-8"}
    either = {"infra": "gcp", "max_hourly_cost": 4.0, "disk_size": 200, "any_of": [one, four]}
    answer = ask(worker, either, envs=ENVS | CONFLICT)
    assert {machine["count"] for machine in answer["reachable"]} == {1}
    assert re.search(r"not allowed: \d+ zones of T4:4 on-demand, no run begins on 4 GPUs with these", answer["printed"])
    message = refused(
        "config.conflicting_values", ask(worker, T4 | four | {"max_hourly_cost": 4.0}, envs=ENVS | CONFLICT)
    )
    assert "effective_batch_size: 16 is not 64, the product of" in message
    message = refused(
        "config.conflicting_values", ask(worker, T4 | {"max_hourly_cost": 4.0}, envs=ENVS | CONFLICT, num_nodes=2)
    )
    assert "16 is not 32, the product of" in message


@pytest.mark.parametrize("override", ["model.name=bigcode/starcoder2-7b", "plan.records=null"])
def test_a_run_that_cannot_be_estimated_is_ranked_by_price(worker: SkyWorker, override: str) -> None:
    answer = ask(worker, T4, op="optimize", envs=ENVS | {"OVERRIDES": override})
    assert answer["chosen"]["gpu"] == "T4" and "ranked by price alone" in answer["printed"]


@pytest.mark.parametrize(("seconds", "result"), [(2.0, "above the ceiling: []"), (14.0, "refused: finetune: ")])
def test_prices_fetched_during_the_launch_are_used(tmp_path: Path, seconds: float, result: str) -> None:
    """SkyPilot fetches a catalog that is older than 7 hours. In the new one a T4 in Iowa costs more than the ceiling."""
    lines = (SNAPSHOT / VMS).read_text().splitlines()
    raised = [line.rsplit(",", 2)[0] + ",9,8" if ",T4,1," in line and "us-central1" in line else line for line in lines]

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(seconds)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(("\n".join(raised) + "\n").encode())

        def log_message(self, *_: Any) -> None:
            pass

    env = fake_gcloud_home(tmp_path, pythonpath=ROOT)
    lay_out_catalog(tmp_path, fetched=datetime.now(UTC) - timedelta(hours=20))
    os.utime(tmp_path / CATALOG / VMS, (0, 0))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    program = [
        sys.executable,
        str(ROOT / "tests" / "helpers" / "slow_prices.py"),
        f"http://127.0.0.1:{server.server_port}",
    ]
    done = subprocess.run(program, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert result in next(line for line in done.stdout.splitlines() if line.startswith("result:"))


L4 = {"infra": "gcp", "accelerators": "L4:1", "use_spot": False, "disk_size": 200}
EITHER = {"instance_type": "g2-standard-8"}
CLUSTER = L4 | {"infra": "gcp/us-central1/us-central1-a", "instance_type": "g2-standard-12"}


@pytest.mark.parametrize(
    ("machine", "wanted", "result"),
    [
        (CLUSTER, L4 | {"instance_type": "g2-standard-4", "max_hourly_cost": 0.75}, "another machine"),
        (CLUSTER, L4 | {"max_hourly_cost": 0.75}, "finetune: no machine is allowed"),  # $1.03 when it starts again
        (CLUSTER, L4 | {"max_hourly_cost": 1.2}, "yes"),
        (CLUSTER | {"infra": "gcp/europe-west3/europe-west3-a", "use_spot": True, "instance_type": "g2-standard-8"},
         {"max_hourly_cost": 1.2, "any_of": [L4 | EITHER, L4 | EITHER | {"use_spot": True}]}, "yes"),  # not among the best 24
    ],
)  # fmt: skip
def test_an_existing_cluster_is_used_at_its_own_price(tmp_path: Path, machine: Json, wanted: Json, result: str) -> None:
    shared = shared_catalog()
    if shared is None:
        pytest.skip("../shared is not here: our snapshot has one machine type a GPU")
    lay_out_catalog(tmp_path, source=shared)
    env = fake_gcloud_home(tmp_path, pythonpath=ROOT)
    task = {"run": "true", "resources": wanted, "envs": {"MAX_RUN_USD": "5"}}
    typed = json.dumps({"machine": machine, "status": "STOPPED", "task": task})
    program = [sys.executable, str(ROOT / "tests" / "helpers" / "existing_cluster.py")]
    done = subprocess.run(
        program, input=typed, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"result: {result}" in done.stdout


def test_price_and_budget_include_all_nodes(worker: SkyWorker) -> None:
    answer = ask(worker, T4 | {"max_hourly_cost": 2.0}, op="optimize", num_nodes=2, envs=ENVS | {"MAX_RUN_USD": "4"})
    table = json.loads(answer["sent"]["envs"]["FINETUNE_PRICES"])
    assert min(offer["usd_per_hour"] for offer in table["offers"]) == pytest.approx(2 * 0.8506, abs=1e-3)
    assert "above its budget of $4" in answer["printed"]  # $2.55 a node
