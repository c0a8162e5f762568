"""Manifests in the bucket: written last, so that nothing is ever half there; and what each module of this folder needs.

All of this folder is for the system's Python, 3.9 or newer, before anything is installed: it imports the standard library only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

HOME = Path.home()
STATE = HOME / ".finetune"
MANIFEST = "manifest.json"
CHUNK = 1 << 22
STREAMS = 16
"""So many reads of the bucket at a time: one alone is slower than a machine's network."""
DAY_SECONDS = 86400.0
NOT_THERE, DAMAGED = 1, 3
Json = dict[str, Any]


class Damaged(Exception):
    """What is in the bucket cannot be used; the message says why."""


def say(message: str) -> None:
    print(f"set-up: {message}", file=sys.stderr, flush=True)


def note(fact: str, value: object) -> None:
    """Into the log of set-up (finetune/machine/set_up.py)."""
    log = STATE / "set-up.log"
    if log.is_file():
        with log.open("a", encoding="utf-8") as file:
            file.write(f"= {fact} {value}\n")


def read_manifest(folder: Path) -> Json | None:
    """None if there is none. Raises Damaged."""
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not all(is_inside(name) for name in [found["folder"], *(row["name"] for row in found["files"])]):
            raise ValueError("a name that leads out of its folder")
        return dict(found)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path}: {error!r}") from error


def is_inside(name: str) -> bool:
    """Whether a relative path stays inside its folder."""
    return bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts


def pinned(package: str) -> str | None:
    """The version of a package that set-up installs, by on_machine/package.sh's file."""
    own = Path("on_machine") / "constraints.txt"
    text = (own if own.is_file() else Path("constraints.txt")).read_text(encoding="utf-8")
    found = re.search(rf"^{package}==(\S+)", text.replace("_", "-"), re.MULTILINE)
    return found[1] if found else None


def write_manifest(folder: Path, manifest: Json) -> None:
    """Written in the folder of its writer first: two that write one file at a time would leave a mixture of both on a disk that
    is no bucket."""
    text = json.dumps({**manifest, "made": time.time()}, indent=1)
    written = folder / manifest["folder"] / f"{MANIFEST}.part"
    written.write_text(f"{text}\n", encoding="utf-8")
    written.replace(folder / MANIFEST)


def new_folder(folder: Path) -> Path:
    """Of this writer alone: two machines may keep the same thing at once, and the manifest of the second one counts."""
    made = folder / os.urandom(6).hex()
    made.mkdir(parents=True)
    return made


def prune(folder: Path, kept: int) -> None:
    """Deletes all but the newest whole entries of a folder of the bucket, and what a killed writer left more than a day ago."""
    whole: dict[Path, float] = {}
    for place in folder.iterdir():
        with suppress(FileNotFoundError):  # another machine deletes the same thing
            _prune_entry(place, whole)
    for place in sorted(whole, key=lambda one: whole[one])[:-kept]:
        shutil.rmtree(place, ignore_errors=True)


def _prune_entry(place: Path, whole: dict[Path, float]) -> None:
    """Adds it to `whole` with the time when it was made, if it has a manifest."""
    try:
        manifest = read_manifest(place)
    except Damaged:
        manifest = None
    if manifest is None:
        _remove_abandoned(place)
        return
    whole[place] = float(manifest["made"])
    for other in place.iterdir():
        if other.name not in (MANIFEST, manifest["folder"]):
            _remove_abandoned(other)


def _remove_abandoned(folder: Path) -> None:
    """Not an empty one: another machine may be about to write its first file."""
    times = [path.stat().st_mtime for path in folder.rglob("*") if path.is_file()]
    if times and max(times) < time.time() - DAY_SECONDS:
        shutil.rmtree(folder, ignore_errors=True)
