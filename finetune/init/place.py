"""Puts a project where it belongs: nothing appears half-written, and no file of the user is overwritten."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import UserError
from finetune.project_folder import ProjectFolder, read_project, sha256_of
from finetune.runtime.confined import remove_tree
from finetune.runtime.files import disk_error, kind_of

PART = ".init-part"
HARMLESS = {".git", ".venv", ".DS_Store"}
SIDECARS = ("", "-wal", "-shm", "-journal")
SHOWN = 3


def usable_folder(folder: Path, given: Collection[Path]) -> ProjectFolder | None:
    """The project that is there already, None for a new one. given: files that the user may have put there beforehand.

    Raises UserError for a file, and for a folder with other files of the user.
    """
    kind = kind_of(folder)
    if kind == "nothing":
        return None
    if kind != "a folder":
        raise UserError(f"{folder}: {kind}; expected the name of a new folder", code="init.no_folder")
    project = read_project(folder)
    if project is not None:
        return project
    known = {path.resolve() for one in given for path in (one.with_name(one.name + end) for end in SIDECARS)}
    try:
        found = sorted(path for path in folder.iterdir() if path.name not in HARMLESS and not _is_part(path))
    except OSError as error:
        raise disk_error(error, folder) from error
    others = [path for path in found if path.resolve() not in known and not _holds_only(path, known)]
    if others:
        names = ", ".join(path.name for path in others[:SHOWN]) + (
            f" and {len(others) - SHOWN} more" if others[SHOWN:] else ""
        )
        raise UserError(
            f"{folder}: holds files of yours ({names}), and a project needs a folder of its own; name a new one",
            code="init.folder_in_use",
        )
    return None


def _holds_only(path: Path, known: Collection[Path]) -> bool:
    """Whether a folder holds files that were given, and nothing else."""
    if path.is_symlink() or not path.is_dir():
        return False
    inside = [file for file in path.rglob("*") if not file.is_dir()]
    return bool(inside) and all(file.resolve() in known for file in inside)


def checkout_around(folder: Path) -> Path | None:
    """The git checkout that a new project would lie in, without being the checkout itself."""
    place = folder.resolve()
    if (place / ".git").exists():
        return None
    return next((parent for parent in place.parents if (parent / ".git").exists()), None)


@contextmanager
def part_folder(folder: Path) -> Iterator[Path]:
    """A folder to write a project in before it takes its place; it is gone at the end, whatever happens. What an init that was
    killed has left is removed first. Raises UserError if nothing can be written there."""
    parent = folder if folder.is_dir() else folder.parent
    part = parent / f".{folder.resolve().name}.{os.getpid()}{PART}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.iterdir():
            if _is_part(left) and not _is_alive(left):
                remove_tree(left, inside=parent)
        part.mkdir()
    except OSError as error:
        raise disk_error(error, part.parent) from error
    try:
        yield part
    except OSError as error:
        raise disk_error(error, Path(os.fsdecode(error.filename)) if error.filename else part) from error
    finally:
        if part.exists():
            remove_tree(part, inside=parent, ignore_errors=True)


def place(part: Path, folder: Path, before: ProjectFolder | None, asked: dict[str, object]) -> list[str]:
    """Move everything from the part into the folder. Returns the names of files that the user has changed: they stay.

    A new folder appears whole. In one that is there already the marker is written first, so that an interrupted init is gone on
    with by the same command.
    """
    names = sorted(
        path.relative_to(part).as_posix() for path in part.rglob("*") if path.is_symlink() or not path.is_dir()
    )
    digests = {name: sha256_of(part / name) for name in names if not (part / name).is_symlink()}
    project = ProjectFolder(part, digests, asked)
    if not folder.exists():
        project.write_marker()
        part.rename(folder)
        return []
    kept = [name for name in names if before is not None and before.is_changed(name)]
    if before is None:
        if there := [name for name in names if os.path.lexists(folder / name)]:
            raise UserError(
                f"{folder / there[0]}: is there already, and no file of yours is overwritten; name a new folder",
                code="init.folder_in_use",
            )
    else:
        project.files = before.files | {name: digest for name, digest in digests.items() if name not in kept}
        project.replaced = {name: sha256_of(folder / name) for name in names if name not in kept}
    project.path = folder
    project.write_marker()
    for name in names:
        target = folder / name
        if name in kept:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        (part / name).replace(target)
    if project.replaced:
        project.replaced = {}
        project.write_marker()
    return [name for name in kept if _differs(part / name, folder / name)]


def _differs(new: Path, there: Path) -> bool:
    if new.is_symlink() or there.is_symlink():
        return not (new.is_symlink() and there.is_symlink() and new.readlink() == there.readlink())
    return sha256_of(new) != sha256_of(there)


def _is_part(path: Path) -> bool:
    return path.name.endswith(PART) and path.is_dir() and not path.is_symlink()


def _is_alive(part: Path) -> bool:
    found = re.search(r"\.(\d+)" + re.escape(PART), part.name)
    try:
        os.kill(int(found[1]) if found else os.getpid(), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def write_file(part: Path, name: str, content: bytes | str) -> None:
    """Raises OSError."""
    path = part / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
