"""The file operations of a checkpoint store, one method each, so that a test can simulate a power cut at any of them."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import BinaryIO

from finetune.runtime import fault_injection

CHUNK_BYTES = 4 * 2**20
"""Bytes copied or hashed at a time."""
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


class Disk:
    """Files and folders of a local disk or a mounted bucket. Every method raises OSError.

    Files are fsynced before the next operation begins; no caller relies on the store honouring it.
    """

    def make_folder(self, path: Path) -> None:
        """Its parent must exist; the folder itself may exist already."""
        path.mkdir(exist_ok=True)

    def copy_file(self, source: Path, target: Path) -> tuple[int, str]:
        """Copy in chunks; returns size in bytes and SHA-256 (hex) of the source. A file at `target` is overwritten."""
        fault_injection.place("copy")
        digest, size = hashlib.sha256(), 0
        with source.open("rb") as reading, target.open("wb", buffering=0) as writing:
            half = os.fstat(reading.fileno()).st_size // 2
            while chunk := reading.read(min(CHUNK_BYTES, half - size) if size < half else CHUNK_BYTES):
                self.write(writing, chunk)
                digest.update(chunk)
                size += len(chunk)
                if size == half:
                    fault_injection.place("half-copy")
            _sync(writing.fileno())
        return size, digest.hexdigest()

    def hash_file(self, path: Path) -> tuple[int, str]:
        """Size in bytes and SHA-256 (hex) of the file as read from the disk, bypassing the page cache where possible."""
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
        return size, digest.hexdigest()

    def write_text(self, path: Path, text: str) -> None:
        with path.open("wb", buffering=0) as file:
            self.write(file, text.encode())
            _sync(file.fileno())

    def write(self, file: BinaryIO, data: bytes) -> None:
        """All writes to files go through here."""
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]

    def remove_file(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def remove_empty_folder(self, path: Path) -> None:
        try:
            path.rmdir()
        except FileNotFoundError:  # a bucket may have no real folders: they disappear with their last file
            pass

    def rename_folder(self, path: Path, new: Path) -> None:
        path.rename(new)

    def sync_folder(self, path: Path) -> None:
        """Make the names of new files durable on a local disk; other stores may refuse."""
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError:
            return
        try:
            os.fsync(handle)
        except OSError:
            pass
        finally:
            os.close(handle)


DISK = Disk()


def _sync(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
