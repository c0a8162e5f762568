"""`sky launch` of our task YAMLs as typed, from the root of the project, with its policy."""

from __future__ import annotations

from pathlib import Path

import pytest
from reckoning import check_nothing_left, reckon
from training import BUCKET, STEPS, Run, launch
from world import World

pytestmark = pytest.mark.cloud


def test_train_a100_as_typed(world: World, project: Path, tmp_path: Path) -> None:
    """Scenario 1: policy, spot machine, bucket, data, set-up, training, checkpoints, autodown."""
    words = launch("train_a100", "-c", "whole", "-i", "1", "--down", RUN_NAME="whole")
    launched = world.sky.run(*words, cwd=project).ok()
    print(f"launch to the end of training: {launched.seconds:.0f} s\n{launched.out}")
    machine = world.cloud.machine("whole")
    assert machine.wish.gpu == "A100" and machine.wish.spot
    assert "finetune: of " in launched.out, "the policy has chosen"
    run = Run(world, "whole")
    record = run.record()
    assert (record["status"], record["steps"]["done"]) == ("done", STEPS)
    assert run.committed()[-1] == STEPS
    assert any(name.startswith("data/") for name in world.buckets.objects(BUCKET))
    world.cloud.assert_empty(240)
    reckon(run, tmp_path)
    check_nothing_left(world)
