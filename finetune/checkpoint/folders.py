"""The folders of checkpoints: step-N below a root, what the manifest of one says, and whether it is whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.checkpoint.filesystem import DISK
from finetune.checkpoint.manifest import MANIFEST, InvalidCheckpoint, check_files, manifest_of
from finetune.errors import UserError
from finetune.runtime.files import disk_error

_NAME = re.compile(r"step-(0|[1-9][0-9]*)")


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step}"


def newest_first(root: Path) -> Iterator[Path]:
    """The folders step-N under root, complete or not, the highest N first; links to folders are left out."""
    return (entry for entry in folder_entries(root) if entry.is_dir() and not entry.is_symlink())


def read_manifest(folder: Path) -> dict[str, Any]:
    """step, number, run_id, attempt, config_hash, data_hash, saved_at (UTC), files {name: {bytes, sha256}} of a checkpoint, and
    lease: the number of the claim under which it was saved.

    saved_at is for people; no decision depends on a clock. Raises UserError when there is no valid manifest.
    """
    try:
        return manifest_of(folder)
    except InvalidCheckpoint as invalid:
        raise UserError(f"{folder}: {invalid}", code="checkpoint.corrupt") from invalid
    except OSError as error:
        raise disk_error(error, folder / MANIFEST) from error


def fault(folder: Path) -> str | None:
    """Why a folder is not a valid checkpoint of any run; None if it is one. Reads every file."""
    try:
        check_files(folder, manifest_of(folder), DISK)
    except InvalidCheckpoint as invalid:
        return str(invalid)
    except OSError as error:
        return f"cannot be read now ({error.strerror})"
    return None


def folder_entries(root: Path) -> list[Path]:
    """Files and folders called step-N under root, the highest N first."""
    try:
        found = [(int(match[1]), entry) for entry in root.iterdir() if (match := _NAME.fullmatch(entry.name))]
    except FileNotFoundError:
        return []
    return [entry for _, entry in sorted(found, reverse=True)]
