"""One launch without any trouble: what scenario 1 looks at, and what interrupted runs are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.emulated_cloud.environment import CloudEnvironment
from tests.emulated_cloud.gce import Instance
from tests.emulated_cloud.reckoning import Reckoning, check_nothing_left, reckon
from tests.emulated_cloud.training import BUCKET, Run, launch

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


def launch_whole(environment: CloudEnvironment, project: Path, folder: Path) -> Whole:
    """`sky launch sky/train_a100.yaml` until its machine has gone away by itself."""
    if BUCKET in environment.buckets.names():  # of earlier tests
        environment.sky.run("storage", "delete", "-y", BUCKET).ok()
    assert BUCKET not in environment.buckets.names()
    words = launch("train_a100", "-c", NAME, "-i", "1", "--down", RUN_NAME=NAME)
    launched = environment.sky.run(*words, cwd=project).ok()
    machine = environment.cloud.machine(NAME)
    run = Run(environment, NAME)
    environment.cloud.assert_empty(240)
    reckoning = reckon(run, folder)
    check_nothing_left(environment)
    return Whole(
        said=launched.out,
        seconds=launched.seconds,
        machine=machine,
        record=run.record(),
        adapter_hash=run.adapter_hash(),
        committed=run.committed(),
        objects=environment.buckets.objects(BUCKET),
        reckoning=reckoning,
    )
