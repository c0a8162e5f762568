"""Scenario 8: the training process hangs, the machine's disk fills, the network is cut: each ends as documented."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.emulated_cloud.environment import CloudEnvironment
from tests.emulated_cloud.pace import paid_seconds, patience, wait_until
from tests.emulated_cloud.reconciliation import check_nothing_left, reconcile
from tests.emulated_cloud.table import record_metric
from tests.emulated_cloud.training import HEARTBEAT_SECONDS, LONG_SAVE_STEPS, Run, launch, long_run, newest_checkpoint

pytestmark = pytest.mark.cloud
TRAINER = "^/home/gcpuser/finetune-env/bin/python .*finetune train"
HANG_SECONDS = 45
"""That MAX_HOURS of the hanging run allows, besides its start, to reach its first checkpoint; scaled by pace.py."""
DISK = 1 << 30
"""Size in bytes of a machine's disk in the tests that fill it."""
CUT_SECONDS = 120
NOTICED_SECONDS = 240
"""Within which SkyPilot has to notice that the network is cut, or back: it waits for every ssh to time out."""
AUTOSTOP_SECONDS = 240
"""Within which an idle machine has to be gone with -i 1."""


def test_a_run_that_hangs(environment: CloudEnvironment, project: Path, tmp_path: Path) -> None:
    """Its process is suspended, and with it the budget's watchdog: MAX_HOURS of the job that started it ends it."""
    steps, hours = 1200, round(paid_seconds(1, HANG_SECONDS) / 3600, 4)
    begin = ("train_a100", "-d", "-c", "hang", "-i", "1", "--down")
    words = launch(*begin, overrides=long_run(steps), RUN_NAME="hang", MAX_HOURS=hours, GRACE_SECONDS=5)
    environment.sky.run(*words, cwd=project).ok()
    run = Run(environment, "hang")
    run.wait_for_step(LONG_SAVE_STEPS)
    booted = environment.machine("hang").booted
    assert booted and booted.run(["pkill", "-STOP", "-f", TRAINER]).returncode == 0
    stopped = time.time()
    ended = environment.sky.run("logs", "hang")
    print(ended.out[-1500:])
    record_metric(f"ended {time.time() - stopped:.0f} s after it hung")
    assert ended.code == 0, "the exit code of the job"
    assert (
        f"machine: {hours:.4f} hours are over (MAX_HOURS={hours}, MAX_RUN_USD=25): stopped, the newest checkpoint is kept in "
        "/bucket/runs/hang"
        in ended.out
        and "next: finetune launch" in ended.out
    )
    kept = max(run.committed())
    assert newest_in_bucket(run, tmp_path / "stopped").name == f"step-{kept}" and kept < steps
    (attempt,) = run.account(tmp_path / "ledger").attempts
    (stretch,) = environment.cloud.bill.stretches
    off = abs(attempt.seconds - (stopped - stretch.began))
    assert attempt.reason is None and off < patience(4 * HEARTBEAT_SECONDS), "the ledger has the time until it hung"

    environment.cloud.assert_empty(AUTOSTOP_SECONDS)
    record_metric(f"the machine went away {environment.cloud.bill.stretches[0].seconds:.0f} s after it began")
    check_nothing_left(environment)


def test_a_disk_that_is_nearly_full(environment: CloudEnvironment, project: Path, tmp_path: Path) -> None:
    """The run is stopped while there is still room to save a checkpoint, and for SkyPilot to end the job."""
    environment.site.disk_bytes = DISK
    steps = 600
    words = launch("train_a100", "-d", "-c", "full", "-i", "1", "--down", RUN_NAME="full", overrides=long_run(steps))
    environment.sky.run(*words, cwd=project).ok()
    environment.site.disk_bytes = 0
    run = Run(environment, "full")
    run.wait_for_step(LONG_SAVE_STEPS)
    environment.machine("full").fill_disk(leave=DISK // 200)
    ended = environment.sky.run("logs", "full")
    print(ended.out[-1500:])
    lines = [line for line in ended.out.splitlines() if "disk" in line]
    assert len(lines) == 1 and lines[0].endswith(
        "MiB left): stopped, what was saved is kept; launch again with a larger resources.disk_size, or free some space, with "
        "the same --env RUN_NAME"
    ), lines
    assert "machine: the disk was nearly full (" in lines[0]
    assert "status: FAILED" in ended.out and ended.code == 100, "code of `sky logs` for a job that has failed"
    kept = newest_in_bucket(run, tmp_path / "stopped").name
    assert run.record()["status"] == "interrupted" and kept == f"step-{run.record()['steps']['done']}", (
        "nothing is lost"
    )

    again = environment.sky.run(*launch("train_a100", "-c", "on", RUN_NAME="full"), cwd=project).ok()
    assert f"resuming from /bucket/runs/full/checkpoints/{kept}" in again.out
    assert (run.record()["status"], run.record()["steps"]["done"]) == ("done", steps)
    environment.sky.run("down", "-y", "on").ok()
    environment.cloud.assert_empty(AUTOSTOP_SECONDS)
    reconcile(run, tmp_path / "bill")
    check_nothing_left(environment)


def test_a_disk_that_is_full_at_once(environment: CloudEnvironment, project: Path, tmp_path: Path) -> None:
    """Nothing can be written any more, not even by SkyPilot: the reserved room lets it end the job all the same."""
    environment.site.disk_bytes = DISK
    words = launch("train_a100", "-d", "-c", "brim", "-i", "1", "--down", RUN_NAME="brim", overrides=long_run(9000))
    environment.sky.run(*words, cwd=project).ok()
    run = Run(environment, "brim")
    run.wait_for_step(2 * LONG_SAVE_STEPS)
    environment.machine("brim").fill_disk()
    filled = time.time()
    environment.cloud.assert_empty(AUTOSTOP_SECONDS)
    assert newest_in_bucket(run, tmp_path / "stopped").name == f"step-{max(run.committed())}"
    (attempt,), (stretch,) = run.account(tmp_path / "ledger").attempts, environment.cloud.bill.stretches
    record_metric(
        f"gone after {time.time() - filled:.0f} s; full after {filled - stretch.began:.1f} s, ledger {attempt.seconds:.1f} s, "
        f"bill {stretch.seconds:.1f} s"
    )
    assert attempt.seconds > filled - stretch.began - patience(2 * HEARTBEAT_SECONDS), (
        "the ledger has the time until then"
    )
    check_nothing_left(environment)


def test_a_cut_line(environment: CloudEnvironment, project: Path, tmp_path: Path) -> None:
    """The laptop cannot reach the machine for two minutes. Training is not affected, and SkyPilot does not give the machine
    up."""
    words = launch("train_a100", "-d", "-c", "cut", RUN_NAME="cut", overrides=long_run(600))
    environment.sky.run(*words, cwd=project).ok()
    run = Run(environment, "cut")
    run.wait_for_step(LONG_SAVE_STEPS)
    instance = environment.cloud.machine("cut")
    environment.cloud.cut_off(instance, "laptop")
    cut, before = time.monotonic(), max(run.committed())
    status = refreshed(environment, "cut", "INIT", NOTICED_SECONDS)
    record_metric(f"status after {time.monotonic() - cut:.0f} s")
    assert "10m (down)" in status, "not given up, and autostop is still set"
    logs = environment.sky.run("logs", "cut", "--no-follow")
    assert logs.code == 1 and "skipped for cluster 'cut' (status: INIT)" in logs.out
    run.wait_for_step(before + 2 * LONG_SAVE_STEPS)
    assert environment.cloud.machine("cut") is instance, "SkyPilot leaves the machine alone"
    time.sleep(max(0.0, CUT_SECONDS - (time.monotonic() - cut)))
    environment.cloud.reconnect(instance)
    run.wait_for_status("done")
    refreshed(environment, "cut", "UP", NOTICED_SECONDS)  # `sky logs` uses the status that this command has found
    ended = environment.sky.run("logs", "cut", "--no-follow").ok()
    assert "the adapter is in /bucket/runs/cut/adapter" in ended.out
    assert run.record()["attempts"] == 1
    environment.sky.run("down", "-y", "cut").ok()
    reconcile(run, tmp_path)
    check_nothing_left(environment)


def refreshed(environment: CloudEnvironment, cluster: str, word: str, seconds: float) -> str:
    """Repeats `sky status --refresh` until `word` is in its output, and returns that. It prints the old status if the server's
    own check, which may have begun earlier, takes more than 20 s."""
    status = ""

    def ready() -> bool:
        nonlocal status
        status = environment.sky.run("status", "--refresh", cluster).ok().out
        print(status)
        return word in status

    wait_until(ready, seconds, lambda waited: f"not {word} after {waited:.0f} s:\n{status}", every=0)
    return status


def newest_in_bucket(run: Run, folder: Path) -> Path:
    """The newest valid checkpoint of the run in the bucket, fetched into `folder`."""
    newest, _ = newest_checkpoint(run.fetch(folder))
    assert newest is not None, run.objects()
    return newest
