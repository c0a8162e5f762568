"""A file has the old content or the new one, and a disk error is reported in one line."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from finetune.runtime.files import atomic_file, disk_error, read_json, sha256_file, write_json, write_text
from tests.helpers.errors import raises


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_is_written_as_utf8_into_folders_that_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    write_text(path, "Grüße 中\n")
    assert path.read_bytes() == "Grüße 中\n".encode()
    assert names(path.parent) == ["file.txt"]


def test_others_may_read_the_file_but_not_write_it(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "x")
    assert path.stat().st_mode & 0o777 == 0o644


def test_the_old_file_stands_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with atomic_file(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("failure", [ValueError("broken"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failure_in_the_block_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(type(failure)), atomic_file(path) as file:
        file.write("half")
        raise failure
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_failure_before_there_was_a_file_leaves_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"), atomic_file(tmp_path / "file.txt"):
        raise ValueError("broken")
    assert names(tmp_path) == []


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; needs the right to mount."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a small file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_is_a_user_error_and_keeps_the_old_file(full_disk: Path) -> None:
    path = full_disk / "file.txt"
    write_text(path, "old")
    with raises("disk.full", match=r"file\.txt: no space left on the disk; free some"):
        write_text(path, "x" * 1_000_000)
    assert path.read_text() == "old"
    assert names(full_disk) == ["file.txt"]


@pytest.mark.parametrize("call", ["fdopen", "replace"])
def test_a_disk_that_fills_up_at_any_step_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*args: object, **keywords: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file.txt"
    path.write_text("old")
    monkeypatch.setattr(os, call, fail)
    with raises("disk.full"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


WRITES = """
import sys
from pathlib import Path
from finetune.errors import UserError
from finetune.runtime.files import write_text
try:
    write_text(Path(sys.argv[1]), "x")
except UserError as error:
    print(error.code, error)
"""


@pytest.mark.parametrize("of_a_run", [False, True])
def test_a_folder_without_permission_is_a_user_error(tmp_path: Path, of_a_run: bool) -> None:
    """That names the file, and not the temporary one; what is written about a run is written into its folder alone."""
    path = tmp_path / "eval" / "file.txt"
    path.parent.mkdir()
    if of_a_run:
        (tmp_path / "run.json").touch()
    path.parent.chmod(0o500)
    try:
        done = subprocess.run(
            [*as_user(), sys.executable, "-c", WRITES, path], capture_output=True, text=True, check=False
        )
    finally:
        path.parent.chmod(0o700)
    advice = f"go on with a copy of {tmp_path} in another folder" if of_a_run else "choose another output folder"
    said = f"disk.not_writable {path}: not writable (Permission denied); make it writable or {advice}"
    assert done.stdout == f"{said}\n", done.stderr


def as_user() -> list[str]:
    """How a program is started so that permissions count for it: root writes everywhere, unless it gives up that right."""
    if os.geteuid():
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root needs setpriv to become like any user")
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]


def test_a_folder_that_is_a_file_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with raises("disk.error", match="taken"):
        write_text(tmp_path / "taken" / "file.txt", "x")


def test_a_file_that_the_block_cannot_read_is_not_blamed_on_the_file_it_writes(tmp_path: Path) -> None:
    with raises("disk.error", match=r"absent\.txt"), atomic_file(tmp_path / "file.txt") as file:
        file.write((tmp_path / "absent.txt").read_text())
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "part"),
    [
        (errno.ENOSPC, "no space left on the disk; free some"),
        (errno.EDQUOT, "no space left on the disk; free some"),
        (errno.EACCES, "not writable"),
        (errno.EROFS, "not writable"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
def test_an_error_of_the_disk_names_the_file_in_one_line(code: int, part: str) -> None:
    message = str(disk_error(OSError(code, os.strerror(code)), Path("out/run.json")))
    assert message.startswith("out/run.json: ") and part in message and "\n" not in message


def test_json_survives_and_ends_with_a_newline(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": {"text": "ü"}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json", "finetune x") == value
    assert (tmp_path / "x.json").read_text().endswith("}\n")


@pytest.mark.parametrize("value", [{"loss": float("nan")}, {"x": float("inf")}, {"x": object()}])
def test_what_json_cannot_hold_is_refused_and_keeps_the_old_file(tmp_path: Path, value: object) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(path, value)
    assert json.loads(path.read_text()) == {"old": 1}
    assert names(tmp_path) == ["x.json"]


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"", b"7"])
def test_json_that_is_broken_or_no_object_names_the_command_that_makes_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with raises(
        "file.bad_json", match=r"x\.json: (not readable as|expected a) JSON.*run `finetune data prepare` again"
    ):
        read_json(path, "finetune data prepare")


def test_json_that_is_missing_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with raises("file.missing", match=r"x\.json: missing; run `finetune train` first"):
        read_json(tmp_path / "x.json", "finetune train")


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")  # the test vector of FIPS 180-2, appendix B.1
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "x") == digest
