"""`sky jobs launch sky/train_spot.yaml` on machines that are preempted: nothing is lost, and the budget holds."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from tests.emulated_cloud.environment import CloudEnvironment
from tests.emulated_cloud.gce import Instance
from tests.emulated_cloud.pace import paid_seconds, wait_until
from tests.emulated_cloud.reconciliation import check_nothing_left, reconcile
from tests.emulated_cloud.table import record_metric
from tests.emulated_cloud.training import (
    CONFIG,
    HEARTBEAT_SECONDS,
    LOGGING_STEPS,
    SAVE_STEPS,
    SET_UP,
    STEPS,
    Run,
    launch,
    long_run,
    newest_checkpoint,
    steps_in_tensorboard,
)
from tests.emulated_cloud.whole import Whole

pytestmark = pytest.mark.cloud
SLOW_UPLOADS = 40_000
"""Bytes per second: a checkpoint of the tiny model then takes seconds."""
TRAINING_SECONDS = 30
"""Scaled by pace.py: of training, which the budget of scenario 5 pays for besides the starts (those of the attempts, and one more
in reserve). If a start is faster than assumed, training gets the rest."""
FIRST_SECONDS, REST_SECONDS = 9, 0.2
"""Of training until the first checkpoint of scenario 5; of the pause after each step, at least."""
NOTHING_SECONDS = 20
"""In which nothing may restart a run that was stopped at its budget; the controller checks more often."""


@pytest.mark.xdist_group("whole")
@pytest.mark.cloud_short(only=True)
def test_preempted_once(environment: CloudEnvironment, project: Path, whole: Whole, tmp_path: Path) -> None:
    """Scenario 4 in short: with notice."""
    run = launch_preempted(environment, project, "once")
    preempt_with_notice(run, environment.cloud.wait_for_machine("once", 180))
    check_preempted(run, whole, tmp_path, ["interrupted", "done"])


@pytest.mark.xdist_group("whole")
def test_preempted_three_times(environment: CloudEnvironment, project: Path, whole: Whole, tmp_path: Path) -> None:
    """Scenario 4: with notice, without, and in the middle of a checkpoint's upload."""
    run = launch_preempted(environment, project, "thrice")
    first = environment.cloud.wait_for_machine("thrice", 180)
    second = preempt_with_notice(run, first)

    run.wait_for_step(max(run.committed()) + 2 * SAVE_STEPS)
    environment.site.upload_bytes_per_second = SLOW_UPLOADS  # applies to the next machine
    began = time.monotonic()
    sell_out(environment, second)
    environment.cloud.crash(second)
    third = environment.cloud.wait_for_machine("thrice", 300, other_than=second)
    third_came = time.time()
    record_metric(
        f"without notice: on a new machine after {time.monotonic() - began:.0f} s, from step {max(run.committed())}"
    )

    half = run.wait_for_partial_checkpoint(since=third_came)
    environment.site.upload_bytes_per_second = 0
    sell_out(environment, third)
    environment.cloud.crash(third)
    began = time.monotonic()
    assert half not in run.committed(), "the upload had ended: no partial checkpoint is tested"
    environment.cloud.wait_for_machine("thrice", 300, other_than=third)
    record_metric(f"during the upload of step {half}: on a new machine after {time.monotonic() - began:.0f} s")

    check_preempted(run, whole, tmp_path, ["interrupted", None, None, "done"])
    assert [stretch.end for stretch in environment.cloud.bill.stretches].count("crashed") == 2


def launch_preempted(environment: CloudEnvironment, project: Path, name: str) -> Run:
    environment.sky.run(*launch("train_spot", "--jobs", "-d", "-n", name, RUN_NAME=name), cwd=project).ok()
    return Run(environment, name)


def preempt_with_notice(run: Run, machine: Instance) -> Instance:
    """Preempts the machine after the run's first checkpoints; returns the machine on which the run continues."""
    cloud = run.environment.cloud
    run.wait_for_step(2 * SAVE_STEPS)
    began = time.monotonic()
    sell_out(run.environment, machine)
    cloud.preempt(machine)
    other = cloud.wait_for_machine(run.name, 300, other_than=machine)
    record_metric(
        f"with notice: on a new machine after {time.monotonic() - began:.0f} s, from step {max(run.committed())}"
    )
    return other


def check_preempted(run: Run, whole: Whole, folder: Path, reasons: list[str | None]) -> None:
    """Asserts that the run ends as if nothing had happened. reasons: why each attempt ended; None without notice."""
    environment, recoveries = run.environment, len(reasons) - 1
    run.wait_for_status("done", 400)
    queue = wait_for_job(environment, run.name, "SUCCEEDED")
    assert re.search(rf"\s{recoveries}\s+SUCCEEDED", queue), f"{recoveries} recoveries\n{queue}"
    record = run.record()
    assert (record["status"], record["steps"]["done"], record["attempts"]) == ("done", STEPS, len(reasons))
    assert run.adapter_hash() == whole.adapter_hash
    fetched = run.fetch(folder)
    assert steps_in_tensorboard(fetched) == [1, *range(LOGGING_STEPS, STEPS + 1, LOGGING_STEPS)]
    assert {name.rpartition("-")[2] for name in wandb_runs(fetched)} == {run.name}
    zones = {stretch.zone for stretch in environment.cloud.bill.stretches}
    assert len(zones) == len(reasons), "each in another zone"
    assert [attempt.reason for attempt in run.account(folder).attempts] == reasons
    record_metric(
        f"{recoveries} recoveries, {len(zones)} zones, the adapter is byte-identical to that of a run without interruptions"
    )
    reconcile(run, folder)
    check_nothing_left(environment)


@pytest.mark.cloud_short(only=True)
def test_a_budget_that_ends(environment: CloudEnvironment, project: Path, tmp_path: Path) -> None:
    """Scenario 5 in short: without a preemption, and Google refuses once to delete the machine."""
    run, _, budget = launch_on_small_budget(environment, project, attempts=1)
    run.wait_for_step(1)
    environment.cloud.faults.add("^DELETE .*/instances/", 503, "backendError", times=1)
    check_budget_stop(run, budget, tmp_path)
    asked = [call for call in environment.cloud.calls if call.method == "DELETE" and "/instances/" in call.path]
    record_metric(f"the deletion of its machine was requested {len(asked)} times")
    assert len(asked) > 1, "the first was refused"
    assert run.record()["attempts"] == 1
    check_nothing_left(environment)


def test_a_budget_that_runs_out(environment: CloudEnvironment, project: Path, tmp_path: Path) -> None:
    """Scenario 5: the budget ends the run after the second preemption; nothing restarts it but a higher budget."""
    run, words, budget = launch_on_small_budget(environment, project, attempts=3)
    machine = environment.cloud.wait_for_machine("poor", 180)
    for number in (1, 2):
        run.wait_for_step(max(run.committed(), default=0) + 1)
        assert max(run.committed()) < number * 2 * FIRST_SECONDS / REST_SECONDS, "it does not pause after its steps"
        environment.cloud.crash(machine)
        machine = environment.cloud.wait_for_machine("poor", 300, other_than=machine)
    check_budget_stop(run, budget, tmp_path)

    words[words.index(f"MAX_RUN_USD={budget}")] = "MAX_RUN_USD=5"
    environment.sky.run(*words, cwd=project).ok()
    run.wait_for_step(max(run.committed()) + 1)
    environment.sky.run("jobs", "cancel", "-y", "-n", "poor").ok()
    environment.cloud.assert_empty(120)
    assert run.record()["attempts"] == 4
    reconcile(run, tmp_path / "cancelled")
    check_nothing_left(environment)


def launch_on_small_budget(environment: CloudEnvironment, project: Path, attempts: int) -> tuple[Run, list[str], float]:
    """Launches a managed job in the region with the cheapest L4, so that a restart costs what the first start did. Returns the
    run, the arguments of its launch, and its budget in US dollars, which suffices for that many attempts."""
    region, usd_per_hour = cheapest_l4(environment, project)
    seconds = paid_seconds(attempts + 1, attempts * TRAINING_SECONDS)
    budget = round(seconds * usd_per_hour / 3600, 4)
    record_metric(f"budget ${budget}, for {seconds:.0f} s")
    often = f"checkpoint.every_minutes={FIRST_SECONDS / 60} {SET_UP}"
    long = f"{long_run(100 * STEPS, save_steps=1000)} {often}"
    machine = ("--gpus", "L4:1", "--instance-type", "g2-standard-8", "--infra", f"gcp/{region}")
    begin = ("train_spot", "--jobs", "-d", "-n", "poor", *machine)
    words = launch(*begin, overrides=long, RUN_NAME="poor", MAX_RUN_USD=budget, FT_STEP_SECONDS=REST_SECONDS)
    environment.sky.run(*words, cwd=project).ok()
    return Run(environment, "poor"), words, budget


def check_budget_stop(run: Run, budget: float, folder: Path) -> None:
    """Waits until the run has ended at its budget, and asserts that nothing restarts it."""
    environment = run.environment
    paid = 3600 * budget / run.record()["attempt_log"][0]["usd_per_hour"]
    run.wait_for_status("budget_stop", paid)  # starts that were faster than was allowed for leave it much to train
    wait_for_job(environment, "poor", "SUCCEEDED")
    reconciliation = reconcile(run, folder / "stopped")
    assert budget / 3 < reconciliation.ledger_usd <= budget
    heartbeat = HEARTBEAT_SECONDS / reconciliation.ledger_seconds * reconciliation.ledger_usd
    assert reconciliation.bill_usd - reconciliation.tail_usd < budget + heartbeat
    newest, passed_over = newest_checkpoint(folder / "stopped" / "poor")
    assert newest and newest.name == f"step-{run.record()['steps']['done']}" and not passed_over
    assert run.record()["stop"]["reason"] == "budget" and "reserved for a restart" in run.record()["stop"]["detail"]
    machines = len(environment.cloud.bill.stretches)
    time.sleep(NOTHING_SECONDS)
    assert len(environment.cloud.bill.stretches) == machines and not environment.cloud.machines(), (
        "something has restarted it"
    )


def cheapest_l4(environment: CloudEnvironment, project: Path) -> tuple[str, float]:
    """Region and US dollars per hour of the cheapest spot L4 that sky/train_spot.yaml may use."""
    planned = environment.sky.program("finetune", "plan", CONFIG, "--json", cwd=project).ok().out
    rows = json.JSONDecoder().raw_decode(planned, planned.index("{"))[0]["rows"]
    usable = [row for row in rows if row["chosen"] and row["spot"] and row["gpu"] == "L4"]
    cheapest = min(usable, key=lambda row: float(row["usd"]))
    return cheapest["region"], float(cheapest["usd_per_hour"])


def sell_out(environment: CloudEnvironment, machine: Instance) -> None:
    """A zone that preempts a spot machine has none left."""
    environment.cloud.market.set_stock(0, zone=machine.request.zone, spot=True)


def wandb_runs(run: Path) -> list[str]:
    return [folder.name for folder in (run / "wandb").glob("offline-run-*")]


def wait_for_job(environment: CloudEnvironment, name: str, status: str, seconds: float = 300) -> str:
    """Waits until the newest job of that name has that status and its machine is gone; returns its line of `sky jobs queue`.

    It waits for the machine first: that costs nothing, while `sky jobs queue` takes seconds of CPU time from the processes that
    have to delete the machine.
    """
    environment.cloud.assert_empty(seconds)
    line = queue = ""

    def ready() -> bool:
        nonlocal line, queue
        queue = environment.sky.run("jobs", "queue", "--all").ok().out
        line = next((line for line in queue.splitlines() if f" {name} " in line), "")
        return status in line

    wait_until(ready, seconds, lambda waited: f"{name}: not {status} after {waited:.0f} s\n{queue}", every=3)
    return line
