"""An export while it is made: a folder `<name>.part`, which gets its name when it is whole.

Its stages are kept: an export that was killed goes on with the weights it had written, if they are those that are asked for and
have not changed. One process at a time works in it.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.export.export_folder import MANIFEST, check_files, read_manifest
from finetune.runtime.confined import remove_tree
from finetune.runtime.console import say
from finetune.runtime.files import disk_error, kind_of, load_json, sha256_file, write_json

_MARKER = ".finetune-export"
"""Says that a folder was made here: what is in any other one is somebody's, and stays."""
_STAGE = ".stage.json"


class PartFolder:
    """The folder in which an export is made. path: where its files go until `finish`."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(f"{target.name}.part")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and keep other processes out of it. Raises UserError if one is in it, and if something else than an
        unfinished export is there."""
        if self.path.is_symlink() or kind_of(self.path) not in ("a folder", "nothing"):
            raise self._not_ours()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise disk_error(error, self.path) from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise UserError(
                        f"{self.path}: another `finetune export` is writing there; wait for it, or choose another --output",
                        code="export.busy",
                    ) from None  # a mounted bucket has no locks
            self._claim()
            yield
        finally:
            os.close(handle)

    def _claim(self) -> None:
        """Raises UserError for a folder with files that was not made here."""
        try:
            if any(self.path.iterdir()) and not (self.path / _MARKER).is_file():
                raise self._not_ours()
            (self.path / _MARKER).touch()
        except OSError as error:
            raise disk_error(error, self.path) from error

    def _not_ours(self) -> UserError:
        return UserError(
            f"{self.path}: an export is made there until it is whole, but what is there was not made by `finetune export`; move "
            "it, or choose another --output",
            code="export.exists",
        )

    def has(self, key: str) -> bool:
        """Whether the files of `keep` with this key are there, unchanged; everything else in the folder is removed if not."""
        try:
            stage = load_json(self.path / _STAGE)
            if stage["key"] == key:
                check_files(self.path, stage["files"], verify=True)
                return True
        except (OSError, ValueError, LookupError, TypeError, AttributeError, UserError):
            pass
        if left := [path for path in self.path.iterdir() if path.name != _MARKER]:
            say(f"{self.path}: what an earlier attempt left there is not whole, or of another export; beginning anew")
            for path in left:
                remove_tree(path, inside=self.path)
        return False

    def keep(self, key: str) -> None:
        """The files that are there now are complete: an export with this key need not write them again."""
        write_json(self.path / _STAGE, {"key": key, "files": listed(self.path)})

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest with the list of all files, and give the folder its name. Raises UserError for a disk error, and if
        there is another folder of that name by now."""
        write_json(self.path / MANIFEST, {**manifest, "files": listed(self.path)})
        try:
            os.rename(self.path, self.target)  # replaces an empty folder and no other
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise taken(self.target) from error
            raise disk_error(error, self.target) from error
        _sweep(self.target)  # after the rename, before which a killed export goes on from these files


def _sweep(folder: Path) -> None:
    """Remove what an export needs only while it is made; the marker last, so that a killed sweep is done again."""
    names = sorted(
        (path for path in folder.iterdir() if path.name.startswith(".")), key=lambda path: path.name == _MARKER
    )
    for path in names:
        remove_tree(path, inside=folder)


def listed(folder: Path) -> dict[str, dict[str, int | str]]:
    """Size and SHA-256 of the files in a folder and below it, without those whose name begins with a dot, and the manifest."""
    found: dict[str, dict[str, int | str]] = {}
    try:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder)
            if not any(part.startswith(".") for part in name.parts) and str(name) != MANIFEST:
                found[str(name)] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    except OSError as error:
        raise disk_error(error, folder) from error
    return found


def is_up_to_date(target: Path, key: str) -> bool:
    """Whether the export with this key is at `target`. Raises UserError if something else is there, or if a file of it has
    changed."""
    if not target.name:  # the folder of the shell, which cannot be replaced
        raise taken(target)
    if not os.path.lexists(target) or (target.is_dir() and not target.is_symlink() and not any(target.iterdir())):
        return False
    if not (target / MANIFEST).is_file():
        raise taken(target)
    manifest = read_manifest(target)
    if manifest["key"] != key:
        raise UserError(
            f"{target}: holds an export of another adapter or with other options; remove it, or choose another --output",
            code="export.exists",
        )
    check_files(target, manifest["files"], verify=True)
    if (target / _MARKER).is_file():  # killed between its rename and the sweep
        _sweep(target)
    return True


def taken(target: Path) -> UserError:
    return UserError(
        f"{target}: is there already and is not an export; choose another --output, which is not there",
        code="export.exists",
    )
