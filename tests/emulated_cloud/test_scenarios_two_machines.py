"""Two machines that train one run in the bucket: one of them does, and the other one changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.emulated_cloud.environment import CloudEnvironment
from tests.emulated_cloud.pace import patience, wait_until
from tests.emulated_cloud.table import record_metric
from tests.emulated_cloud.test_scenarios_mishaps import TRAINER
from tests.emulated_cloud.training import LONG_SAVE_STEPS, Run, launch, long_run, newest_checkpoint

pytestmark = pytest.mark.cloud
STEPS = 30_000
"""More than the scenario lasts."""
LEASE_SECONDS = 30
"""Instead of 60. Two machines see each other's files with a delay of up to 5 s here, as with SkyPilot's options for gcsfuse."""


def test_two_machines_with_one_run_name(environment: CloudEnvironment, project: Path, tmp_path: Path) -> None:
    def words(cluster: str, *options: str) -> list[str]:
        seconds = {"FINETUNE_LEASE_SECONDS": LEASE_SECONDS}
        return launch("train_a100", *options, "-c", cluster, overrides=long_run(STEPS), RUN_NAME="twice", **seconds)

    environment.sky.run(*words("one", "-d"), cwd=project).ok()
    run = Run(environment, "twice")
    run.wait_for_step(LONG_SAVE_STEPS)

    mistaken = environment.sky.run(*words("two"), cwd=project)
    print(mistaken.out[-1500:])
    assert mistaken.code != 0
    lines = [line for line in mistaken.out.splitlines() if "this run is being trained already" in line]
    assert len(lines) == 1 and "finetune: /bucket/runs/twice: this run is being trained already (machine " in lines[0]
    assert run.record()["attempts"] == 1

    first = environment.machine("one").booted
    assert first and first.run(["pkill", "-STOP", "-f", TRAINER]).returncode == 0
    before = max(run.committed())
    environment.sky.run(*words("two", "-d"), cwd=project).ok()
    wait_until(lambda: run.record()["attempts"] == 2, patience(180), lambda waited: f"no takeover: {run.diagnostics()}")
    run.wait_for_step(before + LONG_SAVE_STEPS)

    assert first.run(["pkill", "-CONT", "-f", TRAINER]).returncode == 0
    ended = environment.sky.run("logs", "one")
    print(ended.out[-1500:])
    assert "finetune: another attempt has taken over this run (machine " in ended.out and ended.code == 100
    after = max(run.committed())
    run.wait_for_step(after + LONG_SAVE_STEPS)
    assert run.record()["attempts"] == 2 and run.record()["status"] == "running"
    environment.sky.run("cancel", "-y", "--all", "two").ok()
    run.wait_for_status("interrupted")
    fetched = run.fetch(tmp_path)
    newest, skipped = newest_checkpoint(fetched)
    assert newest is not None and not skipped
    assert json.loads((newest / "manifest.json").read_text())["lease"] > 1
    reasons = [attempt.reason for attempt in run.account(tmp_path / "ledger").attempts]
    assert reasons == ["taken over", "refused", "interrupted"]
    record_metric(f"taken over at step {before}, went on to {newest.name}; ledger {reasons}")
    for cluster in ("one", "two"):
        environment.sky.run("down", "-y", cluster).ok()
