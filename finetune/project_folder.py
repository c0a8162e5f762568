"""A project that `finetune init` wrote: which of its files are still as they were written, and the machine's side of it.

PROJECT/.finetune-init.json     the files that init wrote, with their SHA-256, and what it was asked for
PROJECT/on_machine/             scripts, pinned versions and a wheel of the program, for the cloud machine: copies of what is
                                installed here, which a launch renews after an upgrade
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.runtime.confined import is_relative_name, remove_file
from finetune.runtime.files import disk_error, load_json, sha256_file, write_json
from finetune.runtime.installed import files_below, project_files, version
from finetune.runtime.own_wheel import PREFIX, is_own_wheel, own_wheel

MARKER = ".finetune-init.json"
MACHINE_SIDE = "on_machine"
PAIRS = "data/pairs.jsonl"
"""What init makes of a file of pairs."""


@dataclass
class ProjectFolder:
    """files: SHA-256 of each file as init wrote it, by its name in the folder. asked: what init was asked for. replaced: while
    files are being replaced, and after a kill in the middle of that, what they were before; they are ours as well."""

    path: Path
    files: dict[str, str] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)

    def write_marker(self) -> None:
        content: dict[str, Any] = {"version": version(), "files": self.files, "asked": self.asked}
        write_json(self.path / MARKER, content | ({"replaced": self.replaced} if self.replaced else {}))

    def is_changed(self, name: str) -> bool:
        """Whether a file is there and is not as init wrote it, so that it belongs to the user."""
        path = self.path / name
        ours = (self.files.get(name), self.replaced.get(name))
        return path.is_symlink() or (path.exists() and sha256_of(path) not in ours)


def read_project(path: Path) -> ProjectFolder | None:
    """None for a folder that init did not write. Raises UserError for a marker that is damaged."""
    try:
        content = load_json(path / MARKER)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path / MARKER}: not readable ({error}); remove it, or choose another folder", code="init.bad_marker"
        ) from None
    try:
        files, asked, replaced = content["files"], content["asked"], content.get("replaced", {})
        if not all(isinstance(text, str) for item in (*files.items(), *replaced.items()) for text in item):
            raise TypeError("files")
        if not all(map(is_relative_name, files)):
            raise ValueError("a name that leads out of the folder")
        return ProjectFolder(path, dict(files), dict(asked), dict(replaced))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path / MARKER}: not what `finetune init` writes ({error!r:.80}); remove it, or choose another folder",
            code="init.bad_marker",
        ) from None


def sha256_of(path: Path) -> str:
    """Of a file; "" for anything else."""
    try:
        return sha256_file(path) if path.is_file() else ""
    except OSError:
        return ""


def machine_side() -> dict[str, bytes]:
    """Everything that a cloud machine needs of this program, by its name in a project."""
    root = project_files()
    folder = root / MACHINE_SIDE
    found = {f"{MACHINE_SIDE}/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in files_below(folder)}
    found[f"{MACHINE_SIDE}/constraints.txt"] = (root / "constraints.txt").read_bytes()
    name, content = own_wheel()
    return found | {f"{MACHINE_SIDE}/{name}": content}


def stale_files(project: ProjectFolder, side: Mapping[str, bytes] | None = None) -> list[str]:
    """The files of the machine's side that are not those of the program as installed here, without those that the user has
    changed; and those that it no longer has. side: `machine_side()`, where the caller has it."""
    now = {name: hashlib.sha256(content).hexdigest() for name, content in (side or machine_side()).items()}
    found = []
    for name, digest in now.items():
        path = project.path / name
        if name.endswith(".whl") and path.is_file() and is_own_wheel(path):
            continue  # the same files, packed by another version of zlib
        if sha256_of(path) != digest and not project.is_changed(name):
            found.append(name)
    return found + _left_over(project, now)


def _left_over(project: ProjectFolder, now: Iterable[str]) -> list[str]:
    ours = [name for name in project.files if name.startswith(f"{MACHINE_SIDE}/") and name not in set(now)]
    return [name for name in ours if (project.path / name).is_file() and not project.is_changed(name)]


def renew_machine_side(project: ProjectFolder) -> list[str]:
    """Writes what is stale anew; returns the names. Raises UserError if the disk is full, or the folder cannot be written."""
    now = machine_side()
    stale = stale_files(project, now)
    if not stale:
        return []
    project.replaced |= {name: project.files[name] for name in stale if name in project.files}
    project.files |= {name: hashlib.sha256(now[name]).hexdigest() for name in stale if name in now}
    project.write_marker()
    for name in stale:
        path = project.path / name
        if name in now:
            write_bytes(path, now[name])
        else:
            remove_file(path, inside=project.path)
            project.files.pop(name, None)
    project.replaced = {}
    project.write_marker()
    return stale


def wheels_in(folder: Path) -> list[Path]:
    return sorted((folder / MACHINE_SIDE).glob(f"{PREFIX}*.whl"))


def write_bytes(path: Path, content: bytes) -> None:
    """As `files.atomic_file`, for bytes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise disk_error(error, path) from error
