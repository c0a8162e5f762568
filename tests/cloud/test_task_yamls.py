"""Task YAMLs beside those that train: the real SkyPilot on the emulated cloud."""

from __future__ import annotations

from pathlib import Path

import pytest
from reckoning import check_nothing_left, reckon
from training import Run, launch
from world import World

pytestmark = pytest.mark.cloud


def test_the_smoke_task_trains_scores_and_reports(world: World, project: Path, tmp_path: Path) -> None:
    """Its set-up installs the demo's weights as well, in the machine."""
    words = launch("smoke", "-c", "smoke", overrides="training.max_steps=40", RUN_NAME="smoke")
    launched = world.sky.run(*words, cwd=project).ok()
    print(f"launch to the report: {launched.seconds:.0f} s")
    machine = world.cloud.machine("smoke")
    assert machine.wish.gpu == "T4" and machine.wish.spot
    run = Run(world, "smoke")
    assert run.record()["status"] == "done"
    assert {"eval.json", "report.html", "report.md", "summary.json"} <= set(run.objects())
    world.sky.run("down", "-y", "smoke").ok()
    reckon(run, tmp_path)
    check_nothing_left(world)
