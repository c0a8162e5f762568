"""Prepared data travel between machines through the bucket.

<bucket>/data/<set>-<id>         prepared sets; <id> begins the SHA-256 of manifest.json, so such a folder never changes
<bucket>/data/by-config/<key>    which of them was last used for a config whose data section has the hash <key>
~/.finetune/set-<id>             the key of the config for which an earlier job laid out the set with that id here
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune.config.load import to_dict
from finetune.config.schema import RunConfig
from finetune.errors import UserError
from finetune.job.programs import say
from finetune.prepared_folder import DATABASES, MANIFEST
from finetune.runtime.files import sha256_file, write_text

ID_LENGTH = 12
PART = ".part"


@dataclass(frozen=True)
class DataCache:
    """bucket: the folder `data` in it. state: what this machine remembers of its earlier jobs."""

    bucket: Path
    state: Path

    def lay_out(self, config: RunConfig, wanted: str, prepare: Callable[[], None]) -> None:
        """Lay the prepared set of a config on the local disk, and keep a copy in the bucket.

        wanted: SHA-256 of the manifest that an earlier attempt used, "" for a new run. Looked for in this order: what came with
        the working directory, the bucket, the sources. What an earlier job laid here for another config did not come with it.
        """
        folder, key, wanted = Path(config.data.output_dir), data_key(config), wanted[:ID_LENGTH]
        here = set_id(folder)
        if here and not wanted and _text(self._laid_for(here)) not in ("", key):
            here = ""
        if not here or (wanted and here != wanted):
            kept = wanted or _text(self.bucket / "by-config" / key)
            if kept and (self._kept(folder, kept) / MANIFEST).is_file():
                say(f"data: {self._kept(folder, kept)} -> {folder}")
                _remove_set(folder)
                copy_set(self._kept(folder, kept), folder)
                write_text(self._laid_for(kept), key)
                return
            if not here:
                _remove_set(folder)
            prepare()
            here = set_id(folder)
            if not here:
                raise UserError(
                    f"{folder}: holds no {MANIFEST}, though the data were prepared; see data.output_dir",
                    code="job.nothing_prepared",
                )
            write_text(self._laid_for(here), key)
        if not (self._kept(folder, here) / MANIFEST).is_file():
            say(f"data: {folder} -> {self._kept(folder, here)}")
            copy_set(folder, self._kept(folder, here))
        write_text(self.bucket / "by-config" / key, f"{here}\n")

    def _kept(self, folder: Path, identity: str) -> Path:
        return self.bucket / f"{folder.name}-{identity}"

    def _laid_for(self, identity: str) -> Path:
        return self.state / f"set-{identity}"


def data_key(config: RunConfig) -> str:
    """A hash of the config's data section."""
    section = to_dict(config)["data"]
    return hashlib.sha256(json.dumps(section, sort_keys=True).encode()).hexdigest()[:ID_LENGTH]


def set_id(folder: Path) -> str:
    """The id of the prepared set in a folder, "" where there is none."""
    manifest = folder / MANIFEST
    return sha256_file(manifest)[:ID_LENGTH] if manifest.is_file() else ""


def _remove_set(folder: Path) -> None:
    """What `copy_set` may have laid there, whole or cut off: `data prepare` refuses a folder with other files."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder / DATABASES, ignore_errors=True)
    for path in [*folder.glob("*.jsonl"), *folder.glob(f".*{PART}")]:
        path.unlink(missing_ok=True)


def copy_set(source: Path, target: Path) -> None:
    """The manifest last, so that half a copy does not count. A file takes its name when it is whole: another job may be copying
    the same set to the same place, or reading it there already."""
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
        part.unlink(missing_ok=True)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
