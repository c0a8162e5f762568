"""Checkpoints that count only when they are whole: put, verify, newest valid, prune, clean.

A checkpoint `step-N` of a store is a folder with what a save wrote and a manifest: name, size and SHA-256 of every file,
sealed with a SHA-256 of itself. The manifest is written last and deleted first, so a folder without a whole one is what a
cut-off save or deletion left behind. The store may be a mounted bucket: nothing here needs a rename or an append to be atomic,
or an fsync to be honoured. Where it is not, a power cut can spoil the newest checkpoint even after its commit, which is why
keep_last should be 2 or more.

One process writes to a store at a time. Two that save the same step spoil it for each other: a mixture of both never verifies, so
that step may be lost, and the ones before it stay.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.checkpoint.filesystem import DISK, Disk
from finetune.checkpoint.manifest import (
    MANIFEST,
    InvalidCheckpoint,
    check_files,
    manifest_of,
    manifest_text,
    right_sizes,
)
from finetune.errors import UserError
from finetune.runtime import fault_injection
from finetune.runtime.files import disk_error

__all__ = ["MANIFEST", "CheckpointStore", "Disk", "Skipped", "fault", "newest_first", "read_manifest", "step_folder"]

_NAME = re.compile(r"step-(0|[1-9][0-9]*)")
_VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO)


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that was passed over, and why.

    corrupt: its bytes were read and are wrong. unreadable: they cannot be read now. Otherwise it was never finished, or is of
    another run.
    """

    folder: Path
    reason: str
    corrupt: bool
    unreadable: bool = False


class CheckpointStore:
    """The checkpoints of one run in the folder `root`, which the first `put` makes; its parent has to be there.

    keep_last, keep_every: the newest so many checkpoints stay, and of the older ones every so many-th.
    """

    def __init__(
        self, root: Path, *, run_id: str, keep_last: int = 2, keep_every: int | None = None, disk: Disk = DISK
    ) -> None:
        self.root, self.run_id, self.keep_last, self.keep_every = root, run_id, keep_last, keep_every
        self._disk = disk
        self._seen = os.access(root, os.F_OK)
        self._corrupt: set[Path] = set()

    def put(self, source: Path, *, step: int, config_hash: str, data_hash: str, attempt: int) -> Path:
        """Make the files under `source` the checkpoint of a step: copy, read back, then write the manifest; returns its folder.

        A valid checkpoint of that step of this run is left as it is, anything less is replaced. Raises UserError for a fault of
        the store or the source, and where something that is not this run's is in the way; a half copy is taken away again.
        """
        target = step_folder(self.root, step)
        begun = False
        try:
            self._open_root()
            if self._stands(target):
                return target
            begun = True
            number = 1 + max((m["number"] for m in self._manifests().values() if m["step"] < step), default=0)
            files = self._copy(source, target)
            manifest = {"step": step, "number": number, "run_id": self.run_id, "attempt": attempt}
            manifest |= {"config_hash": config_hash, "data_hash": data_hash, "saved_at": datetime.now(UTC).isoformat()}
            fault_injection.place("manifest")
            self._disk.write_text(target / MANIFEST, manifest_text({**manifest, "files": files}))
            self._disk.sync_folder(target)
        except (OSError, UserError) as error:
            if begun:
                self._discard(target)
            if isinstance(error, UserError):
                raise
            raise self._told(error, source) from error
        fault_injection.place("committed")
        self._corrupt.discard(target)
        return target

    def latest_valid(self) -> tuple[Path | None, list[Skipped]]:
        """The newest checkpoint of this run whose every byte verifies, and what was passed over on the way to it, newest first.

        Raises UserError when the store itself cannot be read: its checkpoints may all be there.
        """
        skipped: list[Skipped] = []
        try:
            for folder in _entries(self.root):
                invalid = self._invalid(folder)
                if invalid is None:
                    return folder, skipped
                unreadable = not (invalid.corrupt or invalid.incomplete or invalid.wrong_run)
                skipped.append(Skipped(folder, str(invalid), invalid.corrupt, unreadable))
        except OSError as error:
            raise self._told(error) from error
        finally:
            self._corrupt |= {item.folder for item in skipped if item.corrupt}
        return None, skipped

    def prune(self) -> list[Path]:
        """Delete the checkpoints that need not be kept, each one's manifest first; returns their folders, newest first.

        Only checkpoints of this run count, and are deleted, that have all their files in the right sizes and that `latest_valid`
        has not found corrupt. Raises UserError when the store refuses.
        """
        try:
            whole = [(f, m) for f, m in self._manifests().items() if f not in self._corrupt and right_sizes(f, m)]
            goes = [f for f, m in whole[self.keep_last :] if not self.keep_every or m["number"] % self.keep_every]
            for folder in goes:
                self._remove(folder)
        except OSError as error:
            raise self._told(error) from error
        return goes

    def quarantine(self, skipped: Skipped) -> Path | None:
        """Rename a corrupt checkpoint to damaged-step-N, where it neither counts nor stands in the way; returns where it is now.

        None: it stayed (not corrupt), or was deleted because the store cannot rename folders, as a bucket may not.
        """
        if not skipped.corrupt:
            return None
        quarantined = skipped.folder.with_name(f"damaged-{skipped.folder.name}")
        try:
            self._remove(quarantined)
            try:
                self._disk.rename_folder(skipped.folder, quarantined)
            except OSError:
                self._remove(skipped.folder)
                return None
        except OSError as error:
            raise self._told(error) from error
        return quarantined

    def clean(self) -> list[Path]:
        """Delete the folders that saves and deletions left when they were cut off: those without a whole manifest."""
        try:
            left = [
                f for f in newest_first(self.root) if (invalid := self._invalid(f, deep=False)) and invalid.incomplete
            ]
            for folder in left:
                self._remove(folder)
        except OSError as error:
            raise self._told(error) from error
        return left

    def _open_root(self) -> None:
        """A root that was there and is not any more may be a bucket that lost its mount: never make it anew on the local disk."""
        if not self._seen:
            self._disk.make_folder(self.root)
        self.root.stat()
        self._seen = True

    def _stands(self, target: Path) -> bool:
        """Whether a valid checkpoint is at `target` already; removes one that is less. UserError: it is not this run's."""
        if not os.path.lexists(target):
            return False
        invalid = self._invalid(target)
        if invalid is not None and invalid.wrong_run:
            raise UserError(
                f"{target}: {invalid}; move it away, or choose another output folder", code="checkpoint.name_taken"
            )
        if invalid is not None:
            self._remove(target)
        return invalid is None

    def _invalid(self, folder: Path, deep: bool = True) -> InvalidCheckpoint | None:
        """What keeps a folder from being a valid checkpoint of this run. deep: reads every file once, not the manifest alone."""
        try:
            manifest = manifest_of(folder)
            if manifest["run_id"] != self.run_id:
                return InvalidCheckpoint(f"is of another run ({manifest['run_id']})", wrong_run=True)
            if deep:
                check_files(folder, manifest, self._disk)
        except InvalidCheckpoint as invalid:
            return invalid
        except OSError as error:
            return InvalidCheckpoint(f"cannot be read now ({error.strerror})")
        return None

    def _manifests(self) -> dict[Path, dict[str, Any]]:
        """The whole manifests of this run, newest first."""
        found = {}
        for folder in newest_first(self.root):
            try:
                found[folder] = manifest_of(folder)
            except (InvalidCheckpoint, OSError):
                continue
        return {folder: manifest for folder, manifest in found.items() if manifest["run_id"] == self.run_id}

    def _copy(self, source: Path, target: Path) -> dict[str, dict[str, Any]]:
        """Copy all files but a manifest and read them back; returns the manifest's entries."""
        names = [str(p.relative_to(source)) for p in sorted(source.rglob("*")) if p.is_file()]
        names = [name for name in names if name != MANIFEST]
        if not names:
            raise UserError(
                f"{source}: nothing to save there; the staged save is empty or gone", code="checkpoint.snapshot_missing"
            )
        folders = sorted({parent for name in names for parent in (target / name).parents if target in parent.parents})
        for folder in [target, *folders]:
            self._disk.make_folder(folder)
        written = {name: self._disk.copy_file(source / name, target / name) for name in names}
        for folder in [*reversed(folders), target, self.root]:
            self._disk.sync_folder(folder)
        for name, (size, sha256) in written.items():
            fault_injection.place("verify")
            if self._disk.hash_file(target / name) != (size, sha256):
                raise UserError(
                    f"{target / name}: other bytes came back than were written; the disk or bucket is at fault",
                    code="checkpoint.write_corrupted",
                )
        return {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in written.items()}

    def _remove(self, folder: Path) -> None:
        """Delete a folder, its manifest first of all. One that is not there is no fault."""
        if folder.is_symlink() or folder.is_file():
            self._disk.remove_file(folder)
        if not folder.is_dir():
            return
        if not (folder / MANIFEST).is_dir():
            self._disk.remove_file(folder / MANIFEST)
        fault_injection.place("prune")
        for where, folders, files in os.walk(folder, topdown=False):
            links = [name for name in folders if (Path(where) / name).is_symlink()]
            for name in [*files, *links]:
                self._disk.remove_file(Path(where) / name)
            self._disk.remove_empty_folder(Path(where))

    def _discard(self, target: Path) -> None:
        """Free the room that a failed copy took; where that fails too, `clean` finds it."""
        try:
            self._remove(target)
        except OSError:
            pass

    def _told(self, error: OSError, source: Path | None = None) -> UserError:
        if source is not None and str(error.filename or "").startswith(str(source)):
            return UserError(
                f"{source}: the staged save cannot be read ({error.strerror})", code="checkpoint.snapshot_unreadable"
            )
        if error.errno in _VANISHED:
            return UserError(
                f"{self.root}: the store has vanished ({error.strerror}); is its bucket or disk still mounted?",
                code="checkpoint.store_vanished",
            )
        return disk_error(error, self.root)


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step}"


def newest_first(root: Path) -> Iterator[Path]:
    """The folders step-N under root, whole or not, the highest N first; links to folders are none of them."""
    return (entry for entry in _entries(root) if entry.is_dir() and not entry.is_symlink())


def read_manifest(folder: Path) -> dict[str, Any]:
    """step, number, run_id, attempt, config_hash, data_hash, saved_at (UTC), files {name: {bytes, sha256}} of a checkpoint.

    saved_at is for people; no decision rests on a clock. Raises UserError when there is no whole manifest.
    """
    try:
        return manifest_of(folder)
    except InvalidCheckpoint as invalid:
        raise UserError(f"{folder}: {invalid}", code="checkpoint.corrupt") from invalid
    except OSError as error:
        raise disk_error(error, folder / MANIFEST) from error


def fault(folder: Path) -> str | None:
    """What keeps a folder from being a checkpoint of some run, None if it is one. Reads every file once."""
    try:
        check_files(folder, manifest_of(folder), DISK)
    except InvalidCheckpoint as invalid:
        return str(invalid)
    except OSError as error:
        return f"cannot be read now ({error.strerror})"
    return None


def _entries(root: Path) -> list[Path]:
    """What is called step-N under root, the highest N first."""
    try:
        found = [(int(match[1]), entry) for entry in root.iterdir() if (match := _NAME.fullmatch(entry.name))]
    except FileNotFoundError:
        return []
    return [entry for _, entry in sorted(found, reverse=True)]
