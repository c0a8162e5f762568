"""Power cuts at any operation on the store, even in the middle of a file: only complete, committed checkpoints are found."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from finetune.checkpoint import folders as checkpoint_folders
from finetune.checkpoint.filesystem import Disk
from finetune.checkpoint.store import CheckpointStore
from tests.helpers.data_examples import files_of

MOMENTS = (0.0, 0.4, 1.0)
"""Share of the operation that is done at the power cut: none, a part (of a write), all of it."""


class PowerCut(BaseException):
    """A BaseException, so that no error handling of the store catches it: after a power cut no code runs."""


class FailingDisk(Disk):
    """A disk whose power is cut at the `left`-th operation from now, with the share `done` of that operation done."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.done = 0.0
        self.off = False
        self.count = 0

    def _operate(self, whole: Callable[[], None], part: Callable[[], object] = lambda: None) -> None:
        if self.off:
            raise PowerCut
        self.count += 1
        if self.left == 0:
            self.off = True
            whole() if self.done == 1.0 else part()
            raise PowerCut
        self.left = None if self.left is None else self.left - 1
        whole()

    def write(self, file: BinaryIO, data: bytes) -> None:
        self._operate(
            lambda: super(FailingDisk, self).write(file, data), lambda: file.write(data[: int(len(data) * self.done)])
        )

    def make_folder(self, path: Path) -> None:
        self._operate(lambda: super(FailingDisk, self).make_folder(path))

    def remove_file(self, path: Path) -> None:
        self._operate(lambda: super(FailingDisk, self).remove_file(path))

    def remove_empty_folder(self, path: Path) -> None:
        self._operate(lambda: super(FailingDisk, self).remove_empty_folder(path))

    def rename_folder(self, path: Path, new: Path) -> None:
        self._operate(lambda: super(FailingDisk, self).rename_folder(path, new))


def content_of(step: int) -> dict[str, bytes]:
    return {"weights.bin": bytes([step % 256]) * 40, "sub/state.json": b'{"step": %d}' % step, "sub/rng.pth": b"\1\2\3"}


def staged(root: Path, step: int) -> Path:
    folder = root / "staged"
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    for name, content in content_of(step).items():
        (folder / name).write_bytes(content)
    return folder


def put(store: CheckpointStore, step: int) -> Path:
    source = staged(store.root.parent, step)
    return store.put(source, step=step, config_hash="c", data_hash="d", attempt=1)


def check_complete(folder: Path) -> int:
    """Check that a folder from latest_valid holds exactly what was saved; returns its step."""
    step = int(folder.name.removeprefix("step-"))
    held = {str(name): content for name, content in files_of(folder).items() if str(name) != "manifest.json"}
    assert held == content_of(step)
    return step


def count_operations(work: Callable[[CheckpointStore], object], root: Path) -> int:
    disk = FailingDisk()
    work(CheckpointStore(root / "store", run_id="r", keep_last=1, disk=disk))
    return disk.count


def save_and_prune(store: CheckpointStore) -> None:
    put(store, 2)
    store.prune()


def save_over_a_corrupt_one(store: CheckpointStore) -> None:
    put(store, 3)


def quarantine_and_clean(store: CheckpointStore) -> None:
    for item in store.latest_valid()[1]:
        store.quarantine(item)
    store.clean()


WORK = (save_and_prune, save_over_a_corrupt_one, quarantine_and_clean)


@pytest.mark.parametrize("work", WORK)
def test_a_power_cut_at_every_single_operation(tmp_path: Path, work: Callable[[CheckpointStore], object]) -> None:
    begun = CheckpointStore(tmp_path / "begun" / "store", run_id="r")
    begun.root.mkdir(parents=True)
    put(begun, 1)
    if work != save_and_prune:
        (put(begun, 3) / "weights.bin").write_bytes(b"corrupt")
        (put(begun, 4) / "manifest.json").unlink()
    total = count_operations(work, Path(shutil.copytree(tmp_path / "begun", tmp_path / "whole")))
    assert total >= 7
    found = []
    for operation in range(total):
        for done in MOMENTS:
            root = Path(shutil.copytree(tmp_path / "begun", tmp_path / f"{operation}-{done}"))
            disk = FailingDisk()
            disk.left, disk.done = operation, done
            with pytest.raises(PowerCut):
                work(CheckpointStore(root / "store", run_id="r", keep_last=1, disk=disk))
            store = CheckpointStore(root / "store", run_id="r", keep_last=1)
            newest, _ = store.latest_valid()
            assert newest is not None
            found.append(check_complete(newest))
            quarantine_and_clean(store)
            kept = [p.name for p in store.root.iterdir() if not p.name.startswith("damaged-")]
            assert all((store.root / name / "manifest.json").is_file() for name in kept)
            for step in (2, 3, 4):
                assert check_complete(put(store, step)) == step
            assert store.latest_valid() == (store.root / "step-4", [])
            shutil.rmtree(root)
    assert found == sorted(found)  # from some operation on, the new checkpoint is always the one found
    assert set(found) == ({1} if work is quarantine_and_clean else {1, 2} if work is save_and_prune else {1, 3})


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_store_that_lost_files_written_before_the_manifest(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        store = CheckpointStore(Path(scratch) / "store", run_id="r")
        older, newer = put(store, 1), put(store, 2)
        lost = data.draw(st.sets(st.sampled_from(sorted(content_of(2)))), label="lost")
        for name in sorted(lost):
            path = newer / name
            content = data.draw(
                st.sampled_from([None, b"", bytes(path.stat().st_size), path.read_bytes()[:-1]]), label=name
            )
            path.unlink() if content is None else path.write_bytes(content)
        found, skipped = CheckpointStore(Path(scratch) / "store", run_id="r").latest_valid()
        assert found == (older if lost else newer)
        assert [(item.folder, item.corrupt) for item in skipped] == ([(newer, True)] if lost else [])
        assert not lost or any(name in skipped[0].reason for name in lost)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(["weights.bin", "sub/state.json", "sub/rng.pth", "manifest.json"]),
    how=st.sampled_from(["flip", "cut", "delete", "lengthen"]),
    where=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
def test_any_damage_to_any_file_is_noticed_and_named(name: str, how: str, where: float, bit: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        store = CheckpointStore(Path(scratch) / "store", run_id="r")
        older, newer = put(store, 1), put(store, 2)
        path, content = newer / name, (newer / name).read_bytes()
        at = int(where * (len(content) - 1))  # a manifest without its last newline is whole
        if how == "flip":
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        elif how == "cut":
            path.write_bytes(content[:at])
        elif how == "lengthen":
            path.write_bytes(content + b"}")
        else:
            path.unlink()
        found, (skipped,) = store.latest_valid()
        assert (found, skipped.folder) == (older, newer)
        assert (name if name != "manifest.json" else "manifest") in skipped.reason
        quarantine_and_clean(store)
        assert "step-2" not in {p.name for p in store.root.iterdir()}
        assert check_complete(put(store, 2)) == 2
        assert store.latest_valid() == (newer, [])


class Lifetime(RuleBasedStateMachine):
    """Saves, prunes, cleanups, corruption and resumes in any order, with repeated power cuts at any operation."""

    @initialize(keep_last=st.integers(1, 3), keep_every=st.sampled_from([None, 2, 3]))
    def begin(self, keep_last: int, keep_every: int | None) -> None:
        self.scratch = tempfile.TemporaryDirectory()
        self.root = Path(self.scratch.name) / "store"
        self.keep: dict[str, Any] = {"keep_last": keep_last, "keep_every": keep_every}
        self.disk = FailingDisk()
        self.store = self.opened()
        self.good: set[int] = set()  # steps whose put returned, or whose manifest was found whole after a cut
        self.step = 0

    def opened(self) -> CheckpointStore:
        return CheckpointStore(self.root, run_id="r", disk=self.disk, **self.keep)

    def survive(self, work: Callable[[], object], begins: int | None = None) -> bool:
        """Whether the work completed; if the power was cut, restart and resume from what is found."""
        try:
            work()
            return True
        except PowerCut:
            self.disk.off, self.disk.left = False, None
            self.resume(begins)
            return False

    def resume(self, begins: int | None = None) -> None:
        self.store = self.opened()
        found, skipped = self.store.latest_valid()
        at = check_complete(found) if found else 0
        if begins is not None and at == begins:
            self.good.add(begins)
        assert at == max(self.good, default=0)
        self.step = at
        if self.survive(lambda: [self.store.quarantine(item) for item in skipped] + self.store.clean()):
            folders = [path for path in self.root.iterdir() if path.name.startswith("step-")] if found else []
            assert all(checkpoint_folders.fault(path) is None for path in folders if int(path.name[5:]) >= at)
            assert all((path / "manifest.json").is_file() for path in folders)

    @rule(operation=st.integers(0, 25), done=st.sampled_from(MOMENTS))
    def cut_power_soon(self, operation: int, done: float) -> None:
        self.disk.left, self.disk.done = operation, done

    @rule(further=st.integers(1, 3))
    def save(self, further: int) -> None:
        step = self.step + further
        if self.survive(lambda: put(self.store, step), begins=step):
            self.good.add(step)
            self.step = step

    @rule()
    def prune(self) -> None:
        before = [step for step in sorted(self.good) if (self.root / f"step-{step}" / "manifest.json").is_file()]
        numbers = {step: checkpoint_folders.read_manifest(self.root / f"step-{step}")["number"] for step in before}
        whole = self.survive(self.store.prune)
        every = self.keep["keep_every"]
        stay = {s for s in before if s in before[-self.keep["keep_last"] :] or (every and numbers[s] % every == 0)}
        self.good = {s for s in before if s in stay or (self.root / f"step-{s}" / "manifest.json").is_file()}
        assert stay <= self.good and (not whole or self.good == stay)

    @rule()
    def killed_and_resumed(self) -> None:
        self.resume()

    @precondition(lambda self: self.good)
    @rule(data=st.data())
    def corrupt(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.good)))
        name = data.draw(st.sampled_from([*content_of(step), "manifest.json"]))
        path = self.root / f"step-{step}" / name
        corruptions: list[Callable[[], object]] = [path.unlink, lambda: path.write_bytes(path.read_bytes()[:-2])]
        data.draw(st.sampled_from(corruptions))()
        self.good.discard(step)
        self.resume()

    @invariant()
    def every_good_checkpoint_verifies(self) -> None:
        for step in getattr(self, "good", ()):
            assert checkpoint_folders.fault(self.root / f"step-{step}") is None

    def teardown(self) -> None:
        if hasattr(self, "scratch"):
            self.scratch.cleanup()


TestLifetime = Lifetime.TestCase
TestLifetime.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
