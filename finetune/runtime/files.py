"""Small files, written atomically: a reader sees the old content or the new one, never a part."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shlex
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

from finetune.errors import UserError, shown
from finetune.runtime.confined import remove_file


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[str]]:
    """Write UTF-8 text to a temporary file in the same folder; it takes the name `path` only if the block succeeds.

    A lone surrogate, which a file name may contain, is written as its escape (\\udcff), which JSON reads back unchanged.
    Raises UserError if the disk is full or the folder cannot be written.
    """
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = _temporary_beside(path)
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


def _temporary_beside(path: Path) -> tuple[int, str]:
    """A new file, open for writing, and its name. Raises OSError that names the path: nobody knows the temporary name."""
    try:
        return tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")


def remove_unfinished(folder: Path, names: str) -> None:
    """Delete what writers that were killed have left of the files with these names, a pattern of glob. Nobody else may be writing
    one of them. Raises UserError if the folder cannot be written."""
    try:
        for orphan in folder.glob(f".{names}.*.tmp"):
            remove_file(orphan, inside=folder)
    except OSError as error:
        raise disk_error(error, folder) from error


def as_text(path: Path) -> str:
    """A path as printable text; bytes that cannot be decoded become escapes."""
    return str(path).encode(errors="backslashreplace").decode()


LARGEST_FILE = 1 << 28
"""Bytes of a file that is read as a whole, where the caller sets no other limit; the largest, a long run's run.json, has a few
million."""
LONGEST_NUMBER = 300
"""Digits: a longer whole number has no float."""


def kind_of(path: Path) -> str:
    """What is at the path, for messages: "a file", "a folder", "a pipe", "a device", "a socket", "nothing"."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return "a broken link" if _is_link(path) else "nothing"
    kinds = {stat.S_ISREG: "a file", stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    return next((kind for is_kind, kind in kinds.items() if is_kind(mode)), "a device")


def read_bytes(path: Path, largest: int = LARGEST_FILE) -> bytes:
    """The content of a file that is not larger than `largest` bytes. Raises OSError, and only that, for anything else: for a pipe
    it does not wait."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC) if kind_of(path) == "a file" else None
    except ValueError:  # a NUL character in the name
        handle = None
    if handle is None:
        _raise_unreadable(path)
    with open(handle, "rb") as file:  # noqa: PTH123
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            _raise_unreadable(path)
        content = file.read(largest + 1)
    if len(content) > largest:
        raise OSError(errno.EFBIG, f"larger than {largest:,} bytes, which no such file is", str(path))
    return content


def read_text(path: Path, largest: int = LARGEST_FILE) -> str:
    """The content as UTF-8 text, without a byte-order mark. Raises OSError, and ValueError for another encoding."""
    content = read_bytes(path, largest)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not text in UTF-8 (byte {error.start})") from error


def parse_json(text: str | bytes, *, nan: bool = False) -> Any:
    """A JSON value. Raises ValueError, and only that, with one short line: also for a repeated key, for NaN, for numbers of
    hundreds of digits or beyond a float, and for a value that is nested too deeply. nan: NaN and Infinity are allowed."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        return json.loads(
            text,
            object_pairs_hook=without_repeated_keys,
            parse_int=_whole_number,
            parse_float=_finite_number,
            parse_constant=float if nan else _no_number,
        )
    except RepeatedKeyError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not text in UTF-8 (byte {error.start})") from error


def load_json(path: Path, largest: int = LARGEST_FILE) -> Any:
    """The JSON value in a file. Raises OSError and ValueError."""
    return parse_json(read_text(path, largest))


def read_json(path: Path, made_by: str) -> dict[str, Any]:
    """A JSON object from a file that an earlier stage wrote, NaN included; `made_by` names that stage's command in errors."""
    try:
        value = parse_json(read_text(path), nan=True)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; run `{made_by}` first", code="file.missing") from None
    except OSError as error:
        raise UserError(
            f"{path}: not readable ({error.strerror}); run `{made_by}` again", code="file.bad_json"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{path}: not readable as JSON ({error}); run `{made_by}` again", code="file.bad_json"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object; run `{made_by}` again", code="file.bad_json")
    return value


class RepeatedKeyError(ValueError):
    """An object in JSON has the same key twice: Python's reader would keep the last value without a word."""


def without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` for json.loads. Raises RepeatedKeyError."""
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise RepeatedKeyError(f"the key {shown(name)} is there twice")
    return made


def _whole_number(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _finite_number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {shown(text)[1:-1]} is too large")
    return value


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _raise_unreadable(path: Path) -> NoReturn:
    """Raises the OSError that reading the path would give, or one that says what is there instead of a file."""
    try:
        path.stat()
    except ValueError:
        raise OSError(errno.EINVAL, "a NUL character in its name", str(path)) from None
    raise OSError(errno.EISDIR, f"is {kind_of(path)}, not a file", str(path))


def _is_link(path: Path) -> bool:
    try:
        return path.is_symlink()
    except (OSError, ValueError):
        return False


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
        return UserError(f"{path}: no space left on the disk; free some or {_elsewhere(path)}", code="disk.full")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(
            f"{path}: not writable ({error.strerror}); make it writable or {_elsewhere(path)}", code="disk.not_writable"
        )
    return UserError(f"{path}: {error.strerror or error}", code="disk.error")


def _elsewhere(path: Path) -> str:
    """What to do instead of writing there. The commands about a run that is there write into its folder and nowhere else."""
    run = next((folder for folder in (path, *path.parents) if os.path.isfile(folder / "run.json")), None)  # noqa: PTH113
    return "choose another output folder" if run is None else f"go on with a copy of {run} in another folder"


def _remove(path: str) -> None:
    if path:
        try:
            os.unlink(path)
        except OSError:
            pass


def names_in(folder: Path) -> list[str]:
    """The names in a folder, none if it is missing. Raises UserError if it cannot be read."""
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise disk_error(error, folder) from error
