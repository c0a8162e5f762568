"""Checkpoints that are valid only when complete: put, verify, newest valid, prune, clean.

A checkpoint is a folder `step-N` with the files of a save and a manifest: name, size and SHA-256 of every file, sealed with a
SHA-256 of itself. The manifest is written last and deleted first, so a folder without a complete one was left by an interrupted
save or deletion. The store may be a mounted bucket: nothing here needs an atomic rename or append, or an fsync that is honoured.
Where fsync is not honoured, a power cut can corrupt the newest checkpoint even after its commit; keep_last should therefore be
2 or more.

Only one process may write to a store at a time, which its fence ensures (fence.py): it is asked right before every change. If two
save the same step all the same, a mixture of both never verifies: that step may be lost, and earlier checkpoints stay.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.checkpoint.fence import Fence, NoFence
from finetune.checkpoint.filesystem import DISK, Disk
from finetune.checkpoint.folders import folder_entries, newest_first, step_folder
from finetune.checkpoint.manifest import (
    MANIFEST,
    InvalidCheckpoint,
    check_files,
    check_names,
    manifest_of,
    manifest_text,
    right_sizes,
    seal_of,
)
from finetune.errors import TakenOver, UserError
from finetune.runtime import fault_injection
from finetune.runtime.confined import check_inside
from finetune.runtime.files import disk_error

NO_FENCE = NoFence()
RECENTLY_SECONDS = 2.0
"""A look at the lease before every single file of a copy would cost a second of the thirty that a preemption leaves."""
_VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO)


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that was skipped, and why.

    corrupt: its content was read and is wrong. unreadable: it cannot be read now. Neither: it is incomplete or of another run.
    """

    folder: Path
    reason: str
    corrupt: bool
    unreadable: bool = False


class CheckpointStore:
    """The checkpoints of one run in the folder `root`, which the first `put` creates; its parent must exist.

    keep_last: number of newest checkpoints to keep. keep_every: of the older ones, every keep_every-th is kept too. fence:
    keeps an attempt that has lost the run from changing anything. required: the files without which a folder is not a checkpoint.
    content: why their content is not one (a folder and its manifest), None if it is.
    """

    def __init__(
        self,
        root: Path,
        *,
        run_id: str,
        keep_last: int = 2,
        keep_every: int | None = None,
        disk: Disk = DISK,
        fence: Fence = NO_FENCE,
        required: Sequence[str] = (),
        content: Callable[[Path, dict[str, Any]], str | None] | None = None,
    ) -> None:
        self.root, self.run_id, self.keep_last, self.keep_every = root, run_id, keep_last, keep_every
        self._disk, self._fence = disk, fence
        self._required, self._content = required, content
        self._seen = os.access(root, os.F_OK)
        self._corrupt: set[Path] = set()

    def put(self, source: Path, *, step: int, config_hash: str, data_hash: str, attempt: int) -> Path:
        """Commit the files under `source` as the checkpoint of a step: copy, read back, write the manifest; returns its folder.

        A valid checkpoint of this run for that step is left unchanged; an invalid one is replaced. Raises UserError for a fault
        of the store or the source, and where step-N exists and is not of this run; a partial copy is deleted.
        """
        target = step_folder(self.root, step)
        begun = False
        try:
            self._fence.check()
            self._open_root()
            if self._already_valid(target):
                return target
            begun = True
            number = 1 + max((m["number"] for m in self._manifests().values() if m["step"] < step), default=0)
            files = self._copy(source, target)
            manifest = {"step": step, "number": number, "run_id": self.run_id, "attempt": attempt}
            manifest |= {"config_hash": config_hash, "data_hash": data_hash, "saved_at": datetime.now(UTC).isoformat()}
            if self._fence.number:
                manifest["lease"] = self._fence.number
            fault_injection.place("manifest")
            self._fence.check()
            self._disk.write_text(target / MANIFEST, manifest_text({**manifest, "files": files}))
            self._disk.sync_folder(target)
        except (OSError, UserError) as error:
            if begun and not isinstance(error, TakenOver):
                self._discard(target)
            if isinstance(error, UserError):
                raise
            raise self._user_error(error, source) from error
        fault_injection.place("committed")
        self._corrupt.discard(target)
        return target

    def latest_valid(self) -> tuple[Path | None, list[Skipped]]:
        """The newest checkpoint of this run of which all files verify, and the newer ones that were skipped, newest first.

        Raises UserError when the store itself cannot be read: its checkpoints may still exist.
        """
        skipped: list[Skipped] = []
        try:
            for folder in folder_entries(self.root):
                invalid = self._invalid(folder)
                if invalid is None:
                    return folder, skipped
                unreadable = not (invalid.corrupt or invalid.incomplete or invalid.wrong_run)
                skipped.append(Skipped(folder, str(invalid), invalid.corrupt, unreadable))
        except OSError as error:
            raise self._user_error(error) from error
        finally:
            self._corrupt |= {item.folder for item in skipped if item.corrupt}
        return None, skipped

    def heritage(self) -> tuple[dict[str, str], int]:
        """What an attempt that takes over finds: folder's name -> hash of its manifest, for every checkpoint of this run, and the
        highest number of an attempt that committed one. "*" for a manifest that cannot be read now. Raises UserError when the
        store cannot be listed."""
        found: dict[str, str] = {}
        highest = 0
        try:
            for folder in newest_first(self.root):
                try:
                    manifest = manifest_of(folder)
                except InvalidCheckpoint:
                    continue
                except OSError:
                    found[folder.name] = "*"
                    continue
                if manifest["run_id"] == self.run_id:
                    found[folder.name] = seal_of(manifest)
                    highest = max(highest, manifest.get("lease", 0))
        except OSError as error:
            raise self._user_error(error) from error
        return found, highest

    def prune(self) -> list[Path]:
        """Delete the checkpoints that need not be kept, each manifest first; returns their folders, newest first.

        Counts and deletes only checkpoints of this run whose files all have the right sizes and which `latest_valid` has not
        found corrupt. Raises UserError when the store refuses.
        """
        try:
            whole = [(f, m) for f, m in self._manifests().items() if f not in self._corrupt and right_sizes(f, m)]
            expired = [f for f, m in whole[self.keep_last :] if not self.keep_every or m["number"] % self.keep_every]
            for folder in expired:
                self._remove(folder)
        except OSError as error:
            raise self._user_error(error) from error
        return expired

    def quarantine(self, skipped: Skipped) -> Path | None:
        """Rename a corrupt checkpoint to damaged-step-N, which the store ignores from then on; returns its new path.

        None: it was left in place (not corrupt), or deleted because the store cannot rename folders, such as some buckets.
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
            raise self._user_error(error) from error
        return quarantined

    def clean(self) -> list[Path]:
        """Delete the folders that interrupted saves and deletions left: those without a complete manifest."""
        try:
            left = [
                f for f in newest_first(self.root) if (invalid := self._invalid(f, deep=False)) and invalid.incomplete
            ]
            for folder in left:
                self._remove(folder)
        except OSError as error:
            raise self._user_error(error) from error
        return left

    def _open_root(self) -> None:
        """A root that has disappeared may be a bucket that lost its mount: never recreate it on the local disk."""
        if not self._seen:
            self._disk.make_folder(self.root)
        self.root.stat()
        self._seen = True

    def _already_valid(self, target: Path) -> bool:
        """Whether a valid checkpoint exists at `target`; removes an invalid one. Raises UserError if it is not of this run."""
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
        """Why a folder is not a valid checkpoint of this run; None if it is one. deep: also read and hash every file."""
        try:
            manifest = manifest_of(folder)
            if manifest["run_id"] != self.run_id:
                return InvalidCheckpoint(f"is of another run ({manifest['run_id']})", wrong_run=True)
            check_names(manifest, self._required)
            if self._too_late(folder, manifest):
                return InvalidCheckpoint("was committed by an attempt that had lost the run", corrupt=True)
            if deep:
                check_files(folder, manifest, self._disk)
            if deep and self._content and (why := self._content(folder, manifest)):
                return InvalidCheckpoint(why, corrupt=True)
        except InvalidCheckpoint as invalid:
            return invalid
        except OSError as error:
            return InvalidCheckpoint(f"cannot be read now ({error.strerror})")
        return None

    def _manifests(self) -> dict[Path, dict[str, Any]]:
        """The valid manifests of this run, newest first."""
        found = {}
        for folder in newest_first(self.root):
            try:
                manifest = manifest_of(folder)
                check_names(manifest, self._required)
                found[folder] = manifest
            except (InvalidCheckpoint, OSError):
                continue
        return {f: m for f, m in found.items() if m["run_id"] == self.run_id and not self._too_late(f, m)}

    def _too_late(self, folder: Path, manifest: dict[str, Any]) -> bool:
        return self._fence.too_late(folder.name, manifest.get("lease", 0), seal_of(manifest))

    def _copy(self, source: Path, target: Path) -> dict[str, dict[str, Any]]:
        """Copy all files except a manifest and read them back; returns the file entries of the manifest."""
        names = [str(p.relative_to(source)) for p in sorted(source.rglob("*")) if p.is_file()]
        names = [name for name in names if name != MANIFEST]
        if not names:
            raise UserError(
                f"{source}: nothing to save; the staged save is empty or has been deleted",
                code="checkpoint.snapshot_missing",
            )
        folders = sorted({parent for name in names for parent in (target / name).parents if target in parent.parents})
        for folder in [target, *folders]:
            self._disk.make_folder(folder)
        written = {}
        for name in names:
            self._fence.check(RECENTLY_SECONDS)
            written[name] = self._disk.copy_file(source / name, target / name)
        for folder in [*reversed(folders), target, self.root]:
            self._disk.sync_folder(folder)
        for name, (size, sha256) in written.items():
            fault_injection.place("verify")
            if self._disk.hash_file(target / name) != (size, sha256):
                raise UserError(
                    f"{target / name}: the bytes read back differ from those written; the disk or bucket is at fault",
                    code="checkpoint.write_corrupted",
                )
        return {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in written.items()}

    def _remove(self, folder: Path) -> None:
        """Delete a folder, its manifest first. It need not exist; a link in it is deleted, not followed."""
        check_inside(folder, self.root)
        self._fence.check()
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
        """Free the space of a failed copy; if that fails too, `clean` will delete it."""
        try:
            self._remove(target)
        except (OSError, UserError):
            pass

    def _user_error(self, error: OSError, source: Path | None = None) -> UserError:
        if source is not None and str(error.filename or "").startswith(str(source)):
            return UserError(
                f"{source}: the staged save cannot be read ({error.strerror})", code="checkpoint.snapshot_unreadable"
            )
        if error.errno in _VANISHED:
            return UserError(
                f"{self.root}: the store has disappeared ({error.strerror}); is its bucket or disk still mounted?",
                code="checkpoint.store_vanished",
            )
        return disk_error(error, self.root)
