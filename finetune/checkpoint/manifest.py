"""The manifest that makes a folder a checkpoint: name, size and SHA-256 of every file, sealed with a SHA-256 of itself."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune.checkpoint.filesystem import Disk
from finetune.runtime.confined import is_relative_name, stays_inside
from finetune.runtime.files import parse_json, read_bytes

MANIFEST = "manifest.json"
_SEAL = "manifest_sha256"
_HASH = re.compile(r"[0-9a-f]{64}")
_NUMBERS = ("step", "number", "attempt")
_TEXTS = ("run_id", "config_hash", "data_hash", "saved_at")


class InvalidCheckpoint(Exception):
    """Why a run cannot resume from a folder.

    corrupt: its content was read and is wrong. incomplete: it has no complete manifest, because a save or a deletion was
    interrupted. wrong_run: it was not written by this run's store.
    """

    def __init__(
        self, reason: str, *, corrupt: bool = False, incomplete: bool = False, wrong_run: bool = False
    ) -> None:
        super().__init__(reason)
        self.corrupt, self.incomplete, self.wrong_run = corrupt, incomplete, wrong_run


def manifest_text(facts: dict[str, Any]) -> str:
    return json.dumps({**facts, _SEAL: seal_of(facts)}, indent=2) + "\n"


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a folder step-N, without its seal. Raises InvalidCheckpoint, and OSError when it cannot be read."""
    if folder.is_symlink() or folder.is_file():
        raise InvalidCheckpoint(f"is {'a link' if folder.is_symlink() else 'a file'}, not a folder", wrong_run=True)
    path = folder / MANIFEST
    if path.exists() and not path.is_file():
        raise InvalidCheckpoint(f"{MANIFEST} is not a file", corrupt=True)
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        raise InvalidCheckpoint("no manifest: the save was cut off", incomplete=True) from None
    if not content.rstrip().endswith(b"\n}"):  # only the very last line is an unindented brace
        raise InvalidCheckpoint("half a manifest: the save was cut off", incomplete=True)
    return _checked(folder, content)


def check_names(manifest: dict[str, Any], required: Iterable[str]) -> None:
    """Raises InvalidCheckpoint if the manifest does not list all required files."""
    if missing := [name for name in required if name not in manifest["files"]]:
        raise InvalidCheckpoint(f"the manifest lists no {', '.join(missing)}: not a whole save", corrupt=True)


def check_files(folder: Path, manifest: dict[str, Any], disk: Disk) -> None:
    """Compare every file with the manifest: all sizes first, which is cheap, then the hashes. Raises InvalidCheckpoint, and
    OSError for a file that cannot be read."""
    files = manifest["files"]
    for name, expected in files.items():
        if not stays_inside(folder / name, folder):
            raise InvalidCheckpoint(f"{name} is a link that leads out of the checkpoint", corrupt=True)
        if not (folder / name).is_file():
            raise InvalidCheckpoint(f"{name} is missing", corrupt=True)
        size = (folder / name).stat().st_size
        if size != expected["bytes"]:
            raise InvalidCheckpoint(f"{name} has {size} bytes instead of {expected['bytes']}", corrupt=True)
    for name, expected in files.items():
        if disk.hash_file(folder / name) != (expected["bytes"], expected["sha256"]):
            raise InvalidCheckpoint(f"{name} has changed since it was saved", corrupt=True)


def right_sizes(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether all files exist with the sizes of the manifest; does not read them."""
    files = {folder / name: entry["bytes"] for name, entry in manifest["files"].items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in files.items())


def _checked(folder: Path, content: bytes) -> dict[str, Any]:
    try:
        value = parse_json(content)
        seal = value.pop(_SEAL)
        right = seal == seal_of(value)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InvalidCheckpoint("the manifest is not readable", corrupt=True) from None
    if not right:
        raise InvalidCheckpoint("the manifest has changed since it was written", corrupt=True)
    numbers = all(type(value.get(name)) is int and value[name] >= 0 for name in _NUMBERS)
    texts = all(isinstance(value.get(name), str) for name in _TEXTS)
    if not (numbers and texts and isinstance(value.get("files"), dict) and value["files"]):
        raise InvalidCheckpoint("the manifest lacks required fields", corrupt=True)
    if type(value.get("lease", 0)) is not int or value.get("lease", 0) < 0:
        raise InvalidCheckpoint("the manifest has no number of a lease", corrupt=True)
    if f"step-{value['step']}" != folder.name:
        raise InvalidCheckpoint(f"the manifest is for step {value['step']}", corrupt=True)
    for name, entry in value["files"].items():
        _check_entry(name, entry)
    return dict(value)


def _check_entry(name: str, entry: Any) -> None:
    if not is_relative_name(name) or name == MANIFEST:
        raise InvalidCheckpoint(f"the manifest names {name!r}, which is not a file of the checkpoint", corrupt=True)
    size, sha256 = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if type(size) is not int or size < 0 or not isinstance(sha256, str) or not _HASH.fullmatch(sha256):
        raise InvalidCheckpoint(f"the manifest has no size and SHA-256 for {name}", corrupt=True)


def seal_of(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
