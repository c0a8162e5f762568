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
from finetune.runtime.files import disk_error, load_json, sha256_file, write_json

_STAGE = ".stage.json"


class PartFolder:
    """The folder in which an export is made. path: where its files go until `finish`."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(f"{target.name}.part")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and keep other processes out of it. Raises UserError if one is in it."""
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
            yield
        finally:
            os.close(handle)

    def has(self, key: str) -> bool:
        """Whether the files of `keep` with this key are there, unchanged; everything else in the folder is removed if not."""
        try:
            stage = load_json(self.path / _STAGE)
            if stage["key"] == key:
                check_files(self.path, stage["files"], verify=True)
                return True
        except (OSError, ValueError, LookupError, TypeError, AttributeError, UserError):
            pass
        self.clear()
        return False

    def clear(self) -> None:
        for path in self.path.iterdir():
            remove_tree(path, inside=self.path)

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
        for path in self.target.iterdir():  # after the rename, before which a killed export goes on from them
            if path.name.startswith("."):
                remove_tree(path, inside=self.target)


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
    """Whether the export with this key is at `target`. Raises UserError if something else is there."""
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
    check_files(target, manifest["files"], verify=False)
    return True


def taken(target: Path) -> UserError:
    return UserError(
        f"{target}: is there already and is not an export; choose another --output, which is not there",
        code="export.exists",
    )
