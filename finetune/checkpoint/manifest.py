"""The manifest that makes a folder a checkpoint: name, size and SHA-256 of every file, sealed with a SHA-256 of itself."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from finetune.checkpoint.filesystem import Disk

MANIFEST = "manifest.json"
_SEAL = "manifest_sha256"
_HASH = re.compile(r"[0-9a-f]{64}")
_NUMBERS = ("step", "number", "attempt")
_TEXTS = ("run_id", "config_hash", "data_hash", "saved_at")


class Unfit(Exception):
    """Why a folder is no checkpoint to go on from.

    damaged: bytes were read and are wrong. cut_off: it has no whole manifest, so it never was a checkpoint or is none any more.
    foreign: it is something that this run's store did not write.
    """

    def __init__(self, reason: str, *, damaged: bool = False, cut_off: bool = False, foreign: bool = False) -> None:
        super().__init__(reason)
        self.damaged, self.cut_off, self.foreign = damaged, cut_off, foreign


def manifest_text(facts: dict[str, Any]) -> str:
    return json.dumps({**facts, _SEAL: _seal_of(facts)}, indent=2) + "\n"


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of step-N, without its seal. Raises Unfit, and OSError when it cannot be read."""
    if folder.is_symlink() or folder.is_file():
        raise Unfit(f"is {'a link' if folder.is_symlink() else 'a file'}, not a folder", foreign=True)
    path = folder / MANIFEST
    if path.exists() and not path.is_file():
        raise Unfit(f"{MANIFEST} is not a file", damaged=True)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise Unfit("no manifest: the save was cut off", cut_off=True) from None
    if not content.rstrip().endswith(b"\n}"):  # only the last line of all is a brace without spaces before it
        raise Unfit("half a manifest: the save was cut off", cut_off=True)
    return _checked(folder, content)


def check_files(folder: Path, manifest: dict[str, Any], disk: Disk) -> None:
    """Compare every file with its entry, sizes first, for they cost nothing. Raises Unfit, and OSError for the unreadable."""
    files = manifest["files"]
    for name, expected in files.items():
        if not (folder / name).is_file():
            raise Unfit(f"{name} is missing", damaged=True)
        size = (folder / name).stat().st_size
        if size != expected["bytes"]:
            raise Unfit(f"{name} has {size} bytes instead of {expected['bytes']}", damaged=True)
    for name, expected in files.items():
        if disk.hash_file(folder / name) != (expected["bytes"], expected["sha256"]):
            raise Unfit(f"{name} has changed since it was saved", damaged=True)


def right_sizes(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether all files are there in the sizes of the manifest; reads none of them."""
    files = {folder / name: entry["bytes"] for name, entry in manifest["files"].items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in files.items())


def _checked(folder: Path, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
        seal = value.pop(_SEAL)
        right = seal == _seal_of(value)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Unfit("the manifest is not readable", damaged=True) from None
    if not right:
        raise Unfit("the manifest has changed since it was written", damaged=True)
    numbers = all(type(value.get(name)) is int and value[name] >= 0 for name in _NUMBERS)
    texts = all(isinstance(value.get(name), str) for name in _TEXTS)
    if not (numbers and texts and isinstance(value.get("files"), dict) and value["files"]):
        raise Unfit("the manifest lacks what a checkpoint's has to say", damaged=True)
    if f"step-{value['step']}" != folder.name:
        raise Unfit(f"the manifest is that of step {value['step']}", damaged=True)
    for name, entry in value["files"].items():
        _check_entry(name, entry)
    return dict(value)


def _check_entry(name: str, entry: Any) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or name in (".", MANIFEST) or "\0" in name:
        raise Unfit(f"the manifest names {name!r}, which is no file of the checkpoint", damaged=True)
    size, sha256 = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if type(size) is not int or size < 0 or not isinstance(sha256, str) or not _HASH.fullmatch(sha256):
        raise Unfit(f"the manifest has no size and SHA-256 for {name}", damaged=True)


def _seal_of(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
