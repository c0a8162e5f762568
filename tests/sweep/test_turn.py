"""One decision at a time, also by workers that are paused, dead or elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.budget.claims import ClaimFolder
from finetune.budget.lease import Lease
from finetune.errors import TakenOver, TransientError
from finetune.machine.process import ProcessId, this_process
from finetune.sweep import turn
from finetune.sweep.folder import Result, Sweep, SweepFolder
from finetune.sweep.grants import Grant, Grants
from finetune.sweep.turn import Machine, Nothing, Work, take_score, take_turn
from finetune.sweep.workers import Worker
from tests.helpers.errors import raises


@pytest.fixture(autouse=True)
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_LEASE_SECONDS", "1")
    monkeypatch.delenv("SKYPILOT_TASK_ID", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    folder = SweepFolder(tmp_path, "s")
    folder.path.mkdir(parents=True)
    return folder


@pytest.fixture
def worker(folder: SweepFolder) -> Iterator[Worker]:
    with Worker(folder.path) as worker:
        yield worker


def work_of(folder: SweepFolder, worker: Worker, **changes: Any) -> Work:
    sweep = Sweep("s", {}, "", {}, "grid", 2, 0, 2, [5], [["lora.r=2"], ["lora.r=4"]])
    machine = Machine(None, False, None, 1.0)
    work = Work(sweep, folder, worker, machine, None, 1, lambda trial: (f"lora.r={2 + 2 * trial}",), print)
    return replace(work, **changes)


def test_a_turn_writes_a_grant_and_its_trial(folder: SweepFolder, worker: Worker) -> None:
    found = take_turn(work_of(folder, worker))
    assert isinstance(found, Grant) and (found.trial, found.rung, found.worker) == (0, 0, worker.token)
    assert Grants(folder.path / "grants").newest() == {0: found}
    assert list(folder.trials()[0].settings) == ["lora.r=2"]
    assert ClaimFolder(folder.path / "lease").read(ClaimFolder(folder.path / "lease").listed()[-1]).state == "ended"


def test_a_worker_that_was_paused_in_its_turn_starts_nothing(
    folder: SweepFolder, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one has taken over between its look and its write: the grant is withdrawn, and the next turn decides anew."""
    checks: list[int] = []

    def check(self: Lease, max_age: float = 0.0) -> None:
        checks.append(self.number)
        if len(checks) == 1:
            assert len(list((folder.path / "grants").iterdir())) == 1
            raise TakenOver("by another one", code="run.taken_over")

    monkeypatch.setattr(Lease, "check", check)
    found = take_turn(work_of(folder, worker))
    assert isinstance(found, Grant) and found.number == checks[1] > checks[0]
    assert [path.name for path in (folder.path / "grants").iterdir()] == [
        f"grant-{found.number:06d}-{worker.token}.json"
    ], "the other one is gone"


def test_a_turn_waits_for_that_of_another_worker(folder: SweepFolder, worker: Worker) -> None:
    with Lease(print) as other:
        other.acquire(folder.as_run, lambda: ({}, 0))
        threading.Timer(1.5, other.release).start()
        began = time.monotonic()
        assert isinstance(take_turn(work_of(folder, worker)), Grant)
        assert time.monotonic() - began > 1.0


def test_a_turn_that_does_not_come(folder: SweepFolder, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn, "PATIENCE_SECONDS", 0.5)
    with Lease(print) as other:
        other.acquire(folder.as_run, lambda: ({}, 0))
        with raises("sweep.held", kind=TransientError):
            take_turn(work_of(folder, worker))


def test_two_workers_never_get_the_same_trial(folder: SweepFolder, worker: Worker) -> None:
    found: list[Grant | Nothing] = []
    with Worker(folder.path) as other:
        threads = [
            threading.Thread(target=lambda one=one: found.append(take_turn(work_of(folder, one))))
            for one in (worker, other)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {grant.trial for grant in found if isinstance(grant, Grant)} == {0, 1}
        nothing = take_turn(work_of(folder, Worker(folder.path)))
        assert isinstance(nothing, Nothing) and (nothing.why, nothing.detail) == (
            "others",
            "2 other workers do what is left",
        )


def test_the_trial_of_a_killed_process_is_free_at_once(folder: SweepFolder, worker: Worker) -> None:
    code = f"""
import os, signal
from pathlib import Path
from tests.sweep.test_turn import SweepFolder, Worker, take_turn, work_of
folder = SweepFolder(Path({str(folder.runs)!r}), "s")
with Worker(folder.path) as worker:
    print(take_turn(work_of(folder, worker)).trial, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-9, "0\n"), done.stderr
    found = take_turn(work_of(folder, worker))
    assert isinstance(found, Grant) and found.trial == 0


def elsewhere(folder: SweepFolder, *, task: str = "", beats: bool = False) -> Worker:
    """A worker on another machine, which holds trial 0."""
    other = Worker(folder.path)
    process = ProcessId("another boot", 7, 7, "another machine")
    other._claim = replace(other._claim, process=process, task=task, seconds=1.0)
    other._claims.create()
    other._claim = replace(other._claim, number=9)
    other._claims.write(other._claim)
    if beats:
        other._thread.start()
    Grants(folder.path / "grants").write(Grant(1, 0, 0, None, other.token, ["lora.r=2"]))
    Grants(folder.path / "grants").write(Grant(2, 1, 0, None, other.token, ["lora.r=4"]))
    return other


def test_a_worker_elsewhere_is_dead_once_its_claim_does_not_change(folder: SweepFolder, worker: Worker) -> None:
    elsewhere(folder)
    began = time.monotonic()
    found = take_turn(work_of(folder, worker))
    assert isinstance(found, Grant) and found.trial == 0
    assert time.monotonic() - began > 1.0, "the length of its lease"


def test_a_worker_elsewhere_that_shows_signs_of_life_keeps_its_trials(folder: SweepFolder, worker: Worker) -> None:
    other = elsewhere(folder, beats=True)
    found = take_turn(work_of(folder, worker))
    other._closing.set()
    assert isinstance(found, Nothing) and found.why == "others"


def test_an_earlier_machine_of_this_job_is_dead(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """SkyPilot starts a machine for a managed job only after the one before has ended."""
    elsewhere(folder, task="job-7")
    monkeypatch.setenv("SKYPILOT_TASK_ID", "job-7")
    with Worker(folder.path) as worker:
        began = time.monotonic()
        assert isinstance(take_turn(work_of(folder, worker)), Grant)
        assert time.monotonic() - began < 1.0


def test_a_grant_at_its_rung_reserves_nothing(folder: SweepFolder, worker: Worker) -> None:
    """A kill came between the result and the end of the grant."""
    elsewhere(folder, beats=False)
    for trial in (0, 1):
        folder.add_result(Result(trial, 0, 5, 1.0 + trial, ""))
    found = take_turn(work_of(folder, worker))
    assert isinstance(found, Grant) and (found.trial, found.rung) == (0, 1)


def test_the_score_of_the_best_trial(folder: SweepFolder, worker: Worker) -> None:
    work = work_of(folder, worker)
    assert isinstance(take_score(work, lambda run: False), Nothing), "no trial is at the end"
    for place in ((0, 0), (1, 0), (1, 1)):
        folder.add_result(Result(*place, 5, 2.0 - place[0], ""))
    grant = take_turn(work)
    assert isinstance(grant, Nothing) and grant.why == "done"
    from finetune.sweep.folder import Trial

    folder.add_trial(Trial(1, "s-t01", ["lora.r=4"]))
    assert isinstance(take_score(work, lambda run: True), Nothing), "it has its score"
    grant = take_score(work, lambda run: False)
    assert isinstance(grant, Grant) and (grant.trial, grant.rung) == (1, 2)
    with Worker(folder.path) as other:
        found = take_score(work_of(folder, other), lambda run: False)
        assert isinstance(found, Nothing) and found.why == "others"


def test_a_claim_says_who(folder: SweepFolder, worker: Worker) -> None:
    (path,) = (folder.path / "workers").iterdir()
    claim = json.loads(path.read_text())
    assert claim["process"]["pid"] == os.getpid() == this_process().pid and claim["state"] == "live"
