"""A managed job whose machine is above `max_hourly_cost` by the time it is placed again."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.cloud.catalog.csv_file import VMS
from tests.emulated_cloud.environment import CloudEnvironment
from tests.emulated_cloud.gce import Instance
from tests.emulated_cloud.reconciliation import check_nothing_left, price_at, reconcile
from tests.emulated_cloud.skypilot import CONFIG as SETTINGS
from tests.emulated_cloud.table import record_metric
from tests.emulated_cloud.test_scenarios_preemption import wait_for_job
from tests.emulated_cloud.training import SAVE_STEPS, STEPS, Run, launch
from tests.helpers.catalog_fixture import CATALOG

pytestmark = pytest.mark.cloud
CEILING, RISEN_GPU_USD = 0.40, 0.35
"""US dollars per hour: a spot L4 machine costs 0.26 to 0.40 in a dozen zones; with that price of its GPU, 0.45."""
NAME_POLICY = "from finetune.cloud.gcloud.policy_setting import name_policy; print(name_policy())"


@pytest.fixture
def cheap(project: Path) -> Iterator[None]:
    """The task with this ceiling, which leaves L4 alone."""
    task = project / "sky" / "train_spot.yaml"
    before = task.read_text(encoding="utf-8")
    task.write_text(re.sub(r"max_hourly_cost: [0-9.]+", f"max_hourly_cost: {CEILING}", before), encoding="utf-8")
    yield
    task.write_text(before, encoding="utf-8")


@pytest.fixture
def fetched(environment: CloudEnvironment) -> Iterator[None]:
    """SkyPilot's catalog as if it had fetched it, so that it would fetch a newer one."""
    home = environment.sky.home
    catalog, note = home / CATALOG / VMS, home / CATALOG / ".meta" / f"{VMS}.md5"
    before = catalog.read_text(encoding="utf-8")
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(hashlib.md5(catalog.read_bytes()).hexdigest(), encoding="utf-8")
    yield
    note.unlink()
    catalog.write_text(before, encoding="utf-8")


@pytest.fixture
def policy_on_the_controller(environment: CloudEnvironment) -> Iterator[None]:
    """As `finetune doctor --fix-policy` has it."""
    settings = environment.sky.home / ".sky" / "config.yaml"
    environment.sky.python(NAME_POLICY)
    yield
    settings.write_text(SETTINGS, encoding="utf-8")


@pytest.mark.usefixtures("cheap", "fetched", "policy_on_the_controller")
def test_a_price_that_rises(environment: CloudEnvironment, project: Path, tmp_path: Path) -> None:
    """Between two attempts: the second machine stops before it computes anything, and the third is elsewhere."""
    run, second = preempted_where_the_price_rises(environment, project, "riser")
    third = environment.cloud.wait_for_machine("riser", 400, other_than=second)
    assert third.request.zone != second.request.zone, run.diagnostics()
    run.wait_for_status("done", 400)
    queue = wait_for_job(environment, "riser", "SUCCEEDED")
    assert re.search(r"\s2\s+SUCCEEDED", queue), queue
    record = run.record()
    assert (record["status"], record["steps"]["done"], record["attempts"]) == ("done", STEPS, 2)
    attempts = run.account(tmp_path).attempts
    assert [attempt.reason for attempt in attempts] == [None, "too_dear", "done"]
    assert [attempt.step for attempt in attempts][1:] == [None, STEPS], "the second has trained nothing"
    reconcile(run, tmp_path)
    for attempt in attempts:
        record_metric(
            f"{attempt.name}: {attempt.zone} {attempt.seconds:.1f} s at ${attempt.usd_per_hour}/h, {attempt.reason}"
        )
    assert attempts[1].price and "fetched on this machine" in attempts[1].price.basis
    check_nothing_left(environment)


@pytest.mark.usefixtures("cheap")
def test_a_price_that_rises_and_a_controller_that_does_not_look(
    environment: CloudEnvironment, project: Path, tmp_path: Path
) -> None:
    """The policy is where `sky` is typed alone, so the second and the third machine are in the zone of the first: that ends the
    job, with 2, and a launch by hand goes on elsewhere."""
    run, second = preempted_where_the_price_rises(environment, project, "blind")
    third = environment.cloud.wait_for_machine("blind", 400, other_than=second)
    assert third.request.zone == second.request.zone
    wait_for_job(environment, "blind", "FAILED", 400)
    attempts = run.account(tmp_path).attempts
    assert [attempt.reason for attempt in attempts] == [None, "too_dear", "too_dear"]
    reconcile(run, tmp_path)
    above = sum(attempt.usd or 0.0 for attempt in attempts[1:])
    record_metric(
        f"above the ceiling: {sum(one.seconds for one in attempts[1:]):.0f} s, ${above:.4f}, and no third start there"
    )
    check_nothing_left(environment)


def preempted_where_the_price_rises(environment: CloudEnvironment, project: Path, name: str) -> tuple[Run, Instance]:
    """The run, and its second machine, in the zone of the first, above the ceiling since it was placed there."""
    environment.sky.run(*launch("train_spot", "--jobs", "-d", "-n", name, RUN_NAME=name), cwd=project).ok()
    run, cloud = Run(environment, name), environment.cloud
    first = cloud.wait_for_machine(name, 180)
    run.wait_for_step(SAVE_STEPS)
    cloud.crash(first)
    second = cloud.wait_for_machine(name, 300, other_than=first)
    cloud.prices.raise_spot_gpu("L4", second.request.zone, RISEN_GPU_USD)
    assert second.request.zone == first.request.zone, "the cheapest zone is tried first"
    stretch = cloud.bill.stretches[-1]
    before, after = (price_at(cloud.prices, stretch, moment) for moment in (0.0, cloud.prices.versions[-1][0]))
    assert before <= CEILING < after
    record_metric(f"{second.request.zone}: ${before:.4f}/h at the launch, ${after:.4f}/h since the second machine runs")
    return run, second
