"""Corrupts the checkpoints of a run between attempts: files are truncated, changed and deleted."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Literal

from chaos.observe import checkpoints

MANIFEST = "manifest.json"
Target = Literal["newest", "one", "all"]
TARGETS: tuple[Target, ...] = ("newest", "one", "all")


def damage_checkpoints(run: Path, target: Target, draws: random.Random) -> list[str]:
    """Corrupt the newest checkpoint, one of them, or every one. Returns what was done, one line per checkpoint."""
    folders = list(checkpoints(run).values())
    chosen = {"newest": folders[:1], "one": [draws.choice(folders)] if folders else [], "all": folders}[target]
    return [_damage_one(folder, draws) for folder in chosen]


def _damage_one(folder: Path, draws: random.Random) -> str:
    methods = [_cut, _flip, _delete, _garbage, _no_manifest, _nothing_left]
    how = draws.choice(methods) if _saved_files(folder) else _nothing_left
    return f"{folder.name}: {how(folder, draws)}"


def _cut(folder: Path, draws: random.Random) -> str:
    path = draws.choice(_saved_files(folder))
    size = draws.randrange(path.stat().st_size)
    with path.open("r+b") as file:
        file.truncate(size)
    return f"{path.name} cut to {size} bytes"


def _flip(folder: Path, draws: random.Random) -> str:
    path = draws.choice(_saved_files(folder))
    content = bytearray(path.read_bytes())
    place = draws.randrange(len(content))
    content[place] ^= 1 << draws.randrange(8)
    path.write_bytes(content)
    return f"{path.name} has another bit in byte {place}"


def _delete(folder: Path, draws: random.Random) -> str:
    path = draws.choice(_saved_files(folder))
    path.unlink()
    return f"{path.name} deleted"


def _garbage(folder: Path, draws: random.Random) -> str:
    content = draws.choice(["", "null", "[]", "{", '{"files": 3}', '{"files": {"../../x": {"bytes": -1}}}'])
    (folder / MANIFEST).write_text(content)
    return f"{MANIFEST} reads {content!r}"


def _no_manifest(folder: Path, draws: random.Random) -> str:
    (folder / MANIFEST).unlink(missing_ok=True)
    return f"{MANIFEST} deleted"


def _nothing_left(folder: Path, draws: random.Random) -> str:
    shutil.rmtree(folder)
    return "deleted"


def _saved_files(folder: Path) -> list[Path]:
    """All non-empty files except the manifest, in which a changed bit need not make a difference."""
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and path.stat().st_size and path.name != MANIFEST
    )
