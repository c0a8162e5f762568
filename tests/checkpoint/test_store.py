"""Only complete checkpoints are valid; the newest valid one is found, whatever else is in the folder."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.checkpoint import folders as checkpoint_folders
from finetune.checkpoint import manifest as checkpoint_manifest
from finetune.checkpoint.filesystem import CHUNK_BYTES
from finetune.checkpoint.store import CheckpointStore, Skipped
from tests.helpers.data_examples import files_of
from tests.helpers.errors import raises

CONFIG, DATA = "c" * 64, "d" * 64
HASHES = {"config_hash": CONFIG, "data_hash": DATA}


def staged(tmp_path: Path, step: int, size: int = 100) -> Path:
    """A save as the trainer writes it: a few files, one of them in a subfolder."""
    folder = tmp_path / f"staged-{step}"
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "weights.bin").write_bytes(bytes([step % 256]) * size)
    (folder / "sub" / "state.json").write_text(f'{{"step": {step}}}')
    return folder


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "store", run_id="run-a")


def put(store: CheckpointStore, step: int, attempt: int = 1) -> Path:
    source = staged(store.root.parent, step)
    return store.put(source, step=step, config_hash=CONFIG, data_hash=DATA, attempt=attempt)


def names(store: CheckpointStore) -> set[str]:
    return {path.name for path in store.root.iterdir()}


def reseal(folder: Path, **changes: Any) -> None:
    """Rewrite the manifest with changed values and a matching seal."""
    manifest = {**checkpoint_folders.read_manifest(folder), **changes}
    (folder / "manifest.json").write_text(checkpoint_manifest.manifest_text(manifest))


def test_a_checkpoint_holds_the_staged_save_and_a_manifest(tmp_path: Path, store: CheckpointStore) -> None:
    folder = put(store, 7, attempt=3)
    assert folder == store.root / "step-7"
    expected = files_of(tmp_path / "staged-7")
    assert {name: files_of(folder)[name] for name in expected} == expected
    manifest = checkpoint_folders.read_manifest(folder)
    assert manifest.pop("saved_at").endswith("+00:00")
    entries = {
        str(path.relative_to(folder)): {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for path, content in ((p, p.read_bytes()) for p in (folder / "weights.bin", folder / "sub" / "state.json"))
    }
    assert manifest.pop("files") == entries
    assert manifest == {"step": 7, "number": 1, "run_id": "run-a", "attempt": 3, **HASHES}
    assert store.latest_valid() == (folder, [])
    assert checkpoint_folders.fault(folder) is None


def test_a_file_of_several_chunks_is_copied_completely(tmp_path: Path, store: CheckpointStore) -> None:
    content = os.urandom(2 * CHUNK_BYTES + 12_345)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "weights.bin").write_bytes(content)
    (tmp_path / "source" / "empty").touch()
    folder = store.put(tmp_path / "source", step=1, config_hash=CONFIG, data_hash=DATA, attempt=1)
    assert (folder / "weights.bin").read_bytes() == content
    assert store.latest_valid() == (folder, [])


def rewrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def folder_in_place_of(name: str) -> Callable[[Path], object]:
    def replace(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return replace


def named(name: str, size: Any = 0) -> Callable[[Path], object]:
    return lambda folder: reseal(folder, files={name: {"bytes": size, "sha256": "0" * 64}})


def edit_without_seal(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"attempt": 1', '"attempt": 2'))


CUT_OFF: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no manifest: the save was cut off"),
    "half a manifest": (rewrite("manifest.json", b'{\n  "step": 7,\n  "files": {\n  }'), "half a manifest"),
    "an empty manifest": (rewrite("manifest.json", b""), "half a manifest"),
    "a manifest of zeros": (rewrite("manifest.json", bytes(300)), "half a manifest"),
    "text that is not JSON": (rewrite("manifest.json", b"hello\n"), "half a manifest"),
    "a manifest that is a list": (rewrite("manifest.json", b"[]"), "half a manifest"),
}
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file is cut short": (rewrite("weights.bin", b"\7" * 60), "weights.bin has 60 bytes instead of 100"),
    "a byte has changed": (rewrite("weights.bin", b"\7" * 99 + b"\0"), "weights.bin has changed since it was saved"),
    "a file is gone": (lambda f: (f / "sub" / "state.json").unlink(), "sub/state.json is missing"),
    "a file is a folder": (folder_in_place_of("weights.bin"), "weights.bin is missing"),
    "a manifest that is a folder": (folder_in_place_of("manifest.json"), "manifest.json is not a file"),
    "a broken manifest": (rewrite("manifest.json", b'{\n  "step": \n}\n'), "the manifest is not readable"),
    "another file's braces": (rewrite("manifest.json", b"{\n}\n"), "the manifest is not readable"),
    "bytes that are not text": (rewrite("manifest.json", b"\xff\xfe\n}\n"), "the manifest is not readable"),
    "a hundred thousand brackets": (
        rewrite("manifest.json", b"[" * 100_000 + b"\n}\n"),
        "the manifest is not readable",
    ),
    "a manifest changed by hand": (edit_without_seal, "the manifest has changed since it was written"),
    "the manifest of another step": (lambda f: reseal(f, step=8), "the manifest is for step 8"),
    "a step that is text": (lambda f: reseal(f, step="7"), "the manifest lacks"),
    "a negative number": (lambda f: reseal(f, number=-1), "the manifest lacks"),
    "no files": (lambda f: reseal(f, files={}), "the manifest lacks"),
    "files as a list": (lambda f: reseal(f, files=["weights.bin"]), "the manifest lacks"),
    "a file outside": (named("../../etc/passwd"), "names '../../etc/passwd', which is not a file of the checkpoint"),
    "an absolute path": (named("/etc/passwd"), "names '/etc/passwd'"),
    "a name that is not normalised": (named("sub/../weights.bin"), "names 'sub/../weights.bin'"),
    "a name with a zero byte": (named("a\0b"), "names 'a"),
    "a negative size": (named("weights.bin", -1), "no size and SHA-256 for weights.bin"),
    "a size that is text": (named("weights.bin", "100"), "no size and SHA-256 for weights.bin"),
}


@pytest.mark.parametrize("name", [*CUT_OFF, *DAMAGE])
def test_an_invalid_checkpoint_is_skipped_with_its_reason(store: CheckpointStore, name: str) -> None:
    older, folder = put(store, 5), put(store, 7)
    spoil, reason = {**CUT_OFF, **DAMAGE}[name]
    spoil(folder)
    found, skipped = store.latest_valid()
    assert found == older
    assert [(item.folder, item.corrupt) for item in skipped] == [(folder, name in DAMAGE)]
    assert reason in skipped[0].reason
    assert reason in (checkpoint_folders.fault(folder) or "")
    assert put(store, 7) == folder  # it is replaced
    assert store.latest_valid() == (folder, [])


@pytest.mark.parametrize("name", [*CUT_OFF, *DAMAGE])
def test_clean_deletes_incomplete_saves_and_quarantine_renames_corrupt_ones(store: CheckpointStore, name: str) -> None:
    older, folder = put(store, 5), put(store, 7)
    before = files_of(older)
    for _ in range(2):  # the second time, one of the same step is already quarantined
        {**CUT_OFF, **DAMAGE}[name][0](put(store, 7))
        (skipped,) = store.latest_valid()[1]
        quarantined = store.quarantine(skipped)
        assert (quarantined, store.clean()) == (
            (None, [folder]) if name in CUT_OFF else (store.root / "damaged-step-7", [])
        )  # fmt: skip
        assert names(store) == {"step-5"} | ({"damaged-step-7"} if name in DAMAGE else set())
    assert files_of(older) == before
    assert store.latest_valid() == (older, [])


def test_a_manifest_that_cannot_be_read_is_a_user_error(store: CheckpointStore) -> None:
    folder = put(store, 7)
    edit_without_seal(folder)
    with raises("checkpoint.corrupt", match=r"step-7: the manifest has changed since it was written"):
        checkpoint_folders.read_manifest(folder)
    with raises("checkpoint.corrupt", match=r"step-8: no manifest"):
        checkpoint_folders.read_manifest(store.root / "step-8")


def test_the_newest_is_the_one_with_the_highest_step_whatever_the_clock_says(store: CheckpointStore) -> None:
    for step in (9, 100, 20):
        reseal(
            put(store, step), saved_at=f"2{200 - step:03}-01-01T00:00:00+00:00"
        )  # the higher the step, the earlier saved_at
    for other in ("step-", "step-x", "step-1000.old", "damaged-step-500", "checkpoint-900", "step-0900", "step-²"):
        shutil.copytree(store.root / "step-9", store.root / other)
    assert store.latest_valid() == (store.root / "step-100", [])
    assert store.prune() == [store.root / "step-9"]


def test_a_run_without_checkpoints_has_none(store: CheckpointStore) -> None:
    assert store.latest_valid() == (None, [])
    assert store.clean() == store.prune() == []


def test_a_checkpoint_of_another_run_is_neither_used_nor_touched(store: CheckpointStore) -> None:
    other = CheckpointStore(store.root, run_id="run-b")
    theirs = [put(other, step) for step in (10, 20)]
    before = files_of(store.root)
    found, skipped = store.latest_valid()
    assert (found, [item.corrupt for item in skipped]) == (None, [False, False])
    assert skipped[0].reason == "is of another run (run-b)"
    assert store.quarantine(skipped[0]) is None
    with raises(
        "checkpoint.name_taken", match=r"step-20: is of another run \(run-b\); move it away, or choose another output"
    ):
        put(store, 20)
    assert files_of(store.root) == before
    for step in (1, 2, 3, 30):
        put(store, step)
    assert [folder.name for folder in store.prune()] == ["step-2", "step-1"]
    assert store.clean() == []
    assert other.latest_valid()[0] == theirs[1]
    assert checkpoint_folders.read_manifest(store.root / "step-3")["number"] == 3  # the other run's do not count


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_or_a_link_in_place_of_a_checkpoint_is_reported_and_left(
    tmp_path: Path, store: CheckpointStore, kind: str
) -> None:
    kept, target = put(store, 5), store.root / "step-9"
    if kind == "file":
        target.write_text("mine")
    else:
        (tmp_path / "elsewhere").mkdir()
        shutil.copytree(kept, tmp_path / "elsewhere" / "step-9")
        target.symlink_to(tmp_path / "elsewhere" / "step-9")
    before = files_of(tmp_path)
    assert list(checkpoint_folders.newest_first(store.root)) == [kept]
    assert store.latest_valid() == (kept, [Skipped(target, f"is a {kind}, not a folder", False)])
    with raises("checkpoint.name_taken", match=rf"step-9: is a {kind}, not a folder; move it away"):
        put(store, 9)
    assert (store.clean(), store.prune()) == ([], [])
    assert {name: files_of(tmp_path)[name] for name in before} == before


def test_deleting_does_not_follow_links(tmp_path: Path, store: CheckpointStore) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    folder = put(store, 1)
    (folder / "link").symlink_to(tmp_path / "mine")
    (folder / "manifest.json").unlink()
    assert store.clean() == [folder]
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_valid_checkpoint_of_the_step_is_left_unchanged(tmp_path: Path, store: CheckpointStore) -> None:
    before = files_of(put(store, 7, attempt=1))
    shutil.rmtree(tmp_path / "staged-7")
    assert files_of(store.put(tmp_path / "gone", step=7, config_hash="0" * 64, data_hash=DATA, attempt=2)) == before


def test_a_missing_staged_save_is_reported_and_leaves_nothing(tmp_path: Path, store: CheckpointStore) -> None:
    with raises("checkpoint.snapshot_missing", match=r"gone: nothing to save;"):
        store.put(tmp_path / "gone", step=7, config_hash=CONFIG, data_hash=DATA, attempt=1)
    assert names(store) == set()


def test_prune_keeps_the_newest_and_every_nth(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "store", run_id="r", keep_last=2, keep_every=3)
    for step in range(10, 110, 10):
        put(store, step)
        store.prune()
    assert names(store) == {"step-30", "step-60", "step-90", "step-100"}
    assert [checkpoint_folders.read_manifest(f)["number"] for f in checkpoint_folders.newest_first(store.root)] == [
        10,
        9,
        6,
        3,
    ]


@pytest.mark.parametrize("how", ["a byte has changed", "a file is cut short", "a file is gone", "no manifest"])
def test_corrupt_checkpoints_never_displace_good_ones(store: CheckpointStore, how: str) -> None:
    for step in (1, 2, 3, 4):
        put(store, step)
    for step in (3, 4):
        {**CUT_OFF, **DAMAGE}[how][0](store.root / f"step-{step}")
    assert store.latest_valid()[0] == store.root / "step-2"
    put(store, 5)
    assert store.prune() == [store.root / "step-1"]
    assert {"step-2", "step-5"} <= names(store)
    put(store, 4)  # saved again, it counts again
    assert store.prune() == [store.root / "step-2"]


def test_a_checkpoint_with_a_truncated_file_does_not_count(store: CheckpointStore) -> None:
    for step in (1, 2, 3):
        put(store, step)
    (store.root / "step-3" / "weights.bin").write_bytes(b"short")  # not verified since
    assert store.prune() == []
    put(store, 4)
    assert store.prune() == [store.root / "step-1"]


def test_the_number_of_a_checkpoint_counts_those_of_earlier_steps(store: CheckpointStore) -> None:
    for step in (10, 20, 30):
        put(store, step)
    (store.root / "step-20" / "weights.bin").unlink()
    assert checkpoint_folders.read_manifest(put(store, 20))["number"] == 2
    assert checkpoint_folders.read_manifest(put(store, 40))["number"] == 4


def test_a_checkpoint_whose_file_is_a_link_out_of_it_is_not_used_and_the_target_survives(
    store: CheckpointStore, tmp_path: Path
) -> None:
    older, folder = put(store, 5), put(store, 7)
    name = next(iter(checkpoint_folders.read_manifest(folder)["files"]))
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    found, (skipped,) = store.latest_valid()
    assert found == older and skipped.corrupt and skipped.reason == f"{name} is a link that leads out of the checkpoint"
    store.quarantine(skipped)
    put(store, 7)
    assert outside.is_file()


def test_a_step_that_is_no_number_makes_no_path(store: CheckpointStore, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("")
    with raises("file.outside"):
        store._remove(store.root / "step-1" / ".." / ".." / "precious")
    assert (tmp_path / "precious" / "thesis.txt").is_file()
