"""Saving in the background: submit never waits, the newest save wins, a failed save is reported and kept."""

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

from finetune.checkpoint import async_writer as writer_module
from finetune.checkpoint.async_writer import AsyncCheckpointWriter, Committed
from finetune.checkpoint.filesystem import Disk
from finetune.checkpoint.folders import read_manifest
from finetune.checkpoint.store import CheckpointStore
from tests.helpers.errors import raises

QUICK = 0.25
"""Seconds: a call that returns within them has not waited for a copy, even on a busy machine."""
SOON = 20.0


class Gate(Disk):
    """A disk whose copies block until the gate opens, or fail with an error number."""

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


class Harness:
    """A writer with its store, its messages and its commits."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.gate = scratch, Gate()
        self.said: list[str] = []
        self.committed: list[Committed] = []
        self.store = CheckpointStore(scratch / "store", run_id="r", disk=self.gate)
        self.writer = AsyncCheckpointWriter(self.store, self.said.append, self.committed.append)
        self.submitted = 0

    def submit(self, step: int) -> Path:
        """Returns the path to which the writer moved the staged save."""
        folder = self.scratch / f"staged-{step}"
        folder.mkdir()
        (folder / "weights.bin").write_bytes(bytes([step]) * 1000)
        began = time.monotonic()
        self.writer.submit(folder, step=step, config_hash="c", data_hash="d", attempt=1)
        assert time.monotonic() - began < QUICK
        self.submitted += 1
        assert not folder.exists()
        return folder.with_name(f"{folder.name}.save-{self.submitted}")

    def steps(self) -> set[str]:
        return {path.name for path in self.store.root.iterdir()}

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + SOON
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.005)


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Harness]:
    monkeypatch.setattr(writer_module, "CLOSE_SECONDS", 0.3)
    made = Harness(tmp_path)
    yield made
    made.gate.open.set()
    made.writer.close()


def test_a_staged_save_is_committed_reported_and_deleted(harness: Harness) -> None:
    staged = harness.submit(5)
    assert harness.gate.begun.acquire(timeout=SOON)
    time.sleep(0.1)
    assert harness.committed == []
    harness.gate.open.set()
    last = harness.writer.finish()
    assert last is not None and harness.committed == [last]
    assert (last.step, last.folder, last.bytes) == (5, harness.store.root / "step-5", 1000)
    assert 0.1 <= last.seconds < SOON
    assert harness.store.latest_valid() == (last.folder, [])
    assert not staged.exists()
    assert harness.said == []
    harness.writer.check()


def test_finish_without_a_submit_returns_none(harness: Harness) -> None:
    assert harness.writer.finish() is None
    harness.writer.check()


def test_while_a_copy_runs_only_the_newest_save_waits(harness: Harness) -> None:
    staged_saves = {1: harness.submit(1)}
    assert harness.gate.begun.acquire(timeout=SOON)
    for step in (2, 3, 4):
        staged_saves[step] = harness.submit(step)
    assert harness.said == [
        "step 1 is still being copied; step 2 waits",
        "step 1 is still being copied; step 3 waits in place of step 2, which is dropped",
        "step 1 is still being copied; step 4 waits in place of step 3, which is dropped",
    ]
    harness.until(lambda: not staged_saves[2].exists() and not staged_saves[3].exists())
    assert staged_saves[1].exists() and staged_saves[4].exists()
    harness.gate.open.set()
    last = harness.writer.finish()
    assert last is not None and last.step == 4
    assert [each.step for each in harness.committed] == [1, 4]
    assert harness.steps() == {"step-1", "step-4"}
    assert read_manifest(last.folder)["number"] == 2


def test_older_checkpoints_are_pruned_after_each_commit(harness: Harness) -> None:
    harness.gate.open.set()
    for step in (1, 2, 3, 4):
        harness.submit(step)
        harness.writer.finish()
    assert harness.steps() == {"step-3", "step-4"}


def test_saving_a_step_again_does_not_change_the_files_being_copied(harness: Harness, tmp_path: Path) -> None:
    harness.submit(1)
    assert harness.gate.begun.acquire(timeout=SOON)
    (tmp_path / "staged-1").mkdir()
    (tmp_path / "staged-1" / "weights.bin").write_bytes(b"half of")  # the trainer saves the step again
    harness.gate.open.set()
    last = harness.writer.finish()
    assert last is not None and (last.folder / "weights.bin").read_bytes() == bytes([1]) * 1000
    shutil.rmtree(tmp_path / "staged-1")
    again = harness.submit(1)
    assert harness.writer.finish() == harness.committed[1]
    assert (harness.committed[1].step, harness.steps(), again.exists()) == (1, {"step-1"}, False)


def test_a_missing_staged_save_is_reported_at_once(harness: Harness, tmp_path: Path) -> None:
    with raises("disk.error", match="staged-9: No such file or directory"):
        harness.writer.submit(tmp_path / "staged-9", step=9, config_hash="c", data_hash="d", attempt=1)
    assert harness.writer.finish() is None


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "disk.full"),
        (errno.EROFS, "disk.not_writable"),
        (errno.ENOTCONN, "checkpoint.store_vanished"),
        (errno.EIO, "disk.error"),
    ],
)
def test_three_failed_saves_in_a_row_end_the_training(harness: Harness, number: int, code: str) -> None:
    harness.gate.open.set()
    harness.gate.error = number
    staged_saves = []
    for step in (1, 2, 3):
        harness.writer.check()
        staged_saves.append(harness.submit(step))
        harness.until(lambda: len(harness.said) == len(staged_saves) and not harness.writer._running)
        assert [folder.exists() for folder in staged_saves] == [False] * (step - 1) + [True]  # only the newest is kept
    with raises(code, match=r"store: .* \(3 saves in a row have failed; step 3 is kept in .*staged-3.save-3\)"):
        harness.writer.check()
    assert harness.said[0].startswith(f"step 1 is not saved: {harness.store.root}: ")
    assert harness.said[0].endswith(f"; its staged save is kept in {staged_saves[0]} and will be retried")


def test_a_successful_save_resets_the_count_of_failures(harness: Harness) -> None:
    harness.gate.open.set()
    harness.gate.error = errno.EIO
    staged_saves = []
    for step in (1, 2):
        staged_saves.append(harness.submit(step))
        harness.until(lambda: len(harness.said) == len(staged_saves) and not harness.writer._running)
    harness.gate.error = None
    harness.submit(3)
    assert harness.writer.finish() == harness.committed[-1]
    assert not any(folder.exists() for folder in staged_saves)
    harness.gate.error = errno.EIO
    for step in (4, 5):
        harness.submit(step)
        harness.until(lambda: f"step {step} is not saved" in harness.said[-1] and not harness.writer._running)  # noqa: B023
    harness.writer.check()


def test_finish_retries_once_and_then_gives_up(harness: Harness) -> None:
    harness.gate.open.set()
    harness.gate.error = errno.ENOSPC
    staged = harness.submit(7)
    with raises("disk.full", match=r"store: .*\(tried twice; step 7 is kept in .*staged-7.save-1\)"):
        harness.writer.finish()
    assert (harness.gate.tries, staged.exists(), harness.steps()) == (2, True, set())
    harness.gate.error = None
    last = harness.writer.finish()
    assert last is not None and last.step == 7
    assert not staged.exists()


def test_a_failed_save_is_retried_until_a_newer_one_is_submitted(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "RETRY_SECONDS", 0.02)
    harness.gate.open.set()
    harness.gate.error = errno.EIO
    harness.submit(1)
    harness.until(lambda: harness.gate.tries >= 5)
    harness.writer.check()  # five tries of one save are one failure
    assert len(harness.said) == 1
    harness.gate.error = None
    harness.until(lambda: harness.committed)
    assert harness.committed[0].step == 1


def test_finish_has_a_time_limit(harness: Harness) -> None:
    staged = harness.submit(1)
    began = time.monotonic()
    with raises(
        "checkpoint.timeout", match=r"store: step 1 was not saved within 0\.2 s; its staged save is in .*staged-1"
    ):
        harness.writer.finish(0.2)
    assert 0.2 <= time.monotonic() - began < SOON
    assert staged.exists()
    harness.gate.open.set()
    assert harness.writer.finish(SOON) is not None


def test_close_waits_only_briefly_and_reports_what_is_not_committed(harness: Harness) -> None:
    harness.submit(1)
    assert harness.gate.begun.acquire(timeout=SOON)
    waiting = harness.submit(2)
    began = time.monotonic()
    for _ in range(2):
        harness.writer.close()
    assert time.monotonic() - began < SOON / 4
    assert harness.said[1:] == [f"step 2 is not in {harness.store.root}; its staged save stays in {waiting}"]
    assert waiting.exists()
    harness.gate.open.set()
    harness.until(lambda: harness.committed)  # the running copy is still committed
    assert harness.steps() == {"step-1"}


def test_faults_of_the_callbacks_or_of_pruning_do_not_undo_a_commit(tmp_path: Path) -> None:
    class NoDeleting(Disk):
        def remove_file(self, path: Path) -> None:
            raise OSError(errno.EACCES, "Permission denied", str(path))

    def broken(*_: object) -> None:
        raise ValueError("broken")

    store = CheckpointStore(tmp_path / "store", run_id="r", keep_last=1, disk=NoDeleting())
    said: list[str] = []
    writer = AsyncCheckpointWriter(store, said.append, broken)
    for step in (1, 2):
        (tmp_path / "staged").mkdir()
        (tmp_path / "staged" / "weights.bin").write_bytes(b"w")
        writer.submit(tmp_path / "staged", step=step, config_hash="c", data_hash="d", attempt=1)
        last = writer.finish(SOON)
        assert last is not None and last.step == step
    assert said[0] == "after the save of step 1: ValueError('broken')"
    assert said[2].startswith("after the save of step 2: ") and "not writable" in said[2]
    assert store.latest_valid() == (store.root / "step-2", [])
    silent = AsyncCheckpointWriter(store, broken, broken)  # a closed console
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged" / "weights.bin").write_bytes(b"w")
    silent.submit(tmp_path / "staged", step=3, config_hash="c", data_hash="d", attempt=1)
    assert silent.finish(SOON) is not None


def test_an_unexpected_exception_is_reported(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Path:
        raise ValueError("unforeseen")

    monkeypatch.setattr(harness.store, "put", broken)
    harness.submit(1)
    with raises(
        "checkpoint.save_failed", match=r"step 1 could not be saved \(ValueError\('unforeseen'\)\) \(tried twice"
    ):
        harness.writer.finish(SOON)


PROGRAM = """
import sys, time
from pathlib import Path
from finetune.checkpoint.store import CheckpointStore; from finetune.checkpoint.filesystem import Disk
from finetune.checkpoint.async_writer import AsyncCheckpointWriter

class Slow(Disk):
    def copy_file(self, source, target):
        if target.parent.name == "step-2":
            target.write_bytes(b"half")
            print("copying", flush=True)
            time.sleep(600)
        return super().copy_file(source, target)

scratch = Path(sys.argv[1])
writer = AsyncCheckpointWriter(CheckpointStore(scratch / "store", run_id="r", disk=Slow()), print)
for step in (1, 2):
    (scratch / str(step)).mkdir()
    (scratch / str(step) / "weights.bin").write_bytes(b"weights")
    writer.submit(scratch / str(step), step=step, config_hash="c", data_hash="d", attempt=1)
    if step == 1:
        writer.finish()
if sys.argv[2] == "finish":
    writer.finish()
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
