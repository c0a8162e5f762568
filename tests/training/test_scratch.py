"""The folder for staged saves: found again by the run, never named after what a file says."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from finetune.checkpoint.store import CheckpointStore
from finetune.run_folder import RunFolder
from finetune.run_record import RunRecord
from finetune.training.resume import check_numbers, id_of
from finetune.training.scratch import remove_if_empty, scratch_folder, scratch_folders
from finetune.training.staging import LABELS, commit_orphaned_save
from tests.helpers.errors import raises

RUN, OTHER = "a" * 32, "b" * 32
GOOD = {"step": 6, "config_hash": "c" * 64, "data_hash": "d" * 64, "attempt": 1, "lease": 0}


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


@pytest.mark.parametrize(
    "run_id",
    ["x/../some/folder", "..", "", "A" * 32, "a" * 31, "a" * 33, "a" * 31 + "\n", "/" + "a" * 31, "é" * 32, "*" * 32],
)
def test_a_run_id_is_32_hexadecimal_digits(run_id: str, tmp_path: Path) -> None:
    record = RunRecord()
    record.run_id = run_id
    with raises("run.bad_record", match=r"run\.json: run_id: expected 32 hexadecimal digits"):
        id_of(RunFolder(tmp_path), record)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("attempts", value) for value in (0, -3, 10**400)],
        *[("threads", value) for value in (0, -1, 10**9)],
        *[("wall_seconds", value) for value in (-1.0, float("nan"), float("inf"), 1e300)],
    ],
    ids=lambda value: str(value)[:9],
)
def test_numbers_that_no_run_has_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    record = RunRecord()
    check_numbers(RunFolder(tmp_path), record)
    setattr(record, key, value)
    with raises("run.bad_record", match=rf"run\.json: {key}: expected a number from"):
        check_numbers(RunFolder(tmp_path), record)


def test_folders_have_random_names_and_belong_to_their_run(temporary: Path) -> None:
    first, other = scratch_folder(RUN), scratch_folder(OTHER)
    assert scratch_folders(RUN) == [first] and scratch_folders(OTHER) == [other]
    assert first.parent.parent == temporary and first.parent.stat().st_mode & 0o777 == 0o700
    again = scratch_folder(RUN)
    assert again != first and not first.exists() and other.is_dir()
    remove_if_empty(again)
    (other / "checkpoint-1").mkdir()
    remove_if_empty(other)
    assert not again.exists() and (other / "checkpoint-1").is_dir()


def test_a_link_in_place_of_a_folder_is_neither_used_nor_deleted(temporary: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "run").write_text(RUN)
    ours = scratch_folder(OTHER).parent
    (ours / "save-link").symlink_to(precious)
    scratch_folder(RUN)
    assert (precious / "run").is_file()
    assert (ours / "save-link").is_symlink()


def test_a_name_that_another_user_or_file_has_taken_is_refused(temporary: Path, tmp_path: Path) -> None:
    ours = scratch_folder(RUN).parent
    ours.rename(tmp_path / "elsewhere")
    ours.symlink_to(tmp_path / "elsewhere")
    with raises("disk.scratch_taken", match="expected a folder of this user"):
        scratch_folder(RUN)
    ours.unlink()
    ours.write_text("")
    with raises("disk.scratch_taken"):
        scratch_folders(RUN)


def staged(labels: Any) -> Path:
    folder = scratch_folder(RUN) / "checkpoint-6.save-1"
    folder.mkdir()
    (folder / "weights").write_text("w")
    (folder / LABELS).write_text(labels if isinstance(labels, str) else json.dumps(labels))
    return folder


def test_a_staged_save_of_an_earlier_attempt_is_committed(tmp_path: Path) -> None:
    staged(GOOD)
    store = CheckpointStore(tmp_path / "checkpoints", run_id=RUN)
    commit_orphaned_save(store)
    assert store.latest_valid()[0] == tmp_path / "checkpoints" / "step-6"


@pytest.mark.parametrize(
    "labels",
    [
        *[GOOD | {"step": step} for step in ("x/../../out", "6", -1, 1.5, True, None, 10**30, [6])],
        *[GOOD | {"attempt": "1"}, GOOD | {"config_hash": 7}, GOOD | {"data_hash": "../.."}, GOOD | {"lease": -1}],
        *[{}, [], "null", "{", "[" * 100_000, '{"step": 1e999}', "\x00"],
    ],
    ids=lambda labels: str(labels)[:40],
)
def test_labels_that_no_save_has_written_are_passed_over(labels: Any, tmp_path: Path) -> None:
    staged(labels)
    store = CheckpointStore(tmp_path / "checkpoints", run_id=RUN)
    commit_orphaned_save(store)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tmp"]
