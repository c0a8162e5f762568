"""`sky jobs launch sky/train_spot.yaml` on machines that are taken away: nothing is lost, nothing overspent."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from gce import Instance
from reckoning import check_nothing_left, reckon
from table import figure
from training import (
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
from whole import Whole
from world import World

pytestmark = pytest.mark.cloud
SLOW_UPLOADS = 40_000
"""Bytes a second: a checkpoint of the tiny model takes seconds."""
BUDGET_SECONDS = 420
"""Of a machine, that the budget of scenario 5 pays for. At the third attempt, what is kept for a start still fits."""
FIRST_SECONDS, REST_SECONDS = 9, 0.2
"""Of training, to the first checkpoint of scenario 5; of them, after each step at least."""
NOTHING_SECONDS = 20
"""In which nothing may happen to a run that was stopped at its budget; the controller looks more often."""


@pytest.mark.xdist_group("whole")
def test_preempted_three_times(world: World, project: Path, whole: Whole, tmp_path: Path) -> None:
    """Scenario 4: with notice, without, and in the middle of a checkpoint's upload."""
    words = launch("train_spot", "--jobs", "-d", "-n", "thrice", RUN_NAME="thrice")
    world.sky.run(*words, cwd=project).ok()
    run = Run(world, "thrice")

    first = world.cloud.wait_for_machine("thrice", 180)
    run.wait_for_step(2 * SAVE_STEPS)
    began = time.monotonic()
    sell_out(world, first)
    world.cloud.preempt(first)
    second = world.cloud.wait_for_machine("thrice", 300, other_than=first)
    figure(f"with notice: on a new machine after {time.monotonic() - began:.0f} s, from step {max(run.committed())}")

    run.wait_for_step(max(run.committed()) + 2 * SAVE_STEPS)
    world.site.upload_bytes_per_second = SLOW_UPLOADS  # of the next machine
    began = time.monotonic()
    sell_out(world, second)
    world.cloud.crash(second)
    third = world.cloud.wait_for_machine("thrice", 300, other_than=second)
    third_came = time.time()
    figure(f"without notice: on a new machine after {time.monotonic() - began:.0f} s, from step {max(run.committed())}")

    half = run.wait_for_half_a_checkpoint(since=third_came)
    world.site.upload_bytes_per_second = 0
    sell_out(world, third)
    world.cloud.crash(third)
    began = time.monotonic()
    assert half not in run.committed(), "the upload was over: no half checkpoint is tested"
    world.cloud.wait_for_machine("thrice", 300, other_than=third)
    figure(f"during the upload of step {half}: on a new machine after {time.monotonic() - began:.0f} s")

    run.wait_for_status("done", 400)
    queue = wait_for_job(world, "thrice", "SUCCEEDED")
    assert re.search(r"\s3\s+SUCCEEDED", queue), f"three recoveries\n{queue}"
    world.cloud.assert_empty(60)
    record = run.record()
    assert (record["status"], record["steps"]["done"], record["attempts"]) == ("done", STEPS, 4)
    assert run.adapter_hash() == whole.adapter_hash
    fetched = run.fetch(tmp_path)
    assert steps_in_tensorboard(fetched) == [1, *range(LOGGING_STEPS, STEPS + 1, LOGGING_STEPS)]
    assert {name.rpartition("-")[2] for name in wandb_runs(fetched)} == {"thrice"}
    stretches = world.cloud.bill.stretches
    assert len({stretch.zone for stretch in stretches}) == 4, "each on a machine elsewhere"
    reasons = [attempt.reason for attempt in run.account(tmp_path).attempts]
    assert reasons == ["interrupted", None, None, "done"], "with notice it could still say so"
    figure("3 recoveries, 4 zones, the adapter byte for byte that of a run without interruptions")
    assert [stretch.end for stretch in stretches].count("crashed") == 2
    reckon(run, tmp_path)
    check_nothing_left(world)


def test_a_budget_that_runs_out(world: World, project: Path, tmp_path: Path) -> None:
    """Scenario 5: after the second preemption; nothing restarts the run, and a higher budget does."""
    budget = round(BUDGET_SECONDS * usd_per_hour(world, project) / 3600, 4)
    long = f"{long_run(100 * STEPS, save_steps=1000)} checkpoint.every_minutes={FIRST_SECONDS / 60}"
    begin = ("train_spot", "--jobs", "-d", "-n", "poor", "--gpus", "L4:1", "--instance-type", "g2-standard-8")
    words = launch(*begin, overrides=long, RUN_NAME="poor", MAX_RUN_USD=budget, FT_STEP_SECONDS=REST_SECONDS)
    world.sky.run(*words, cwd=project).ok()
    run = Run(world, "poor")
    machine = world.cloud.wait_for_machine("poor", 180)
    for number in (1, 2):
        run.wait_for_step(max(run.committed(), default=0) + 1)
        assert max(run.committed()) < number * 2 * FIRST_SECONDS / REST_SECONDS, "it does not rest after its steps"
        world.cloud.crash(machine)
        machine = world.cloud.wait_for_machine("poor", 300, other_than=machine)
    run.wait_for_status("budget_stop")
    wait_for_job(world, "poor", "SUCCEEDED")
    world.cloud.assert_empty(60)
    reckoning = reckon(run, tmp_path / "stopped")
    figure(f"budget ${budget}")
    assert budget / 2 < reckoning.ledger_usd <= budget
    assert reckoning.bill_usd - reckoning.tail_usd < budget * (1 + HEARTBEAT_SECONDS / BUDGET_SECONDS)
    newest, passed_over = newest_checkpoint(tmp_path / "stopped" / "poor")
    assert newest and newest.name == f"step-{run.record()['steps']['done']}" and not passed_over
    assert run.record()["stop"]["reason"] == "budget" and "kept for a start" in run.record()["stop"]["detail"]
    machines = len(world.cloud.bill.stretches)
    time.sleep(NOTHING_SECONDS)
    assert len(world.cloud.bill.stretches) == machines and not world.cloud.machines(), "something has restarted it"

    words[words.index(f"MAX_RUN_USD={budget}")] = "MAX_RUN_USD=5"
    world.sky.run(*words, cwd=project).ok()
    run.wait_for_step(max(run.committed()) + 1)
    world.sky.run("jobs", "cancel", "-y", "-n", "poor").ok()
    world.cloud.assert_empty(120)
    assert run.record()["attempts"] == 4
    reckon(run, tmp_path / "cancelled")
    check_nothing_left(world)


def usd_per_hour(world: World, project: Path) -> float:
    """Of the cheapest L4 of sky/train_spot.yaml."""
    planned = world.sky.program("finetune", "plan", CONFIG, "--json", cwd=project).ok().out
    rows = json.loads(planned[planned.index("{") :])["rows"]
    usable = [row for row in rows if row["chosen"] and row["spot"] and row["gpu"] == "L4"]
    return float(min(usable, key=lambda row: float(row["usd"]))["usd_per_hour"])


def sell_out(world: World, machine: Instance) -> None:
    """Whoever takes a spot machine away needs it: there is none left in its zone."""
    world.cloud.market.set_stock(0, zone=machine.wish.zone, spot=True)


def wandb_runs(run: Path) -> list[str]:
    return [folder.name for folder in (run / "wandb").glob("offline-run-*")]


def wait_for_job(world: World, name: str, status: str, seconds: float = 300) -> str:
    """The line of `sky jobs queue` about the newest job of that name, once it is in that state."""
    deadline = time.monotonic() + seconds
    while True:
        queue = world.sky.run("jobs", "queue", "--all").ok().out
        line = next((line for line in queue.splitlines() if f" {name} " in line), "")
        if status in line:
            return line
        assert time.monotonic() < deadline, queue
        time.sleep(3)
