"""Costs that a task could have beyond its own machine's price: each is multiplied, refused, or bounded by the policy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.cloud.launch.test_policy import ENVS, ROOT, T4, alternatives, ask, refused
from tests.helpers.catalog_fixture import lay_out_catalog
from tests.helpers.sky_home import SkyWorker, fake_gcloud_home

Json = dict[str, Any]
SERVICE: Json = {"readiness_probe": "/"}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SkyWorker]:
    home = tmp_path_factory.mktemp("home")
    env = fake_gcloud_home(home)
    lay_out_catalog(home)
    with SkyWorker(env, ROOT) as running:
        yield running


@pytest.mark.parametrize(
    ("task", "machines"),
    [
        ({"service": SERVICE | {"replicas": 50}}, 50),
        ({"service": SERVICE | {"replica_policy": {"min_replicas": 2, "max_replicas": 30, "target_qps_per_replica": 1}}}, 30),
        ({"service": SERVICE | {"replica_policy": {"min_replicas": 3, "max_replicas": 3, "num_overprovision": 2,
                                                   "target_qps_per_replica": 1, "dynamic_ondemand_fallback": True}}}, 8),
        ({"pool": {"workers": 50}}, 50),
        ({"pool": {"workers": 3}, "num_nodes": 2}, 6),
        ({"pool": {"min_workers": 1, "max_workers": 40, "queue_length_threshold": 1}}, 40),
        ({"num_nodes": 4}, 4),
    ],
)  # fmt: skip
def test_the_ceiling_counts_every_machine_of_the_task(worker: SkyWorker, task: Json, machines: int) -> None:
    request = "SERVE_UP" if "service" in task else "JOBS_POOL_APPLY" if "pool" in task else "CLUSTER_LAUNCH"
    message = refused("launch.all_refused", ask(worker, T4, request=request, **task))
    assert f"above max_hourly_cost $1 with {machines} machines" in message
    allowed = ask(worker, T4 | {"max_hourly_cost": 100}, request=request, **task)
    per_job = json.loads(allowed["sent"]["envs"]["FINETUNE_PRICES"])["offers"][0]["usd_per_hour"]
    assert per_job < 1.0 * task.get("num_nodes", 1), "a job pays for its own nodes only"


def test_an_update_of_a_service_counts_the_replicas_that_still_run(worker: SkyWorker) -> None:
    answer = ask(worker, T4, request="SERVE_UPDATE", service=SERVICE | {"replicas": 2})
    assert "with 4 machines" in refused("launch.all_refused", answer)


@pytest.mark.parametrize(
    "resources",
    [
        {"infra": "aws", "accelerators": "A100:8", "max_hourly_cost": 1},
        {"infra": "aws", "accelerators": "A100:8"},
        {"infra": "lambda", "accelerators": "A100:1"},
        {"infra": "kubernetes", "accelerators": "A100:1"},
        {"infra": "gcp", "cpus": "4+"},
        {"any_of": [{"infra": "aws", "accelerators": "T4:1"}, {"infra": "azure", "accelerators": "T4:1"}]},
    ],
)
@pytest.mark.parametrize("request_name", ["CLUSTER_LAUNCH", "JOBS_LAUNCH", "CLUSTER_EXEC"])
def test_a_ceiling_that_nobody_would_enforce_is_refused(worker: SkyWorker, resources: Json, request_name: str) -> None:
    message = refused("launch.no_ceiling_there", ask(worker, resources, ENVS, request=request_name))
    assert "only on GPUs of Google Cloud" in message


@pytest.mark.parametrize(
    ("autostop", "becomes", "says"),
    [
        ({"idle_minutes": 100_000, "down": True}, {"idle_minutes": 60, "down": True}, "instead of 100000"),
        ("69d", {"idle_minutes": 60, "down": True}, "instead of 99360"),
        ({"idle_minutes": 20, "down": False}, {"idle_minutes": 20, "down": True}, "a stopped machine's disk"),
        (15, {"idle_minutes": 15, "down": True}, "a stopped machine's disk"),
        (True, {"idle_minutes": 0, "down": True}, "a stopped machine's disk"),
        (False, {"idle_minutes": 10, "down": True}, "no autostop in resources"),
        ({"idle_minutes": 90, "down": True, "wait_for": "jobs"},
         {"idle_minutes": 60, "down": True, "wait_for": "jobs"}, "instead of 90"),
    ],
)  # fmt: skip
def test_autostop_is_bounded_and_terminates(worker: SkyWorker, autostop: Any, becomes: Json, says: str) -> None:
    answer = ask(worker, T4 | {"autostop": autostop})
    assert all(one["autostop"] == becomes for one in alternatives(answer))
    assert says in answer["printed"]


@pytest.mark.parametrize("name", ["MAX_RUN_USD", "MAX_HOURS", "MAX_USD_PER_DAY"])
@pytest.mark.parametrize("text", ["9" * 400, "1000001", "0." + "0" * 400 + "1", "0", "٢٥"])
def test_a_limit_without_end_is_refused(worker: SkyWorker, name: str, text: str) -> None:
    message = refused("launch.bad_value", ask(worker, T4, ENVS | {name: text}))
    assert f"envs.{name}: expected a positive number" in message and len(message) < 200


@pytest.mark.parametrize(
    ("recovery", "says"),
    [
        ({"max_restarts_on_errors": 1000}, "at most 10, found 1000"),
        ({"recover_on_exit_codes": [75, 2]}, "2 means the user's mistake"),
        ({"recover_on_exit_codes": 0}, "0 means done"),
    ],
)
def test_restarts_without_end_are_refused(worker: SkyWorker, recovery: Json, says: str) -> None:
    job = T4 | {"job_recovery": {"strategy": "EAGER_NEXT_REGION"} | recovery}
    assert says in refused("launch.unbounded_recovery", ask(worker, job, request="JOBS_LAUNCH"))


@pytest.mark.parametrize("text", ["yes", "2", "true"])
def test_a_switch_that_is_neither_1_nor_0_is_refused(worker: SkyWorker, text: str) -> None:
    message = refused("launch.bad_value", ask(worker, T4, ENVS | {"EVALUATE": text}))
    assert message == f"finetune: envs.EVALUATE: expected 1 or 0, found {text!r}"


def test_the_score_is_part_of_the_dollars_that_machines_are_ranked_by(worker: SkyWorker) -> None:
    """A T4 answers with hf, which takes a quarter of an hour; the hours are printed in tenths."""

    def hours(evaluate: str) -> float:
        line = next(
            line for line in ask(worker, T4, ENVS | {"EVALUATE": evaluate})["printed"].splitlines() if "T4 " in line
        )
        return float(line.split()[-2])

    assert 0.1 < hours("1") - hours("0") < 0.6


def test_the_task_that_serves_is_accepted_and_pinned_to_priced_machines(worker: SkyWorker) -> None:
    task = yaml.safe_load((ROOT / "sky" / "serve.yaml").read_text(encoding="utf-8"))
    answer = ask(worker, task["resources"], task["envs"])
    found = alternatives(answer)
    assert found and {one["use_spot"] for one in found} == {True, False}
    assert all(set(one["accelerators"]) == {"L4"} for one in found)
    assert answer["chosen"]
    refused("launch.all_refused", ask(worker, task["resources"] | {"max_hourly_cost": 0.1}, task["envs"]))
