"""One launch without any trouble: what scenario 1 looks at, and what interrupted runs are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.emulated_cloud.gce import Instance
from tests.emulated_cloud.reckoning import Reckoning, check_nothing_left, reckon
from tests.emulated_cloud.training import BUCKET, Run, launch
from tests.emulated_cloud.world import World

NAME = "whole"


@dataclass(frozen=True)
class Whole:
    """said: what `sky launch` printed; machine: the only one that it took; seconds: from Return to the end of training; objects:
    of the bucket, which was not there before."""

    said: str
    seconds: float
    machine: Instance
    record: dict[str, Any]
    adapter_hash: str
    committed: list[int]
    objects: list[str]
    reckoning: Reckoning


def launch_whole(world: World, project: Path, folder: Path) -> Whole:
    """`sky launch sky/train_a100.yaml` until its machine has gone away by itself."""
    if BUCKET in world.buckets.names():  # of earlier tests
        world.sky.run("storage", "delete", "-y", BUCKET).ok()
    assert BUCKET not in world.buckets.names()
    words = launch("train_a100", "-c", NAME, "-i", "1", "--down", RUN_NAME=NAME)
    launched = world.sky.run(*words, cwd=project).ok()
    machine = world.cloud.machine(NAME)
    run = Run(world, NAME)
    world.cloud.assert_empty(240)
    reckoning = reckon(run, folder)
    check_nothing_left(world)
    return Whole(
        said=launched.out,
        seconds=launched.seconds,
        machine=machine,
        record=run.record(),
        adapter_hash=run.adapter_hash(),
        committed=run.committed(),
        objects=world.buckets.objects(BUCKET),
        reckoning=reckoning,
    )
