"""Paths that must stay inside a folder: names read from files, and what is deleted.

A name that was read from a file becomes a path only through `within`, and nothing with a computed name is deleted except through
`remove_tree` and `remove_file`: neither leaves the folder, whatever the name, and neither follows a link.
"""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath

from finetune.errors import UserError


def is_relative_name(name: object) -> bool:
    """Whether a value is the plain relative path of a file below some folder: no `..`, not absolute, no control character."""
    if not isinstance(name, str) or not name or not name.isprintable() or "\\" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and str(path) == name and name != "."


def stays_inside(path: Path, folder: Path) -> bool:
    """Whether a path, links followed, is inside the folder; the folder itself is not."""
    return folder.resolve() in path.resolve().parents


def within(folder: Path, name: object) -> Path | None:
    """folder/name; None if `name` is not a relative path, or if a link on the way leads out of the folder."""
    path = folder / name if isinstance(name, str) and is_relative_name(name) else None
    return path if path is not None and stays_inside(path, folder) else None


def remove_tree(path: Path, *, inside: Path, ignore_errors: bool = False) -> None:
    """Delete a folder and everything in it; it need not exist. A link is deleted, not what it points to.

    Raises UserError if `path` is not inside the folder `inside`, and OSError, unless ignored, if it cannot be deleted.
    """
    check_inside(path, inside)
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.exists():
        shutil.rmtree(path, ignore_errors=ignore_errors)


def remove_file(path: Path, *, inside: Path) -> None:
    """Delete a file or a link; it need not exist. Raises like `remove_tree`."""
    check_inside(path, inside)
    path.unlink(missing_ok=True)


def check_inside(path: Path, inside: Path) -> None:
    """Raises UserError unless `path` is an entry below the folder `inside`; its last part is not followed if it is a link."""
    entry = path.parent.resolve() / path.name
    if path.name in ("", ".", "..") or inside.resolve() not in entry.parents:
        raise UserError(
            f"{path}: is not inside {inside}, so it is not deleted; look for a link or a changed file in that folder",
            code="file.outside",
        )
