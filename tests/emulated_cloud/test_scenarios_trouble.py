"""Scenario 7: problems with quota, login, bucket and API: a clear message or recovery, and never an orphaned machine."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.emulated_cloud.environment import CloudEnvironment
from tests.emulated_cloud.pace import patience
from tests.emulated_cloud.reconciliation import catalog_price, check_nothing_left, reconcile
from tests.emulated_cloud.table import record_metric
from tests.emulated_cloud.training import BUCKET, SHORT, Run, launch

pytestmark = pytest.mark.cloud
CEILING = 4.50
"""US dollars an hour: max_hourly_cost of sky/train_a100.yaml."""
WITHIN = 60
"""Seconds within which a launch has to be refused if no machine is needed to know; 5 on an idle computer."""
MINUTE = 60
"""Seconds for which Google's API refuses everything, or machines. These three are scaled by pace.py."""
AUTOSTOP_SECONDS = 180
"""Within which an idle machine has to be gone with -i 1."""


@pytest.mark.cloud_short
def test_no_gpu_quota(environment: CloudEnvironment, project: Path) -> None:
    """The state of every new project: the message names the quota, and SkyPilot does not try all regions."""
    environment.cloud.market.set_quota("GPUS_ALL_REGIONS", 0)
    refused = environment.sky.run(*launch("train_a100", "-c", "none", RUN_NAME="none"), cwd=project)
    record_metric(f"refused after {refused.seconds:.0f} s; asked {environment.asked_for()}")
    assert refused.code == 1
    assert "QUOTA_EXCEEDED" in refused.out and "Quota 'GPUS_ALL_REGIONS' exceeded.  Limit: 0.0 globally" in refused.out
    assert len(environment.asked_for()) == 2, "one for spot, one on demand"
    check_no_machine_ever(environment)


def test_no_spot_quota(environment: CloudEnvironment, project: Path, tmp_path: Path) -> None:
    """The launch uses an on-demand machine, which has its own quota, under the ceiling."""
    regions = {zone.rpartition("-")[0] for zone in environment.cloud.compute.zones}
    for region in regions:
        environment.cloud.market.set_quota("PREEMPTIBLE_NVIDIA_A100_GPUS", 0, region)
    launched = environment.sky.run(
        *launch("train_a100", "-c", "dear", overrides=SHORT, RUN_NAME="dear"), cwd=project
    ).ok()
    machine, asked = environment.cloud.machine("dear"), environment.asked_for()
    record_metric(f"launch to the end of training: {launched.seconds:.0f} s; asked {asked}")
    assert f"Found no quota for a2-highgpu-1g spot instances in region {machine.request.region} in GCP" in launched.out
    assert len(asked) == 1, "SkyPilot checks the quota before it requests a machine"
    assert machine.request.gpu == "A100" and not machine.request.spot
    price = catalog_price(environment.cloud.prices)
    assert price(environment.cloud.bill.stretches[-1]) <= CEILING
    environment.sky.run("down", "-y", "dear").ok()
    reconcile(Run(environment, "dear"), tmp_path)
    check_nothing_left(environment)


def test_an_expired_login(environment: CloudEnvironment, project: Path) -> None:
    environment.sky.expire_login()
    refused = environment.sky.run(*launch("train_a100", "-c", "old", RUN_NAME="old"), cwd=project)
    record_metric(f"refused after {refused.seconds:.0f} s")
    assert refused.code == 1 and refused.seconds < patience(WITHIN)
    assert (
        "finetune: Google refuses this login, which has expired or was revoked; run `gcloud auth login` and "
        "`gcloud auth application-default login`" in refused.out
    )
    assert not environment.cloud.calls
    environment.sky.expire_login(False)
    check_no_machine_ever(environment)


def test_a_forbidden_bucket(environment: CloudEnvironment, project: Path) -> None:
    environment.buckets.forbid(BUCKET)
    refused = environment.sky.run(*launch("train_a100", "-c", "shut", RUN_NAME="shut"), cwd=project)
    record_metric(f"refused after {refused.seconds:.0f} s")
    assert refused.code == 1 and refused.seconds < patience(WITHIN)
    assert (
        f"finetune: bucket gs://{BUCKET}: this account may not access it; ask for the role Storage Admin, or launch "
        "with --env BUCKET=NAME" in refused.out
    )
    assert not environment.asked_for()
    check_no_machine_ever(environment)


def test_a_bucket_that_may_only_be_read(environment: CloudEnvironment, project: Path) -> None:
    """Refused before there is a machine, on which the run would fail at its first write, after minutes that cost money."""
    environment.buckets.make("read-only")
    environment.buckets.forbid("read-only", "storage.objects.create", "storage.objects.delete")
    refused = environment.sky.run(*launch("train_a100", "-c", "ro", RUN_NAME="ro", BUCKET="read-only"), cwd=project)
    record_metric(f"refused after {refused.seconds:.0f} s")
    assert refused.code == 1 and refused.seconds < patience(WITHIN)
    assert (
        "finetune: bucket gs://read-only: this account lacks storage.objects.create, storage.objects.delete, so a run could not "
        "save its checkpoints there; ask for the role Storage Object Admin on it, or launch with --env BUCKET=NAME"
        in refused.out
    )
    assert not environment.asked_for()
    check_no_machine_ever(environment)


def test_a_bucket_that_the_user_has_made(environment: CloudEnvironment, project: Path) -> None:
    """--env BUCKET=NAME, which the message recommends, with a bucket that SkyPilot has not made here."""
    environment.buckets.make("my-own")
    environment.cloud.market.set_quota("GPUS_ALL_REGIONS", 0)  # the test needs no machine
    asked = environment.sky.run(*launch("train_a100", "-c", "mine", RUN_NAME="mine", BUCKET="my-own"), cwd=project)
    assert "finetune: bucket gs://my-own" in asked.out and "QUOTA_EXCEEDED" in asked.out, asked.out[-3000:]
    check_no_machine_ever(environment)


def test_a_minute_of_refused_machines(environment: CloudEnvironment, project: Path, tmp_path: Path) -> None:
    """SkyPilot treats a 503 as a zone without stock. On an idle computer it has tried all of them within the minute, and starts
    again half a minute later; on a busy one it gets a later candidate. Neither is above the ceiling.

    The deletion of the machine is refused once too: it is requested again."""
    environment.cloud.faults.add("bulkInsert", 503, "backendError", seconds=patience(MINUTE))
    began = time.time()
    begin = ("train_a100", "-d", "-c", "later", "-i", "1", "--down", "--retry-until-up")
    words = launch(*begin, overrides=SHORT, RUN_NAME="later")
    launched = environment.sky.run(*words, cwd=project).ok()
    at = [call.at - began for call in environment.cloud.calls if call.path.endswith("/bulkInsert")]
    record_metric(f"launch {launched.seconds:.0f} s; asked {len(at)} times, the last after {at[-1]:.0f} s")
    assert "Got return code 'backendError' in " in launched.out
    assert len(at) > 2 and at[-1] > patience(MINUTE) - 10, "the refusals had an effect"

    run = Run(environment, "later")
    run.wait_for_status("done")
    trained = time.time()
    environment.cloud.faults.add("^DELETE .*/instances/", 503, "backendError", times=1)
    environment.cloud.assert_empty(AUTOSTOP_SECONDS)
    (stretch,) = environment.cloud.bill.stretches
    assert stretch.ended and catalog_price(environment.cloud.prices)(stretch) <= CEILING
    asked = [call for call in environment.cloud.calls if call.at > trained and call.method == "DELETE"]
    record_metric(
        f"gone {stretch.ended - trained:.0f} s after the end of training, deletion requested {len(asked)} times"
    )
    assert len(asked) > 1, "the first was refused"
    reconcile(run, tmp_path)
    check_nothing_left(environment)


def test_a_minute_without_any_api(environment: CloudEnvironment, project: Path) -> None:
    environment.cloud.faults.add("", 503, "backendError", seconds=patience(MINUTE))
    refused = environment.sky.run(*launch("train_a100", "-c", "down", RUN_NAME="down"), cwd=project)
    record_metric(f"refused after {refused.seconds:.0f} s")
    assert refused.code == 1
    assert "googleapiclient error (HttpError): <HttpError 503" in refused.out
    environment.cloud.faults.clear()
    check_no_machine_ever(environment)


def check_no_machine_ever(environment: CloudEnvironment) -> None:
    assert not environment.cloud.bill.stretches, environment.cloud.bill.stretches
    check_nothing_left(environment)
