"""Small files, written atomically: a reader sees the old content or the new one, never a part."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from finetune.errors import UserError


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[str]]:
    """Write UTF-8 text to a temporary file in the same folder; it takes the name `path` only if the block succeeds.

    A lone surrogate, which a file name may contain, is written as its escape (\\udcff), which JSON reads back unchanged.
    Raises UserError if the disk is full or the folder cannot be written.
    """
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.fchmod(handle, 0o644)
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        _remove(temporary)
        elsewhere = isinstance(error.filename, str) and error.filename != temporary
        raise disk_error(error, Path(error.filename) if elsewhere else path) from error
    except BaseException:
        _remove(temporary)
        raise


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")


def as_text(path: Path) -> str:
    """A path as printable text; bytes that cannot be decoded become escapes."""
    return str(path).encode(errors="backslashreplace").decode()


def read_json(path: Path, made_by: str) -> dict[str, Any]:
    """A JSON object from a file that an earlier stage wrote; `made_by` names that stage's command in errors."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; run `{made_by}` first", code="file.missing") from None
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path}: not readable as JSON ({error}); run `{made_by}` again", code="file.bad_json"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object; run `{made_by}` again", code="file.bad_json")
    return value


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def with_carriage_returns(paths: Iterable[Path]) -> list[Path]:
    """The files with Windows line ends, which bash and make cannot read; files that cannot be opened are left out."""
    found = []
    for path in paths:
        try:
            if b"\r\n" in path.read_bytes():
                found.append(path)
        except OSError:
            continue
    return found


def unix_line_ends_command(paths: Iterable[Path]) -> str:
    """The shell command that converts the files to Unix line ends."""
    return f"sed -i 's/\\r$//' {shlex.join(map(str, paths))}"


def disk_error(error: OSError, path: Path) -> UserError:
    """A UserError for an OSError at `path`, with what to do about it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"{path}: no space left on the disk; free some or choose another output folder", code="disk.full"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(
            f"{path}: not writable ({error.strerror}); choose another output folder", code="disk.not_writable"
        )
    return UserError(f"{path}: {error.strerror or error}", code="disk.error")


def _remove(path: str) -> None:
    if path:
        try:
            os.unlink(path)
        except OSError:
            pass
