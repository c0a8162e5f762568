"""Stores that are full, read-only, gone, or return wrong bytes: one clear line, and earlier checkpoints are unchanged."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

import pytest

from finetune.checkpoint.filesystem import Disk
from finetune.checkpoint.store import CheckpointStore
from finetune.errors import UserError
from finetune.runtime import fault_injection
from tests.checkpoint.test_store import CONFIG, DATA, names, put, staged
from tests.helpers.data_examples import files_of
from tests.helpers.errors import raises


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """mounted(options) mounts a separate file system at tmp_path/store; needs the right to mount."""
    folder = tmp_path / "store"

    def mount(options: str) -> None:
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a small file system needs root")

    yield mount
    subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)


@pytest.mark.parametrize(
    "kilobytes", [16, 60, 130]
)  # full at a folder, in a file, at the manifest or in the second save
def test_a_full_disk_is_reported_and_the_partial_copy_is_deleted(
    tmp_path: Path, mounted: Callable[[str], None], kilobytes: int
) -> None:
    mounted(f"size={kilobytes}k")
    store = CheckpointStore(tmp_path / "store", run_id="r")
    committed: list[Path] = []
    with raises("disk.full"):
        for step in (1, 2, 3):
            source = staged(tmp_path, step, 50_000)
            committed.append(store.put(source, step=step, config_hash=CONFIG, data_hash=DATA, attempt=1))
    assert len(committed) == (kilobytes > 16) + (kilobytes > 100)
    assert names(store) == {folder.name for folder in committed}
    assert store.latest_valid() == (committed[-1] if committed else None, [])


def test_a_save_succeeds_once_a_full_disk_has_space_again(tmp_path: Path, mounted: Callable[[str], None]) -> None:
    mounted("size=60k")
    store = CheckpointStore(tmp_path / "store", run_id="r")
    (tmp_path / "store" / "large.log").write_bytes(bytes(40_000))
    source = staged(tmp_path, 1, 40_000)
    with raises("disk.full"):
        store.put(source, step=1, config_hash=CONFIG, data_hash=DATA, attempt=1)
    (tmp_path / "store" / "large.log").unlink()
    store.put(source, step=1, config_hash=CONFIG, data_hash=DATA, attempt=1)
    assert store.latest_valid() == (store.root / "step-1", [])


def test_a_read_only_store_is_reported_and_can_still_be_read(tmp_path: Path, mounted: Callable[[str], None]) -> None:
    mounted("size=1m")
    store = CheckpointStore(tmp_path / "store", run_id="r", keep_last=1)
    kept = [put(store, step) for step in (1, 2)]
    (put(store, 3) / "weights.bin").write_bytes(b"short")
    (put(store, 4) / "manifest.json").unlink()
    before = files_of(store.root)
    subprocess.run(["mount", "-o", "remount,ro", str(store.root)], check=True)
    found, skipped = store.latest_valid()
    assert found == kept[1]
    for call in (
        lambda: put(store, 5),
        lambda: put(store, 3),
        store.prune,
        store.clean,
        lambda: store.quarantine(skipped[1]),
    ):
        with raises("disk.not_writable", match="store: "):
            call()
    assert files_of(store.root) == before


def test_a_store_that_disappears_is_not_recreated_on_the_local_disk(tmp_path: Path) -> None:
    class Vanishing(Disk):
        def sync_folder(self, path: Path) -> None:
            shutil.rmtree(tmp_path / "store", ignore_errors=True)

    put(CheckpointStore(tmp_path / "store", run_id="r"), 1)
    store = CheckpointStore(tmp_path / "store", run_id="r", disk=Vanishing())
    for _ in range(2):  # in the middle of a save, then before one
        with raises(
            "checkpoint.store_vanished",
            match=r"store: the store has disappeared .*is its bucket or disk still mounted\?",
        ):
            put(store, 2)
        assert not store.root.exists()


def test_a_missing_run_folder_is_not_created(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "gone" / "checkpoints", run_id="r")
    with raises("checkpoint.store_vanished"):
        store.put(staged(tmp_path, 1), step=1, config_hash=CONFIG, data_hash=DATA, attempt=1)
    assert not (tmp_path / "gone").exists()


def test_an_unreadable_staged_save_is_not_blamed_on_the_store(tmp_path: Path) -> None:
    class Unreadable(Disk):
        def copy_file(self, source: Path, target: Path) -> tuple[int, str]:
            raise OSError(errno.EIO, "Input/output error", str(source))

    store = CheckpointStore(tmp_path / "store", run_id="r", disk=Unreadable())
    with raises("checkpoint.snapshot_unreadable", match=r"staged-\d: the staged save cannot be read \(Input/output"):
        put(store, 1)
    assert names(store) == set()


def test_a_store_that_is_a_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("mine")
    store = CheckpointStore(tmp_path / "store", run_id="r")
    for call in (lambda: put(store, 1), store.latest_valid, store.prune, store.clean):
        with raises("checkpoint.store_vanished"):
            call()


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_checkpoint_that_cannot_be_read_now_is_not_called_corrupt(tmp_path: Path, code: int) -> None:
    class Unreadable(Disk):
        def hash_file(self, path: Path) -> tuple[int, str]:
            if path.parent.name == "step-2":
                raise OSError(code, os.strerror(code), str(path))
            return super().hash_file(path)

    good = CheckpointStore(tmp_path / "store", run_id="r")
    folders = [put(good, step) for step in (1, 2)]
    store = CheckpointStore(tmp_path / "store", run_id="r", disk=Unreadable())
    found, (skipped,) = store.latest_valid()
    assert (found, skipped.folder, skipped.corrupt) == (*folders, False)
    assert skipped.reason == f"cannot be read now ({os.strerror(code)})"
    assert store.quarantine(skipped) is None
    assert store.clean() == []
    assert good.latest_valid() == (folders[1], [])


def test_a_root_that_cannot_be_listed_is_not_taken_for_a_new_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> NoReturn:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected", str(path))

    store = CheckpointStore(tmp_path / "store", run_id="r")
    put(store, 1)
    monkeypatch.setattr(Path, "iterdir", refuse)  # the answer of a gcsfuse that has died
    with raises("checkpoint.store_vanished"):
        store.latest_valid()


def test_no_manifest_is_written_when_the_bytes_read_back_differ(tmp_path: Path) -> None:
    class Flipping(Disk):
        def write(self, file: BinaryIO, data: bytes) -> None:
            super().write(file, bytes([data[0] ^ 1]) + data[1:])

    kept = put(CheckpointStore(tmp_path / "store", run_id="r"), 1)
    store = CheckpointStore(tmp_path / "store", run_id="r", disk=Flipping())
    with raises(
        "checkpoint.write_corrupted",
        match=r"step-2/.*: the bytes read back differ from those written; the disk or bucket is at",
    ):
        put(store, 2)
    assert names(store) == {"step-1"}
    assert store.latest_valid() == (kept, [])


def test_a_store_that_cannot_rename_folders_deletes_only_the_corrupt_one(tmp_path: Path) -> None:
    class Bucket(Disk):
        def rename_folder(self, path: Path, new: Path) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))  # gcsfuse with its rename-dir-limit of 0

    store = CheckpointStore(tmp_path / "store", run_id="r", disk=Bucket())
    kept = put(store, 1)
    (put(store, 2) / "weights.bin").unlink()
    (skipped,) = store.latest_valid()[1]
    assert store.quarantine(skipped) is None
    assert names(store) == {"step-1"}
    assert store.latest_valid() == (kept, [])


@pytest.mark.parametrize("same_bytes", [True, False])
@pytest.mark.parametrize("meets", ["state.json", "weights.bin"])
def test_two_writers_of_one_step_never_make_a_mixture(tmp_path: Path, same_bytes: bool, meets: str) -> None:
    """Two writers are not supported: the step may be lost, but what verifies is from one of them, and older checkpoints stay."""

    class Interrupted(Disk):
        def copy_file(self, source: Path, target: Path) -> tuple[int, str]:
            if source.name == meets:
                other.put(theirs, step=2, config_hash=CONFIG, data_hash=DATA, attempt=2)
            return super().copy_file(source, target)

    other = CheckpointStore(tmp_path / "store", run_id="r")
    kept = put(other, 1)
    ours = staged(tmp_path, 2)
    theirs = Path(shutil.copytree(ours, tmp_path / "theirs"))
    if not same_bytes:
        for name in ("weights.bin", "sub/state.json"):
            (theirs / name).write_bytes(b"theirs")
    store = CheckpointStore(tmp_path / "store", run_id="r", disk=Interrupted())
    try:
        store.put(ours, step=2, config_hash=CONFIG, data_hash=DATA, attempt=1)
    except UserError as error:
        assert "the bytes read back differ" in str(error) and not same_bytes
    found, skipped = other.latest_valid()
    assert skipped == []
    if found == kept:
        assert not same_bytes
    else:
        held = {
            name: content for name, content in files_of(store.root / "step-2").items() if "manifest" not in str(name)
        }
        assert held in (files_of(ours), files_of(theirs))


KILLED = """
import sys
from pathlib import Path
from finetune.checkpoint.store import CheckpointStore
root, source = Path(sys.argv[1]), Path(sys.argv[2])
store = CheckpointStore(root, run_id="r", keep_last=1)
for step in (1, 2):
    store.put(source, step=step, config_hash="c", data_hash="d", attempt=1)
    store.prune()
"""


@pytest.mark.parametrize(
    ("place", "count", "left", "newest"),
    [
        ("copy", 3, {"step-1": 3, "step-2": 0}, "step-1"),
        ("half-copy", 3, {"step-1": 3, "step-2": 1}, "step-1"),
        ("verify", 4, {"step-1": 3, "step-2": 2}, "step-1"),
        ("manifest", 2, {"step-1": 3, "step-2": 2}, "step-1"),
        ("committed", 2, {"step-1": 3, "step-2": 3}, "step-2"),
        ("prune", 1, {"step-1": 2, "step-2": 3}, "step-2"),
    ],
)
def test_a_kill_at_a_fault_point_leaves_the_newest_complete_checkpoint(
    tmp_path: Path, place: str, count: int, left: dict[str, int], newest: str
) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "store"), str(staged(tmp_path, 1))]
    environment = {**os.environ, fault_injection.VARIABLE: f"{place}:{count}"}
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    folders = {p.name: sum(f.is_file() for f in p.rglob("*")) for p in (tmp_path / "store").iterdir()}
    assert folders == left
    if place == "half-copy":
        assert (tmp_path / "store" / "step-2" / "sub" / "state.json").stat().st_size == 11 // 2
    store = CheckpointStore(tmp_path / "store", run_id="r")
    assert store.latest_valid()[0] == store.root / newest
    store.clean()
    assert names(store) == {name for name, files in left.items() if files == 3}
