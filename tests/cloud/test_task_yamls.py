"""Our task YAMLs as typed, from the root of the project, with its policy: the real SkyPilot on the emulated cloud."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from world import World

pytestmark = pytest.mark.cloud
BUCKET = "finetune-text2sql-test-you"
QUICK = "data.max_train_records=16 evaluation.max_questions=4 training.eval_steps=1000"


def test_the_smoke_task_trains_scores_and_reports(world: World, project: Path) -> None:
    words = [
        "launch",
        "-y",
        "-c",
        "smoke",
        "sky/smoke.yaml",
        "--env",
        "FINETUNE_ALLOW_CPU=1",
        "--env",
        f"OVERRIDES={QUICK}",
    ]
    launched = world.sky.run(*words, cwd=project, timeout=900).ok()
    print(f"launch to the report: {launched.seconds:.0f} s\n{launched.out}")
    machine = world.cloud.machine("smoke")
    assert machine.wish.gpu == "T4" and machine.wish.spot
    assert "finetune: of " in launched.out, "the policy has chosen"
    runs = [name for name in world.buckets.objects(BUCKET, "runs/") if name.endswith("/run.json")]
    record = json.loads(world.buckets.read(BUCKET, next(name for name in runs if "/base/" not in name)))
    assert record["status"] == "done"
    assert any(name.endswith("/report.html") for name in world.buckets.objects(BUCKET, "runs/"))
    world.sky.run("down", "-y", "smoke").ok()
