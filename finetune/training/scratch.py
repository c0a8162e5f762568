"""The folder on the local disk for staged saves: found again by a later attempt of the same run on the same machine.

$TMPDIR/finetune-UID/         one folder of ours a user, which nobody else can write into
    save-XXXXXXXX/            one folder an attempt, with a random name (mkdtemp)
        run                   the id of its run
        checkpoint-N.save-K/  staged saves

No folder is named after something that was read from a file; a run's folders are found by what they say they belong to.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from finetune.errors import UserError
from finetune.runtime.confined import remove_file, remove_tree
from finetune.runtime.files import disk_error, write_text

RUN_FILE = "run"
PREFIX = "save-"


def scratch_folder(run_id: str) -> Path:
    """A new empty folder on the local disk for staged saves of this run; those of its earlier attempts are deleted."""
    for folder in scratch_folders(run_id):
        remove_tree(folder, inside=_ours(), ignore_errors=True)
    try:
        folder = Path(tempfile.mkdtemp(dir=_ours(), prefix=PREFIX))
    except OSError as error:
        raise disk_error(error, _ours()) from error
    write_text(folder / RUN_FILE, f"{run_id}\n")
    return folder


def scratch_folders(run_id: str) -> list[Path]:
    """The folders that earlier attempts of this run left on this machine."""
    return sorted(path for path in _ours().glob(f"{PREFIX}*") if not path.is_symlink() and _run_of(path) == run_id)


def remove_if_empty(folder: Path) -> None:
    """Delete an attempt's folder unless it still holds a staged save. Raises OSError if it cannot be deleted."""
    if [path.name for path in folder.iterdir()] == [RUN_FILE]:
        remove_file(folder / RUN_FILE, inside=folder)
        folder.rmdir()


def _run_of(folder: Path) -> str | None:
    try:
        if not (folder / RUN_FILE).is_file():  # a FIFO would never end
            return None
        with (folder / RUN_FILE).open("rb") as file:
            return file.read(100).decode("ascii", errors="replace").strip()
    except OSError:
        return None


def _ours() -> Path:
    """Created if missing. Raises UserError if another user owns the name, as anybody may create names in /tmp."""
    folder = Path(tempfile.gettempdir()) / f"finetune-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except FileExistsError:
        found = folder.lstat()
    except OSError as error:
        raise disk_error(error, folder) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise UserError(
            f"{folder}: expected a folder of this user for staged saves; remove it, or set TMPDIR to another folder",
            code="disk.scratch_taken",
        )
    return folder
