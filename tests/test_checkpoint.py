"""Checkpoints count only when they are whole; the newest whole one is found, whatever lies beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from data_examples import files_of

from finetune import checkpoint
from finetune.errors import UserError

CONFIG, DATA = "c" * 64, "d" * 64


def save(root: Path, step: int) -> Path:
    """What the trainer leaves: a few files, one of them in a folder."""
    folder = checkpoint.step_folder(root, step)
    (folder / "sub").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(bytes([step % 256]) * 100)
    (folder / "sub" / "state.json").write_text(f'{{"step": {step}}}')
    return folder


def commit(root: Path, step: int) -> Path:
    folder = save(root, step)
    checkpoint.commit(folder, step=step, config_hash=CONFIG, data_hash=DATA)
    return folder


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_a_committed_folder_verifies_and_says_what_it_holds(tmp_path: Path) -> None:
    folder = commit(tmp_path, 7)
    assert checkpoint.fault(folder) is None
    manifest = checkpoint.read_manifest(folder)
    assert (manifest["step"], manifest["config_hash"], manifest["data_hash"]) == (7, CONFIG, DATA)
    assert set(manifest["files"]) == {"weights.bin", "sub/state.json"}


def folder_in_place_of_a_file(folder: Path) -> None:
    (folder / "weights.bin").unlink()
    (folder / "weights.bin").mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file is cut short": (lambda f: (f / "weights.bin").write_bytes(b"\7" * 60), "weights.bin has 60 bytes instead of 100"),
    "a byte has changed": (lambda f: (f / "weights.bin").write_bytes(b"\7" * 99 + b"\0"), "weights.bin has changed"),
    "a file is gone": (lambda f: (f / "sub" / "state.json").unlink(), "sub/state.json is missing"),
    "a file is a folder": (folder_in_place_of_a_file, "weights.bin is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no manifest: the save was cut off"),
    "half a manifest": (lambda f: (f / "manifest.json").write_text('{"step": 7, "files"'), "the manifest is not readable"),
    "a manifest without files": (lambda f: (f / "manifest.json").write_text("{}"), "the manifest is not readable"),
    "a manifest that is a list": (lambda f: (f / "manifest.json").write_text("[]"), "the manifest is not readable"),
    "an empty manifest": (lambda f: (f / "manifest.json").write_text(""), "the manifest is not readable"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_says_why(damage: str, tmp_path: Path) -> None:
    harm, reason = DAMAGE[damage]
    older, newer = commit(tmp_path, 3), commit(tmp_path, 7)
    harm(newer)
    found, [skipped] = checkpoint.latest_valid(tmp_path)
    assert found == older
    assert skipped.folder == newer
    assert reason in skipped.reason


def test_every_byte_of_every_file_is_covered(tmp_path: Path) -> None:
    folder = commit(tmp_path, 7)
    for name in checkpoint.read_manifest(folder)["files"]:
        original = (folder / name).read_bytes()
        for place in range(len(original)):
            changed = bytearray(original)
            changed[place] ^= 1
            (folder / name).write_bytes(changed)
            assert checkpoint.fault(folder), (name, place)
        (folder / name).write_bytes(original)
    assert checkpoint.fault(folder) is None


def test_a_save_that_is_cut_off_at_any_moment_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    folder = save(tmp_path, 4)
    monkeypatch.setattr(checkpoint, "sha256_file", killed)  # while the files are read
    with pytest.raises(KeyboardInterrupt):
        checkpoint.commit(folder, step=4, config_hash=CONFIG, data_hash=DATA)
    assert checkpoint.latest_valid(tmp_path)[0] is None
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "write_json", killed)  # when all but the manifest is there
    with pytest.raises(KeyboardInterrupt):
        checkpoint.commit(folder, step=4, config_hash=CONFIG, data_hash=DATA)
    assert checkpoint.latest_valid(tmp_path)[0] is None


def test_the_newest_is_the_one_with_the_highest_step_not_the_last_name(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        commit(tmp_path, step)
    for other in ("step-", "step-x", "step-1000.old", "damaged-step-500", "checkpoint-900"):
        shutil.copytree(tmp_path / "step-9", tmp_path / other)
    (tmp_path / "step-3000").write_text("a file")
    assert checkpoint.latest_valid(tmp_path) == (tmp_path / "step-100", [])


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert checkpoint.latest_valid(tmp_path / "nowhere") == (None, [])
    assert checkpoint.remove_leftovers(tmp_path / "nowhere") == []


def test_all_that_were_passed_over_are_told_newest_first(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        (commit(tmp_path, step) / "weights.bin").unlink()
    found, skipped = checkpoint.latest_valid(tmp_path)
    assert found is None
    assert [item.folder.name for item in skipped] == ["step-3", "step-2", "step-1"]


def test_pruning_keeps_the_newest_committed_ones(tmp_path: Path) -> None:
    for step in (2, 10, 4, 6):
        commit(tmp_path, step)
    save(tmp_path, 12)  # not committed: neither counted nor touched
    checkpoint.prune(tmp_path, 2)
    assert names(tmp_path) == {"step-6", "step-10", "step-12"}


def test_a_deletion_that_is_cut_off_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    commit(tmp_path, 1)
    kept = commit(tmp_path, 2)
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.prune(tmp_path, 1)
    assert not (tmp_path / "step-1" / "manifest.json").exists()
    assert checkpoint.latest_valid(tmp_path) == (kept, [])


def test_leftovers_go_and_checkpoints_stay(tmp_path: Path) -> None:
    kept = commit(tmp_path, 2)
    before = files_of(kept)
    save(tmp_path, 4)
    save(tmp_path, 6).rename(tmp_path / "checkpoint-6")
    (tmp_path / "README.md").write_text("stays")
    assert {path.name for path in checkpoint.remove_leftovers(tmp_path)} == {"step-4", "checkpoint-6"}
    assert names(tmp_path) == {"step-2", "README.md"}
    assert files_of(kept) == before


def test_a_damaged_checkpoint_is_put_aside_where_it_neither_counts_nor_is_in_the_way(tmp_path: Path) -> None:
    for _ in range(2):  # the second time, an older one of the same step is aside already
        damaged = commit(tmp_path, 4)
        (damaged / "weights.bin").write_bytes(b"short")
        checkpoint.put_aside(damaged)
        assert names(tmp_path) == {"damaged-step-4"}
    commit(tmp_path, 4)
    checkpoint.remove_leftovers(tmp_path)
    checkpoint.prune(tmp_path, 1)
    assert names(tmp_path) == {"damaged-step-4", "step-4"}
    assert checkpoint.latest_valid(tmp_path) == (tmp_path / "step-4", [])


def test_half_a_save_is_not_put_aside_but_left_to_be_removed(tmp_path: Path) -> None:
    checkpoint.put_aside(save(tmp_path, 4))
    assert names(tmp_path) == {"step-4"}


def test_another_config_or_other_data_do_not_resume(tmp_path: Path) -> None:
    folder = commit(tmp_path, 2)
    checkpoint.check_same_run(folder, config_hash=CONFIG, data_hash=DATA)
    with pytest.raises(UserError, match=r"step-2: was made under another config; restore config\.yaml"):
        checkpoint.check_same_run(folder, config_hash="0" * 64, data_hash=DATA)
    with pytest.raises(UserError, match=r"step-2: was trained on other data; prepare the same data again"):
        checkpoint.check_same_run(folder, config_hash=CONFIG, data_hash="0" * 64)


def test_the_manifest_is_plain_json_with_size_and_hash_of_every_file(tmp_path: Path) -> None:
    manifest = json.loads((commit(tmp_path, 1) / "manifest.json").read_text())
    assert manifest["files"]["weights.bin"]["bytes"] == 100
    assert len(manifest["files"]["weights.bin"]["sha256"]) == 64
