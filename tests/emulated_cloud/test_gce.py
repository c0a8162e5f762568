"""The emulated API by itself, without machines: what SkyPilot relies on, and what tests inject. Needs no root."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.emulated_cloud.gce import Cloud
from tests.emulated_cloud.gce_filter import matches

ZONE = "us-central1-a"
T4 = {
    "machineType": "n1-highmem-8",
    "guestAccelerators": [
        {"acceleratorType": "projects/p/zones/z/acceleratorTypes/nvidia-tesla-t4", "acceleratorCount": 1}
    ],
    "scheduling": {"provisioningModel": "SPOT", "preemptible": True, "instanceTerminationAction": "DELETE"},
    "labels": {"ray-cluster-name": "c"},
    "disks": [{"autoDelete": True, "initializeParams": {"diskSizeGb": 60}}],
}


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    addresses = (f"10.128.0.{number}" for number in range(10, 250))
    with Cloud(("127.0.0.1", 0), "p", [ZONE, "us-central1-b"], addresses) as cloud:
        yield cloud


def ask(cloud: Cloud, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        cloud.url + path, method=method, data=json.dumps(body).encode() if body is not None else None
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def make(cloud: Cloud, name: str, zone: str = ZONE, **changes: Any) -> dict[str, Any]:
    """Inserts an instance and returns the finished operation."""
    root = f"/compute/v1/projects/p/zones/{zone}"
    body = {"instanceProperties": T4 | changes, "perInstanceProperties": {name: {}}, "count": 1}
    _, operation = ask(cloud, "POST", f"{root}/instances/bulkInsert", body)
    return ask(cloud, "POST", f"{root}/operations/{operation['name']}/wait")[1]


def errors(operation: dict[str, Any]) -> list[tuple[str, str]]:
    return [(error["code"], error["message"]) for error in operation.get("error", {}).get("errors", [])]


def test_an_instance_is_listed_by_label_and_status_and_billed(cloud: Cloud) -> None:
    assert errors(make(cloud, "one-compute")) == []
    labels, status = "(labels.ray-cluster-name%20%3D%20{})", "(status%20%3D%20{})"
    path = f"/compute/v1/projects/p/zones/{ZONE}/instances?filter={labels}%20AND%20{status}"
    _, found = ask(cloud, "GET", path.format("c", "RUNNING"))
    assert [row["name"] for row in found["items"]] == ["one-compute"]
    assert "items" not in ask(cloud, "GET", path.format("other", "RUNNING"))[1]
    assert "items" not in ask(cloud, "GET", path.format("c", "TERMINATED"))[1]
    time.sleep(0.2)
    ask(cloud, "DELETE", f"/compute/v1/projects/p/zones/{ZONE}/instances/one-compute")
    cloud.assert_empty()
    (stretch,) = cloud.bill.stretches
    assert (stretch.gpu, stretch.gpus, stretch.spot, stretch.end) == ("T4", 1, True, "deleted")
    assert cloud.bill.usd(lambda _: 3600.0) == pytest.approx(stretch.seconds) and 0.2 <= stretch.seconds < 5


def test_a_stopped_machine_pays_its_disk_and_starts_again(cloud: Cloud) -> None:
    make(cloud, "one-compute")
    instance = cloud.machine("one")
    for verb in ("stop", "start"):
        _, operation = ask(cloud, "POST", f"/compute/v1/projects/p/zones/{ZONE}/instances/one-compute/{verb}")
        assert not errors(
            ask(cloud, "POST", f"/compute/v1/projects/p/zones/{ZONE}/operations/{operation['name']}/wait")[1]
        )
    assert instance.status == "RUNNING"
    assert [(one.running, one.end) for one in cloud.bill.stretches] == [
        (True, "stopped"),
        (False, "started"),
        (True, ""),
    ]


def test_a_disk_that_was_not_made_to_go_stays(cloud: Cloud) -> None:
    data = {"initializeParams": {"diskSizeGb": 100, "diskType": "zones/z/diskTypes/pd-ssd"}}
    make(cloud, "one-compute", disks=[*T4["disks"], data])
    (stretch,) = cloud.bill.stretches
    assert stretch.disk_gb == 160
    ask(cloud, "DELETE", f"/compute/v1/projects/p/zones/{ZONE}/instances/one-compute")
    with pytest.raises(AssertionError, match=r"disks left in the cloud.*one-compute-1.*pd-ssd"):
        cloud.assert_empty()
    _, found = ask(cloud, "GET", f"/compute/v1/projects/p/zones/{ZONE}/disks")
    assert [row["sizeGb"] for row in found["items"]] == ["100"]
    cloud.wipe()
    cloud.assert_empty()


def test_the_bill_ends_when_the_power_is_cut(cloud: Cloud) -> None:
    """The time that this computer takes to end a machine's processes and to remove its disk is not billed."""

    class Slow:
        def boot(self) -> None: ...

        def power_off(self) -> None:
            time.sleep(0.4)

        def discard(self) -> None:
            time.sleep(0.4)

    cloud.instances.build = lambda instance: Slow()  # type: ignore[assignment,return-value]
    make(cloud, "one-compute")
    cloud.crash(cloud.machine("one"))
    assert cloud.bill.stretches[0].seconds < 0.4


def test_stock_counts_what_runs(cloud: Cloud) -> None:
    cloud.market.set_stock(1, gpu="T4", spot=True, code="ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS")
    assert not errors(make(cloud, "one-compute"))
    ((code, _),) = errors(make(cloud, "two-compute"))
    assert code == "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS"
    assert not errors(make(cloud, "three-compute", zone="us-central1-b"))
    assert not errors(make(cloud, "four-compute", scheduling={})), "on demand there are more"


@pytest.mark.parametrize(
    ("metric", "region", "where"),
    [
        ("PREEMPTIBLE_NVIDIA_T4_GPUS", "us-central1", "in region us-central1"),
        ("GPUS_ALL_REGIONS", "global", "globally"),
    ],
)
def test_quotas_are_counted(cloud: Cloud, metric: str, region: str, where: str) -> None:
    cloud.market.set_quota(metric, 1, region)
    assert not errors(make(cloud, "one-compute"))
    assert errors(make(cloud, "two-compute")) == [
        ("QUOTA_EXCEEDED", f"Quota '{metric}' exceeded.  Limit: 1.0 {where}.")
    ]
    path = "/compute/v1/projects/p" + ("" if region == "global" else f"/regions/{region}")
    rows = {row["metric"]: row for row in ask(cloud, "GET", path)[1]["quotas"]}
    assert (rows[metric]["limit"], rows[metric]["usage"]) == (1.0, 1.0)


def test_faults_strike_as_often_and_as_long_as_ordered(cloud: Cloud) -> None:
    cloud.faults.add("GET .*/zones$", 503, "backendError", times=2)
    zones = "/compute/v1/projects/p/zones"
    assert [ask(cloud, "GET", zones)[0] for _ in range(3)] == [503, 503, 200]
    cloud.faults.add("regions", 429, "rateLimitExceeded", seconds=1.0)
    status, body = ask(cloud, "GET", "/compute/v1/projects/p/regions")
    assert (status, body["error"]["errors"][0]["reason"]) == (429, "rateLimitExceeded")
    time.sleep(1.1)
    assert ask(cloud, "GET", "/compute/v1/projects/p/regions")[0] == 200


def test_a_preempted_spot_machine_is_deleted_after_its_notice(cloud: Cloud) -> None:
    make(cloud, "one-compute")
    cloud.preempt(cloud.machine("one"), notice=1.0)
    time.sleep(0.1)
    assert [one.status for one in cloud.machines()] == ["STOPPING"]
    cloud.assert_empty(5)
    assert cloud.bill.stretches[0].end == "preempted" and cloud.bill.stretches[0].seconds >= 1.0


def test_a_crashed_machine_that_stays_is_stopped(cloud: Cloud) -> None:
    make(cloud, "one-compute")
    cloud.crash(cloud.machine("one"), gone=False)
    assert [one.status for one in cloud.machines()] == ["TERMINATED"]
    with pytest.raises(AssertionError, match="left in the cloud"):
        cloud.assert_empty(0.1)


def test_a_stale_fingerprint_is_refused(cloud: Cloud) -> None:
    make(cloud, "one-compute")
    path = f"/compute/v1/projects/p/zones/{ZONE}/instances/one-compute"
    body = {"labels": {"a": "b"}, "labelFingerprint": ask(cloud, "GET", path)[1]["labelFingerprint"]}
    assert ask(cloud, "POST", f"{path}/setLabels", body)[0] == 200
    assert ask(cloud, "POST", f"{path}/setLabels", body)[0] == 412
    assert ask(cloud, "GET", path)[1]["labels"] == {"a": "b"}


def test_what_is_not_known_is_said(cloud: Cloud) -> None:
    status, body = ask(cloud, "GET", "/compute/v1/projects/p/global/addresses")
    assert status == 501 and "/global/addresses" in body["error"]["message"]
    assert cloud.defects == [body["error"]["message"]]
    assert ask(cloud, "GET", f"/compute/v1/projects/p/zones/{ZONE}/instances/none")[0] == 404
    cloud.wipe()
    assert not cloud.defects


def test_what_goes_wrong_in_the_emulation_is_said(cloud: Cloud) -> None:
    cloud.instances.build = lambda instance: 1 / 0  # type: ignore[assignment,return-value]
    ((code, _),) = errors(make(cloud, "one-compute"))
    assert code == "INTERNAL_ERROR"
    assert ask(cloud, "POST", f"/compute/v1/projects/p/zones/{ZONE}/instances/bulkInsert", {})[0] == 500
    assert (
        len(cloud.defects) == 2
        and "ZeroDivisionError" in "".join(cloud.defects)
        and "KeyError" in cloud.defects[0] + cloud.defects[1]
    )


@pytest.mark.parametrize(
    ("expression", "passes"),
    [
        ("", True),
        ("name=one", True),
        ("(labels.a = b) AND ((status = X) OR (status = RUNNING))", True),
        ("((labels.a = b) AND (labels.c = d)) AND ((status = RUNNING))", False),
        ("labels.none = x", False),
        ("status != RUNNING", False),
    ],
)
def test_filters(expression: str, passes: bool) -> None:
    assert matches({"name": "one", "labels": {"a": "b"}, "status": "RUNNING"}, expression) is passes


@pytest.mark.parametrize("expression", ["name eq one", "(name = one", "name = one)", "name = one AND"])
def test_a_filter_that_is_not_understood_lets_nothing_through(expression: str) -> None:
    with pytest.raises(ValueError, match="filter"):
        matches({"name": "one"}, expression)
