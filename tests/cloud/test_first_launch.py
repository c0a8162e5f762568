"""The real SkyPilot on the emulated cloud: a tiny task is launched, fails over, is preempted, and leaves nothing behind."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from gce_bill import Stretch
from world import World

pytestmark = pytest.mark.cloud

TASK = """\
name: tiny
resources:
  infra: {infra}
  use_spot: true
  disk_size: 60
  any_of:
    - {{accelerators: T4:1, instance_type: n1-highmem-8}}
    - {{accelerators: L4:1, instance_type: g2-standard-8}}
file_mounts:
  /bucket: {{name: {bucket}, store: gcs, mode: MOUNT, persistent: true}}
run: |
  {run}
"""


def write_task(folder: Path, run: str, bucket: str = "ft-tiny", infra: str = "gcp") -> str:
    path = folder / "tiny.yaml"
    path.write_text(TASK.format(run=run.replace("\n", "\n  "), bucket=bucket, infra=infra), encoding="utf-8")
    return str(path)


def price(stretch: Stretch) -> float:
    """US dollars an hour of a made-up table."""
    if not stretch.running:
        return stretch.disk_gb * 0.1 / 730
    return {"T4": 0.20, "L4": 0.30}[stretch.gpu] + stretch.disk_gb * 0.1 / 730


def test_a_launch_runs_writes_to_the_bucket_and_goes_away(world: World, tmp_path: Path) -> None:
    task = write_task(
        tmp_path, "hostname\nnvidia-smi --query-gpu=name --format=csv,noheader\necho written > /bucket/out.txt"
    )
    launched = world.sky.run("launch", "-y", "-c", "tiny", task).ok()
    machine = world.cloud.machine("tiny")
    print(f"launch {launched.seconds:.0f} s")
    assert machine.name in launched.out and {"T4": "Tesla T4", "L4": "NVIDIA L4"}[machine.wish.gpu] in launched.out
    assert world.buckets.read("ft-tiny", "out.txt") == b"written\n"
    assert "UP" in world.sky.run("status", "tiny").ok().out
    assert machine.name in world.sky.run("logs", "tiny", "--no-follow").ok().out
    world.sky.run("down", "-y", "tiny").ok()
    world.cloud.assert_empty()
    print(world.cloud.bill.table(price))
    (stretch,) = world.cloud.bill.stretches
    assert stretch.spot and stretch.running and stretch.end == "deleted"
    assert world.cloud.bill.usd(price) == pytest.approx(price(stretch) * stretch.seconds / 3600)


def test_a_stockout_lands_on_the_next_zone(world: World, tmp_path: Path) -> None:
    """Of what SkyPilot tries first, nothing is left; the first zone that has one gets the launch."""
    world.cloud.market.set_stock(0, gpu="T4", code="ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS")
    world.cloud.market.set_stock(0, gpu="L4", zone="us-central1-a")
    world.cloud.server.calls.clear()
    task = write_task(tmp_path, "echo here", infra="gcp/us-central1")
    launched = world.sky.run("launch", "-y", "-c", "tiny", task).ok()
    machine = world.cloud.machine("tiny")
    asked = [
        call.path.split("/zones/")[1].split("/")[0] for call in world.cloud.calls if call.path.endswith("/bulkInsert")
    ]
    print(f"launch {launched.seconds:.0f} s; asked {asked}")
    assert (machine.wish.zone, machine.wish.gpu) == ("us-central1-b", "L4")
    assert asked == [f"us-central1-{zone}" for zone in "abcfab"]
    world.sky.run("down", "-y", "tiny").ok()


def test_a_managed_job_recovers_from_a_preemption(world: World, tmp_path: Path) -> None:
    run = "echo $SKYPILOT_TASK_ID >> /bucket/attempts\nif [ $(wc -l < /bucket/attempts) = 1 ]; then sleep 600; fi"
    task = write_task(tmp_path, run, bucket="ft-job")
    world.sky.run("jobs", "launch", "-y", "-d", "-n", "job", task).ok()
    first = world.cloud.wait_for_machine("job", 180)
    wait_for_job(world, "RUNNING")
    wait_for_object(world, "ft-job", "attempts")
    began = time.monotonic()
    world.cloud.preempt(first, notice=2)
    second = world.cloud.wait_for_machine("job", 300, other_than=first)
    print(f"recovered on a new machine after {time.monotonic() - began:.0f} s")
    queue = wait_for_job(world, "SUCCEEDED")
    print(queue)
    assert "  1            SUCCEEDED" in queue, "one recovery"
    assert second.name != first.name
    attempts = world.buckets.read("ft-job", "attempts").decode().split()
    assert len(attempts) == 2 and len(set(attempts)) == 1, "the task's id stays the same"
    world.cloud.assert_empty(60)
    assert [stretch.end for stretch in world.cloud.bill.stretches] == ["preempted", "deleted"]


def wait_for_object(world: World, bucket: str, name: str, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while bucket not in world.buckets.names() or name not in world.buckets.objects(bucket):
        assert time.monotonic() < deadline, f"gs://{bucket}/{name} did not appear"
        time.sleep(0.5)


def wait_for_job(world: World, status: str, seconds: float = 300) -> str:
    """What `sky jobs queue` says once a job is in that state."""
    deadline = time.monotonic() + seconds
    while status not in (queue := world.sky.run("jobs", "queue").ok().out):
        assert time.monotonic() < deadline, queue
        time.sleep(3)
    return queue
