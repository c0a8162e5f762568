"""Checkpoints that count only when they are whole: commit, verify, prune, newest valid.

A checkpoint folder `step-N` holds what the trainer saved, and a manifest with name, size and SHA-256 of every file. The
manifest is written last and deleted first, so a folder without one is the leftover of a save that was cut off.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.files import sha256_file, write_json

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that was passed over, and why."""

    folder: Path
    reason: str


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step}"


def commit(folder: Path, *, step: int, config_hash: str, data_hash: str) -> None:
    """Make a saved folder a checkpoint: write its manifest, the last file of all.

    config_hash, data_hash: hex SHA-256 of what decides the weights, in the config and as the data manifest.
    """
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"step": step, "config_hash": config_hash, "data_hash": data_hash, "files": files})


def fault(folder: Path) -> str | None:
    """What keeps a folder from being a checkpoint, None if it is one. Reads every file once."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = manifest["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if sha256_file(path) != expected["sha256"]:
                return f"{name} has changed since it was saved"
    except FileNotFoundError:
        return "no manifest: the save was cut off"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "the manifest is not readable"
    except OSError as error:
        return f"not readable ({error.strerror})"
    return None


def latest_valid(root: Path) -> tuple[Path | None, list[Skipped]]:
    """The newest checkpoint that verifies, and the newer ones that do not."""
    skipped: list[Skipped] = []
    for folder in newest_first(root):
        reason = fault(folder)
        if reason is None:
            return folder, skipped
        skipped.append(Skipped(folder, reason))
    return None, skipped


def read_manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def check_same_run(folder: Path, *, config_hash: str, data_hash: str) -> None:
    """Raises UserError when a checkpoint was made with other data or another config than the run that wants to resume."""
    manifest = read_manifest(folder)
    if manifest["data_hash"] != data_hash:
        raise UserError(f"{folder}: was trained on other data; prepare the same data again, or start a new run")
    if manifest["config_hash"] != config_hash:
        raise UserError(f"{folder}: was made under another config; restore config.yaml, or start a new run")


def newest_first(root: Path) -> Iterator[Path]:
    found = [(int(m[1]), path) for path in root.glob("step-*") if (m := _NAME.fullmatch(path.name)) and path.is_dir()]
    for _, path in sorted(found, reverse=True):
        yield path


def prune(root: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` committed checkpoints, each one's manifest first."""
    committed = [folder for folder in newest_first(root) if (folder / MANIFEST).is_file()]
    for folder in committed[keep_last:]:
        (folder / MANIFEST).unlink()
        shutil.rmtree(folder)


def put_aside(folder: Path) -> None:
    """Rename a checkpoint that does not verify to damaged-step-N, so that it neither counts nor stands where a later save
    of the same step has to go. What has no manifest stays: `remove_leftovers` deletes it."""
    if (folder / MANIFEST).is_file():
        aside = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


def remove_leftovers(root: Path) -> list[Path]:
    """Delete what saves that were cut off left behind: folders without a manifest, the trainer's temporary ones too."""
    leftovers = [
        p for p in [*root.glob("step-*"), *root.glob("checkpoint-*")] if p.is_dir() and not (p / MANIFEST).is_file()
    ]
    for folder in leftovers:
        shutil.rmtree(folder)
    return leftovers
