"""Saving behind the training's back: submit never waits, the newest wins, a failed save is told and kept."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune.checkpoint import async_saver as saver_module
from finetune.checkpoint.async_saver import Committed, Saver
from finetune.checkpoint.filesystem import Disk
from finetune.checkpoint.store import CheckpointStore, read_manifest
from tests.helpers.errors import raises

QUICK = 0.25
"""Seconds within which a call has not waited for a copy, on a busy machine."""
SOON = 20.0


class Gate(Disk):
    """A disk whose copies wait until they are let through, or fail with an error number."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.begun = threading.Semaphore(0)
        self.error: int | None = None
        self.tries = 0

    def copy_file(self, source: Path, target: Path) -> tuple[int, str]:
        self.begun.release()
        assert self.open.wait(SOON)
        self.tries += 1
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        return super().copy_file(source, target)


class Bench:
    """A saver with its store, and what it said and committed."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.gate = scratch, Gate()
        self.said: list[str] = []
        self.committed: list[Committed] = []
        self.store = CheckpointStore(scratch / "store", run_id="r", disk=self.gate)
        self.saver = Saver(self.store, self.said.append, self.committed.append)
        self.submitted = 0

    def submit(self, step: int) -> Path:
        """Returns where the snapshot lies from then on."""
        folder = self.scratch / f"snapshot-{step}"
        folder.mkdir()
        (folder / "weights.bin").write_bytes(bytes([step]) * 1000)
        began = time.monotonic()
        self.saver.submit(folder, step=step, config_hash="c", data_hash="d", attempt=1)
        assert time.monotonic() - began < QUICK
        self.submitted += 1
        assert not folder.exists()
        return folder.with_name(f"{folder.name}.save-{self.submitted}")

    def steps(self) -> set[str]:
        return {path.name for path in self.store.root.iterdir()}

    def until(self, true: Callable[[], object]) -> None:
        end = time.monotonic() + SOON
        while not true():
            assert time.monotonic() < end
            time.sleep(0.005)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(saver_module, "CLOSE_SECONDS", 0.3)
    made = Bench(tmp_path)
    yield made
    made.gate.open.set()
    made.saver.close()


def test_a_snapshot_is_committed_reported_and_deleted(bench: Bench) -> None:
    snapshot = bench.submit(5)
    assert bench.gate.begun.acquire(timeout=SOON)
    time.sleep(0.1)
    assert bench.committed == []
    bench.gate.open.set()
    last = bench.saver.finish()
    assert last is not None and bench.committed == [last]
    assert (last.step, last.folder, last.bytes) == (5, bench.store.root / "step-5", 1000)
    assert 0.1 <= last.seconds < SOON
    assert bench.store.latest_valid() == (last.folder, [])
    assert not snapshot.exists()
    assert bench.said == []
    bench.saver.check()


def test_nothing_submitted_is_nothing_to_finish(bench: Bench) -> None:
    assert bench.saver.finish() is None
    bench.saver.check()


def test_while_a_copy_runs_the_newest_waits_and_takes_the_place_of_an_older_one(bench: Bench) -> None:
    snapshots = {1: bench.submit(1)}
    assert bench.gate.begun.acquire(timeout=SOON)
    for step in (2, 3, 4):
        snapshots[step] = bench.submit(step)
    assert bench.said == [
        "step 1 is still being copied; step 2 waits",
        "step 1 is still being copied; step 3 waits in place of step 2, which is dropped",
        "step 1 is still being copied; step 4 waits in place of step 3, which is dropped",
    ]
    bench.until(lambda: not snapshots[2].exists() and not snapshots[3].exists())
    assert snapshots[1].exists() and snapshots[4].exists()
    bench.gate.open.set()
    last = bench.saver.finish()
    assert last is not None and last.step == 4
    assert [each.step for each in bench.committed] == [1, 4]
    assert bench.steps() == {"step-1", "step-4"}
    assert read_manifest(last.folder)["number"] == 2


def test_older_checkpoints_are_pruned_after_each_commit(bench: Bench) -> None:
    bench.gate.open.set()
    for step in (1, 2, 3, 4):
        bench.submit(step)
        bench.saver.finish()
    assert bench.steps() == {"step-3", "step-4"}


def test_a_step_that_is_saved_twice_does_not_change_under_its_copy(bench: Bench, tmp_path: Path) -> None:
    bench.submit(1)
    assert bench.gate.begun.acquire(timeout=SOON)
    (tmp_path / "snapshot-1").mkdir()
    (tmp_path / "snapshot-1" / "weights.bin").write_bytes(b"half of")  # the trainer, at it again
    bench.gate.open.set()
    last = bench.saver.finish()
    assert last is not None and (last.folder / "weights.bin").read_bytes() == bytes([1]) * 1000
    shutil.rmtree(tmp_path / "snapshot-1")
    again = bench.submit(1)
    assert bench.saver.finish() == bench.committed[1]
    assert (bench.committed[1].step, bench.steps(), again.exists()) == (1, {"step-1"}, False)


def test_a_snapshot_that_is_not_there_is_told_at_once(bench: Bench, tmp_path: Path) -> None:
    with raises("disk.error", match="snapshot-9: No such file or directory"):
        bench.saver.submit(tmp_path / "snapshot-9", step=9, config_hash="c", data_hash="d", attempt=1)
    assert bench.saver.finish() is None


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "disk.full"),
        (errno.EROFS, "disk.not_writable"),
        (errno.ENOTCONN, "checkpoint.store_vanished"),
        (errno.EIO, "disk.error"),
    ],
)
def test_three_failed_saves_in_a_row_end_the_training(bench: Bench, number: int, code: str) -> None:
    bench.gate.open.set()
    bench.gate.error = number
    snapshots = []
    for step in (1, 2, 3):
        bench.saver.check()
        snapshots.append(bench.submit(step))
        bench.until(lambda: len(bench.said) == len(snapshots) and not bench.saver._running)
        assert [folder.exists() for folder in snapshots] == [False] * (step - 1) + [True]  # the newest is enough
    with raises(code, match=r"store: .* \(3 saves in a row have failed; step 3 is kept in .*snapshot-3.save-3\)"):
        bench.saver.check()
    assert bench.said[0].startswith(f"step 1 is not saved: {bench.store.root}: ")
    assert bench.said[0].endswith(f"; its snapshot is kept in {snapshots[0]} and tried again")


def test_a_save_that_works_makes_good_for_those_that_failed(bench: Bench) -> None:
    bench.gate.open.set()
    bench.gate.error = errno.EIO
    snapshots = []
    for step in (1, 2):
        snapshots.append(bench.submit(step))
        bench.until(lambda: len(bench.said) == len(snapshots) and not bench.saver._running)
    bench.gate.error = None
    bench.submit(3)
    assert bench.saver.finish() == bench.committed[-1]
    assert not any(folder.exists() for folder in snapshots)
    bench.gate.error = errno.EIO
    for step in (4, 5):
        bench.submit(step)
        bench.until(lambda: f"step {step} is not saved" in bench.said[-1] and not bench.saver._running)  # noqa: B023
    bench.saver.check()


def test_finish_tries_once_more_and_then_gives_up(bench: Bench) -> None:
    bench.gate.open.set()
    bench.gate.error = errno.ENOSPC
    snapshot = bench.submit(7)
    with raises("disk.full", match=r"store: .*\(tried twice; step 7 is kept in .*snapshot-7.save-1\)"):
        bench.saver.finish()
    assert (bench.gate.tries, snapshot.exists(), bench.steps()) == (2, True, set())
    bench.gate.error = None
    last = bench.saver.finish()
    assert last is not None and last.step == 7
    assert not snapshot.exists()


def test_a_failed_save_is_tried_again_while_nothing_newer_comes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver_module, "RETRY_SECONDS", 0.02)
    bench.gate.open.set()
    bench.gate.error = errno.EIO
    bench.submit(1)
    bench.until(lambda: bench.gate.tries >= 5)
    bench.saver.check()  # five tries of one save are one failure
    assert len(bench.said) == 1
    bench.gate.error = None
    bench.until(lambda: bench.committed)
    assert bench.committed[0].step == 1


def test_finish_has_a_time_limit(bench: Bench) -> None:
    snapshot = bench.submit(1)
    began = time.monotonic()
    with raises(
        "checkpoint.timeout", match=r"store: step 1 was not saved within 0\.2 s; its snapshot is in .*snapshot-1"
    ):
        bench.saver.finish(0.2)
    assert 0.2 <= time.monotonic() - began < SOON
    assert snapshot.exists()
    bench.gate.open.set()
    assert bench.saver.finish(SOON) is not None


def test_close_waits_for_a_moment_only_and_says_what_is_left(bench: Bench) -> None:
    bench.submit(1)
    assert bench.gate.begun.acquire(timeout=SOON)
    waiting = bench.submit(2)
    began = time.monotonic()
    for _ in range(2):
        bench.saver.close()
    assert time.monotonic() - began < SOON / 4
    assert bench.said[1:] == [f"step 2 is not in {bench.store.root}; its snapshot stays in {waiting}"]
    assert waiting.exists()
    bench.gate.open.set()
    bench.until(lambda: bench.committed)  # what it was busy with ends well
    assert bench.steps() == {"step-1"}


def test_faults_of_the_callbacks_or_of_pruning_do_not_undo_a_commit(tmp_path: Path) -> None:
    class NoDeleting(Disk):
        def remove_file(self, path: Path) -> None:
            raise OSError(errno.EACCES, "Permission denied", str(path))

    def broken(*_: object) -> None:
        raise ValueError("broken")

    store = CheckpointStore(tmp_path / "store", run_id="r", keep_last=1, disk=NoDeleting())
    said: list[str] = []
    saver = Saver(store, said.append, broken)
    for step in (1, 2):
        (tmp_path / "snapshot").mkdir()
        (tmp_path / "snapshot" / "weights.bin").write_bytes(b"w")
        saver.submit(tmp_path / "snapshot", step=step, config_hash="c", data_hash="d", attempt=1)
        last = saver.finish(SOON)
        assert last is not None and last.step == step
    assert said[0] == "after the save of step 1: ValueError('broken')"
    assert said[2].startswith("after the save of step 2: ") and "not writable" in said[2]
    assert store.latest_valid() == (store.root / "step-2", [])
    silent = Saver(store, broken, broken)  # a console that is gone
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "weights.bin").write_bytes(b"w")
    silent.submit(tmp_path / "snapshot", step=3, config_hash="c", data_hash="d", attempt=1)
    assert silent.finish(SOON) is not None


def test_a_fault_that_nobody_foresaw_is_heard_of(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Path:
        raise ValueError("unforeseen")

    monkeypatch.setattr(bench.store, "put", broken)
    bench.submit(1)
    with raises(
        "checkpoint.save_failed", match=r"step 1 could not be saved \(ValueError\('unforeseen'\)\) \(tried twice"
    ):
        bench.saver.finish(SOON)


PROGRAM = """
import sys, time
from pathlib import Path
from finetune.checkpoint.store import CheckpointStore; from finetune.checkpoint.filesystem import Disk
from finetune.checkpoint.async_saver import Saver

class Slow(Disk):
    def copy_file(self, source, target):
        if target.parent.name == "step-2":
            target.write_bytes(b"half")
            print("copying", flush=True)
            time.sleep(600)
        return super().copy_file(source, target)

scratch = Path(sys.argv[1])
saver = Saver(CheckpointStore(scratch / "store", run_id="r", disk=Slow()), print)
for step in (1, 2):
    (scratch / str(step)).mkdir()
    (scratch / str(step) / "weights.bin").write_bytes(b"weights")
    saver.submit(scratch / str(step), step=step, config_hash="c", data_hash="d", attempt=1)
    if step == 1:
        saver.finish()
if sys.argv[2] == "finish":
    saver.finish()
while not (scratch / "store" / "step-2" / "weights.bin").exists():
    time.sleep(0.01)
"""


@pytest.mark.parametrize("end", ["exit", "SIGINT", "SIGTERM"])
def test_a_copy_that_hangs_keeps_no_process_alive(tmp_path: Path, end: str) -> None:
    how = "leave" if end == "exit" else "finish"
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "copying\n"
    if end != "exit":
        process.send_signal(getattr(signal, end))
    process.communicate(timeout=SOON)
    assert process.returncode == (0 if end == "exit" else -getattr(signal, end))
    store = CheckpointStore(tmp_path / "store", run_id="r")
    found, (skipped,) = store.latest_valid()
    assert found == store.root / "step-1"
    assert (skipped.folder.name, skipped.reason) == ("step-2", "no manifest: the save was cut off")
    assert (tmp_path / "2.save-2" / "weights.bin").exists()
