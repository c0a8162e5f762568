"""Reads a prepared folder, on this or another machine, after checking every file against the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from finetune.data.records import SPLITS, Record, Split, read_records
from finetune.errors import UserError, shown
from finetune.prepared_folder import DATABASES, MANIFEST, records_file
from finetune.runtime.confined import is_relative_name
from finetune.runtime.files import read_json, sha256_file
from finetune.runtime.paths import LONGEST_NAME
from finetune.runtime.typed_json import Mismatch, decode
from finetune.sql.engines.registry import engine_for

MANIFEST_FORMAT = 1
PREPARE_COMMAND = "finetune data prepare CONFIG"


@dataclass
class FileEntry:
    bytes: int
    sha256: str


@dataclass
class ManifestKeys:
    """The keys of the manifest that are read later. counts: records, by split among others."""

    prompt: str
    counts: Mapping[str, int]
    files: Mapping[str, FileEntry]


@dataclass(frozen=True)
class Prepared:
    """A prepared folder whose files match its manifest.

    manifest_hash: SHA-256 (hex) of manifest.json, which identifies all of the data. changed: whether `prepare` just wrote it.
    """

    folder: Path
    manifest: dict[str, Any]
    manifest_hash: str
    changed: bool = False

    def records(self, split: Split) -> list[Record]:
        return read_records(self.folder / records_file(split))

    def database(self, record: Record) -> Path | None:
        """The database file of a val or test record; None if its source had none or no engine runs its dialect."""
        name = database_name(record)
        return self.folder / name if name and name in self.manifest["files"] else None


def load_prepared(output_dir: Path, *, progress: bool = True) -> Prepared:
    """Load a folder that `prepare` wrote, on this or another machine, and check every file against the manifest.

    Raises UserError if the folder, its manifest or a file is missing, or if a file has changed.
    """
    prepared = read_manifest(output_dir)
    if fault := first_fault(output_dir, prepared.manifest, progress):
        raise UserError(f"{fault}; run `{PREPARE_COMMAND}` again", code="data.changed")
    return prepared


def database_name(record: Record) -> str | None:
    """The path of a record's database inside a prepared folder, which need not exist; None if no engine runs its dialect."""
    engine = engine_for(record.dialect)
    return f"{DATABASES}/{record.db_id}/{record.db_id}{engine.suffix}" if engine else None


def fingerprint(path: Path) -> dict[str, int | str]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def read_manifest(folder: Path, changed: bool = False) -> Prepared:
    path = folder / MANIFEST
    manifest = read_json(path, PREPARE_COMMAND)
    problem = "not of this version" if manifest.get("format") != MANIFEST_FORMAT else _problem(manifest)
    if problem:
        raise UserError(
            f"{path}: not a manifest of prepared data: {problem}; run `{PREPARE_COMMAND}` again",
            code="data.bad_manifest",
        )
    return Prepared(folder, manifest, sha256_file(path), changed)


def manifest_if_same(folder: str | None, sha256: str | None) -> dict[str, Any] | None:
    """The manifest of a prepared folder; None where that is not here, or is another one by now."""
    if not folder:
        return None
    try:
        prepared = read_manifest(Path(folder))
    except (UserError, OSError):
        return None
    return prepared.manifest if prepared.manifest_hash == sha256 else None


def trained_databases(manifest: Mapping[str, Any] | None) -> frozenset[str] | None:
    """The databases of the training examples; None if it does not say."""
    records = (manifest or {}).get("records_per_database")
    counts = records.get("train") if isinstance(records, Mapping) else None
    return frozenset(str(name) for name, count in counts.items() if count) if isinstance(counts, Mapping) else None


def _problem(manifest: dict[str, Any]) -> str | None:
    """What is wrong with the keys that are read later; None if nothing is."""
    try:
        keys = decode(ManifestKeys, manifest)
    except Mismatch as mismatch:
        return str(mismatch)
    for split in SPLITS:
        if keys.counts.get(split, -1) < 0:
            return f"counts: lacks the count {split}"
    for name in keys.files:
        if not is_relative_name(name) or max(map(len, PurePosixPath(name).parts)) > LONGEST_NAME:
            return f"files: {shown(name)} is not a file of this folder"
    return None


def first_fault(folder: Path, manifest: dict[str, Any], progress: bool) -> str | None:
    """What is wrong with the first file that does not match the manifest; None if all match."""
    for name, expected in tqdm(manifest["files"].items(), desc="Verifying data", delay=1, disable=not progress):
        path = folder / name
        if not path.is_file():
            return f"{path}: missing, though {MANIFEST} lists it"
        if fingerprint(path) != expected:
            return f"{path}: changed since it was prepared (its SHA-256 differs from {MANIFEST})"
    return None
