"""One launch without interruptions, of a run with its score: scenario 1 checks it, and interrupted runs are compared with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.emulated_cloud.environment import CloudEnvironment
from tests.emulated_cloud.gce import Instance
from tests.emulated_cloud.reconciliation import Reconciliation, check_nothing_left, reconcile
from tests.emulated_cloud.training import BUCKET, Run, launch

NAME = "whole"


@dataclass(frozen=True)
class Whole:
    """output: of `sky launch`; machine: the only one that it used; seconds: from the command to the end of the job; objects: of
    the bucket, which did not exist before."""

    output: str
    seconds: float
    machine: Instance
    record: dict[str, Any]
    adapter_hash: str
    committed: list[int]
    objects: list[str]
    reconciliation: Reconciliation


def launch_whole(environment: CloudEnvironment, project: Path, folder: Path) -> Whole:
    """Runs `sky launch sky/train_a100.yaml` and waits until its machine has gone down by itself."""
    if BUCKET in environment.buckets.names():  # left by earlier tests
        environment.sky.run("storage", "delete", "-y", BUCKET).ok()
    assert BUCKET not in environment.buckets.names()
    words = launch("train_a100", "-c", NAME, "-i", "1", "--down", RUN_NAME=NAME, EVALUATE=1)
    launched = environment.sky.run(*words, cwd=project).ok()
    machine = environment.cloud.machine(NAME)
    run = Run(environment, NAME)
    environment.cloud.assert_empty(240)
    reconciliation = reconcile(run, folder)
    check_nothing_left(environment)
    return Whole(
        output=launched.out,
        seconds=launched.seconds,
        machine=machine,
        record=run.record(),
        adapter_hash=run.adapter_hash(),
        committed=run.committed(),
        objects=environment.buckets.objects(BUCKET),
        reconciliation=reconciliation,
    )
