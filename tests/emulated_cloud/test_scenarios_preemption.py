"""`sky jobs launch sky/train_spot.yaml` on machines that are taken away: nothing is lost, nothing overspent."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from tests.emulated_cloud.environment import CloudEnvironment
from tests.emulated_cloud.gce import Instance
from tests.emulated_cloud.pace import paid_seconds, wait_until
from tests.emulated_cloud.reckoning import check_nothing_left, reckon
from tests.emulated_cloud.table import figure
from tests.emulated_cloud.training import (
    CONFIG,
    HEARTBEAT_SECONDS,
    LOGGING_STEPS,
    SAVE_STEPS,
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
"""Bytes a second: a checkpoint of the tiny model takes seconds."""
TRAINING_SECONDS = 30
"""By the measure of pace.py, that the budget of scenario 5 pays for besides the starts, of which one more than there are attempts
is kept free. A start that is faster than was allowed for leaves the rest to training, too."""
FIRST_SECONDS, REST_SECONDS = 9, 0.2
"""Of training, to the first checkpoint of scenario 5; of them, after each step at least."""
NOTHING_SECONDS = 20
"""In which nothing may happen to a run that was stopped at its budget; the controller looks more often."""


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
    environment.site.upload_bytes_per_second = SLOW_UPLOADS  # of the next machine
    began = time.monotonic()
    sell_out(environment, second)
    environment.cloud.crash(second)
    third = environment.cloud.wait_for_machine("thrice", 300, other_than=second)
    third_came = time.time()
    figure(f"without notice: on a new machine after {time.monotonic() - began:.0f} s, from step {max(run.committed())}")

    half = run.wait_for_half_a_checkpoint(since=third_came)
    environment.site.upload_bytes_per_second = 0
    sell_out(environment, third)
    environment.cloud.crash(third)
    began = time.monotonic()
    assert half not in run.committed(), "the upload was over: no half checkpoint is tested"
    environment.cloud.wait_for_machine("thrice", 300, other_than=third)
    figure(f"during the upload of step {half}: on a new machine after {time.monotonic() - began:.0f} s")

    check_preempted(run, whole, tmp_path, ["interrupted", None, None, "done"])
    assert [stretch.end for stretch in environment.cloud.bill.stretches].count("crashed") == 2


def launch_preempted(environment: CloudEnvironment, project: Path, name: str) -> Run:
    environment.sky.run(*launch("train_spot", "--jobs", "-d", "-n", name, RUN_NAME=name), cwd=project).ok()
    return Run(environment, name)


def preempt_with_notice(run: Run, machine: Instance) -> Instance:
    """After the run's first checkpoints; returns the machine that it goes on on."""
    cloud = run.environment.cloud
    run.wait_for_step(2 * SAVE_STEPS)
    began = time.monotonic()
    sell_out(run.environment, machine)
    cloud.preempt(machine)
    other = cloud.wait_for_machine(run.name, 300, other_than=machine)
    figure(f"with notice: on a new machine after {time.monotonic() - began:.0f} s, from step {max(run.committed())}")
    return other


def check_preempted(run: Run, whole: Whole, folder: Path, reasons: list[str | None]) -> None:
    """That it ends as if nothing had happened. reasons: for which its attempts ended; with notice it can still say so."""
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
    assert len(zones) == len(reasons), "each on a machine elsewhere"
    assert [attempt.reason for attempt in run.account(folder).attempts] == reasons
    figure(
        f"{recoveries} recoveries, {len(zones)} zones, the adapter byte for byte that of a run without interruptions"
    )
    reckon(run, folder)
    check_nothing_left(environment)


@pytest.mark.cloud_short(only=True)
def test_a_budget_that_ends(environment: CloudEnvironment, project: Path, tmp_path: Path) -> None:
    """Scenario 5 in short: without a preemption, and Google refuses once to take the machine away."""
    run, _, budget = launch_poor(environment, project, attempts=1)
    run.wait_for_step(1)
    environment.cloud.faults.add("^DELETE .*/instances/", 503, "backendError", times=1)
    check_budget_stop(run, budget, tmp_path)
    asked = [call for call in environment.cloud.calls if call.method == "DELETE" and "/instances/" in call.path]
    figure(f"its machine's going away was asked for {len(asked)} times")
    assert len(asked) > 1, "the first was refused"
    assert run.record()["attempts"] == 1
    check_nothing_left(environment)


def test_a_budget_that_runs_out(environment: CloudEnvironment, project: Path, tmp_path: Path) -> None:
    """Scenario 5: after the second preemption; nothing restarts the run, and a higher budget does."""
    run, words, budget = launch_poor(environment, project, attempts=3)
    machine = environment.cloud.wait_for_machine("poor", 180)
    for number in (1, 2):
        run.wait_for_step(max(run.committed(), default=0) + 1)
        assert max(run.committed()) < number * 2 * FIRST_SECONDS / REST_SECONDS, "it does not rest after its steps"
        environment.cloud.crash(machine)
        machine = environment.cloud.wait_for_machine("poor", 300, other_than=machine)
    check_budget_stop(run, budget, tmp_path)

    words[words.index(f"MAX_RUN_USD={budget}")] = "MAX_RUN_USD=5"
    environment.sky.run(*words, cwd=project).ok()
    run.wait_for_step(max(run.committed()) + 1)
    environment.sky.run("jobs", "cancel", "-y", "-n", "poor").ok()
    environment.cloud.assert_empty(120)
    assert run.record()["attempts"] == 4
    reckon(run, tmp_path / "cancelled")
    check_nothing_left(environment)


def launch_poor(environment: CloudEnvironment, project: Path, attempts: int) -> tuple[Run, list[str], float]:
    """A managed job in the region with the cheapest L4, so that another start costs what the first did. Returned are the words
    of its launch too, and its budget in US dollars, which suffices for so many attempts."""
    region, usd_per_hour = cheapest_l4(environment, project)
    seconds = paid_seconds(attempts + 1, attempts * TRAINING_SECONDS)
    budget = round(seconds * usd_per_hour / 3600, 4)
    figure(f"budget ${budget}, for {seconds:.0f} s")
    long = f"{long_run(100 * STEPS, save_steps=1000)} checkpoint.every_minutes={FIRST_SECONDS / 60}"
    machine = ("--gpus", "L4:1", "--instance-type", "g2-standard-8", "--infra", f"gcp/{region}")
    begin = ("train_spot", "--jobs", "-d", "-n", "poor", *machine)
    words = launch(*begin, overrides=long, RUN_NAME="poor", MAX_RUN_USD=budget, FT_STEP_SECONDS=REST_SECONDS)
    environment.sky.run(*words, cwd=project).ok()
    return Run(environment, "poor"), words, budget


def check_budget_stop(run: Run, budget: float, folder: Path) -> None:
    """Waits until the run has ended at its budget, and that nothing restarts it."""
    environment = run.environment
    run.wait_for_status("budget_stop")
    wait_for_job(environment, "poor", "SUCCEEDED")
    reckoning = reckon(run, folder / "stopped")
    assert budget / 3 < reckoning.ledger_usd <= budget
    heartbeat = HEARTBEAT_SECONDS / reckoning.ledger_seconds * reckoning.ledger_usd
    assert reckoning.bill_usd - reckoning.tail_usd < budget + heartbeat
    newest, passed_over = newest_checkpoint(folder / "stopped" / "poor")
    assert newest and newest.name == f"step-{run.record()['steps']['done']}" and not passed_over
    assert run.record()["stop"]["reason"] == "budget" and "reserved for a restart" in run.record()["stop"]["detail"]
    machines = len(environment.cloud.bill.stretches)
    time.sleep(NOTHING_SECONDS)
    assert len(environment.cloud.bill.stretches) == machines and not environment.cloud.machines(), (
        "something has restarted it"
    )


def cheapest_l4(environment: CloudEnvironment, project: Path) -> tuple[str, float]:
    """Region and US dollars an hour, of those that sky/train_spot.yaml may take."""
    planned = environment.sky.program("finetune", "plan", CONFIG, "--json", cwd=project).ok().out
    rows = json.loads(planned[planned.index("{") :])["rows"]
    usable = [row for row in rows if row["chosen"] and row["spot"] and row["gpu"] == "L4"]
    cheapest = min(usable, key=lambda row: float(row["usd"]))
    return cheapest["region"], float(cheapest["usd_per_hour"])


def sell_out(environment: CloudEnvironment, machine: Instance) -> None:
    """Whoever takes a spot machine away needs it: there is none left in its zone."""
    environment.cloud.market.set_stock(0, zone=machine.wish.zone, spot=True)


def wandb_runs(run: Path) -> list[str]:
    return [folder.name for folder in (run / "wandb").glob("offline-run-*")]


def wait_for_job(environment: CloudEnvironment, name: str, status: str, seconds: float = 300) -> str:
    """The line of `sky jobs queue` about the newest job of that name, once its machine has gone and it is in that state.

    The machine first: to look into the cloud costs nothing, and `sky jobs queue` takes the processor for seconds from those who
    are to take the machine away.
    """
    environment.cloud.assert_empty(seconds)
    line = queue = ""

    def come() -> bool:
        nonlocal line, queue
        queue = environment.sky.run("jobs", "queue", "--all").ok().out
        line = next((line for line in queue.splitlines() if f" {name} " in line), "")
        return status in line

    wait_until(come, seconds, lambda waited: f"{name}: not {status} after {waited:.0f} s\n{queue}", every=3)
    return line
