"""Shares prepared data sets between machines through the bucket.

<bucket>/data/<set>-<id>         prepared sets; <id> is the start of the SHA-256 of manifest.json, so a folder never changes
<bucket>/data/by-config/<key>    the id of the set last used for a config whose data section has the hash <key>
~/.finetune/set-<id>             the key of the config for which an earlier job put the set <id> on this machine
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune.config.load import data_key
from finetune.config.schema import RunConfig
from finetune.errors import UserError
from finetune.job.programs import say
from finetune.prepared_folder import DATABASES, MANIFEST, REJECTED, SOURCES, records_file
from finetune.prepared_from import changed_sources, differences
from finetune.runtime.confined import remove_file, remove_tree
from finetune.runtime.files import load_json, sha256_file, write_text

ID_LENGTH = 12
PART = ".part"
SPLITS = ("train", "val", "test")
_ID = re.compile(rf"[0-9a-f]{{{ID_LENGTH}}}")


@dataclass(frozen=True)
class DataCache:
    """bucket: the folder `data` in the bucket. state: a local folder for the state of earlier jobs on this machine."""

    bucket: Path
    state: Path

    def lay_out(self, config: RunConfig, required: str, prepare: Callable[[], None]) -> None:
        """Put the prepared set of a config on the local disk, and a copy into the bucket.

        required: SHA-256 of the manifest that an earlier attempt used, "" for a new run. The set is searched in this order: the
        working directory as uploaded, the bucket, the sources. A set that an earlier job put here for another config is ignored,
        and, for a new run, one whose manifest names other settings than the config.
        """
        folder, key = Path(config.data.output_dir), data_key(config)
        required = _checked_id(required[:ID_LENGTH], "the run's manifest_sha256") if required else ""
        here = set_id(folder)
        if here and not required and _text(self._key_file(here)) not in ("", key):
            here = ""
        if here and not required and not _fits(folder, config):
            here = ""
        if not here or (required and here != required):
            cached = required or self._last_used(key)
            if cached and not required and not _fits(self._in_bucket(folder, cached), config):
                cached = ""
            if cached and (self._in_bucket(folder, cached) / MANIFEST).is_file():
                say(f"data: {self._in_bucket(folder, cached)} -> {folder}")
                _remove_set(folder)
                copy_set(self._in_bucket(folder, cached), folder)
                write_text(self._key_file(cached), key)
                return
            if not here:
                _remove_set(folder)
            prepare()
            here = set_id(folder)
            if not here:
                raise UserError(
                    f"{folder}: holds no {MANIFEST} after preparing the data; check data.output_dir",
                    code="job.nothing_prepared",
                )
            write_text(self._key_file(here), key)
        if not (self._in_bucket(folder, here) / MANIFEST).is_file():
            say(f"data: {folder} -> {self._in_bucket(folder, here)}")
            copy_set(folder, self._in_bucket(folder, here))
        write_text(self.bucket / "by-config" / key, f"{here}\n")

    def _last_used(self, key: str) -> str:
        """The id of the set last used for this data section, "" if there is none."""
        file = self.bucket / "by-config" / key
        return _checked_id(text, str(file)) if (text := _text(file)) else ""

    def _in_bucket(self, folder: Path, identity: str) -> Path:
        return self.bucket / f"{folder.name}-{identity}"

    def _key_file(self, identity: str) -> Path:
        return self.state / f"set-{identity}"


def _checked_id(text: str, source: str) -> str:
    """An id that was read from a file, which becomes part of a path. Raises UserError unless it is one."""
    if not _ID.fullmatch(text):
        raise UserError(
            f"{source}: expected the id of a prepared set, {ID_LENGTH} hexadecimal digits, found {text[:40]!r}; delete or "
            "restore the file",
            code="job.bad_set_id",
        )
    return text


def _fits(folder: Path, config: RunConfig) -> bool:
    """Whether the set in a folder is one that the config describes; says where it is not."""
    try:
        found = differences(config.data, load_json(folder / MANIFEST))
        changed = changed_sources(folder)
    except (OSError, ValueError, AttributeError):
        return True  # not there, or not readable: whoever uses it says so
    if found:
        say(f"data: {folder} is not used: prepared with {'; with '.join(found)}")
    elif changed:
        say(f"data: {folder} is not used: prepared before {', '.join(changed)} changed")
    return not (found or changed)


def set_id(folder: Path) -> str:
    """The id of the prepared set in a folder, "" if there is none."""
    manifest = folder / MANIFEST
    return sha256_file(manifest)[:ID_LENGTH] if manifest.is_file() else ""


def _remove_set(folder: Path) -> None:
    """Remove what `copy_set` may have written, complete or partial: `data prepare` refuses a folder with other files."""
    remove_file(folder / MANIFEST, inside=folder)
    remove_tree(folder / DATABASES, inside=folder, ignore_errors=True)
    own = [
        folder / name for name in (*map(records_file, SPLITS), REJECTED, SOURCES)
    ]  # not every *.jsonl: some may be the user's
    for path in [*own, *folder.glob(f".*{PART}")]:
        remove_file(path, inside=folder)


def copy_set(source: Path, target: Path) -> None:
    """Copies the manifest last, so that a partial copy is not valid. A file gets its name when it is complete: another job may be
    copying the same set to the same place, or already reading it there."""
    for path in sorted(source.rglob("*")):
        if path.is_dir() or path.name.endswith(PART) or path == source / MANIFEST:
            continue
        _copy(path, target / path.relative_to(source))
    _copy(source / MANIFEST, target / MANIFEST)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.urandom(4).hex()}{PART}")
    try:
        shutil.copyfile(source, part)
        os.replace(part, target)
    finally:
        remove_file(part, inside=target.parent)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
