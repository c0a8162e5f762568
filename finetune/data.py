"""Data preparation: sources in, a self-contained folder of checked and split records out.

    train.jsonl  val.jsonl  test.jsonl     records, each with its split
    rejected.jsonl                         file, line, reason, detail and the raw record of what was left out
    databases/<db_id>/<db_id>.sqlite       copies of the databases that val and test are evaluated on
    manifest.json                          counts, token lengths, settings, SHA-256 of every other file; written last

The same inputs give the same bytes. The folder appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.config.schema import RunConfig, SourceSection
from finetune.data_check import GOLD_TIMEOUT_SECONDS, Findings, check
from finetune.data_split import SplitBy
from finetune.data_stats import per_database, skeleton_overlap, token_counts, token_summary
from finetune.errors import UserError
from finetune.prompts import PromptTemplate
from finetune.records import SPLITS, Record, Split, read_records, write_records
from finetune.runtime.files import disk_error, read_json, sha256_file, write_json, write_text

MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"
DATABASES = "databases"
MANIFEST_FORMAT = 1
PREPARE_COMMAND = "finetune data prepare CONFIG"


@dataclass(frozen=True)
class Prepared:
    """A prepared folder whose files match their manifest; `changed` says whether `prepare` just wrote it.

    manifest_hash: SHA-256 (hex) of manifest.json, which stands for all of the data.
    """

    folder: Path
    manifest: dict[str, Any]
    manifest_hash: str
    changed: bool = False

    def records(self, split: Split) -> list[Record]:
        return read_records(self.folder / f"{split}.jsonl")

    def database(self, record: Record) -> Path | None:
        """The SQLite file of a val or test record's database, None when its source had none."""
        name = _database_name(record.db_id)
        return self.folder / name if name in self.manifest["files"] else None


def prepare(
    sources: Sequence[SourceSection],
    output_dir: Path,
    *,
    template: PromptTemplate,
    max_seq_length: int,
    val_fraction: float,
    test_fraction: float,
    split_by: SplitBy,
    seed: int,
    max_train_records: int | None = None,
    tokenizer: Any = None,
    tokenizer_name: str | None = None,
    timeout_seconds: float = GOLD_TIMEOUT_SECONDS,
    progress: bool = True,
) -> Prepared:
    """Check all sources and write the prepared folder; an older prepared set there is replaced.

    split_by: what is kept together in one split, records that share a question or gold SQL, or whole databases.
    max_seq_length (tokens): longer records are written and counted; training leaves them out.
    max_train_records: a seeded sample of train. tokenizer: None leaves the token counts unknown (null).
    timeout_seconds: for each gold query.

    Raises UserError, before anything is written, when a source is unusable, a split ends up empty, or output_dir holds
    something else than a prepared set.
    """
    folder = Path(os.path.realpath(output_dir))
    _check_replaceable(folder, output_dir)
    findings = check(
        sources,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        split_by=split_by,
        seed=seed,
        max_train_records=max_train_records,
        timeout_seconds=timeout_seconds,
        progress=progress,
    )
    if findings.problems:
        raise UserError("; ".join(findings.problems))
    manifest = {
        "format": MANIFEST_FORMAT,
        **_counts(findings),
        "tokens": _tokens(findings, template, tokenizer, max_seq_length, progress),
        "settings": {
            "seed": seed,
            "split_by": split_by,
            "val_fraction": val_fraction,
            "test_fraction": test_fraction,
            "max_train_records": max_train_records,
            "max_seq_length": max_seq_length,
        },
        "prompt": template.identity(),
        "tokenizer": tokenizer_name if tokenizer is not None else None,
        "sources": [asdict(section) | asdict(count) for section, count in zip(sources, findings.sources, strict=True)],
    }
    try:
        changed = _write(folder, findings, manifest, progress)
    except OSError as error:
        raise disk_error(error, output_dir) from error
    return _read_manifest(output_dir, changed=changed)


def prepare_data(config: RunConfig, tokenizer: Any = None) -> Prepared:
    """`prepare` with what the config says. tokenizer: as there."""
    data = config.data
    return prepare(
        data.sources,
        Path(data.output_dir),
        template=PromptTemplate(data.schema_format),
        max_seq_length=config.model.max_seq_length,
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        split_by=data.split_by,
        seed=data.seed,
        max_train_records=data.max_train_records,
        tokenizer=tokenizer,
        tokenizer_name=config.model.name,
        timeout_seconds=config.evaluation.timeout_seconds,
    )


def load_prepared(output_dir: Path, *, progress: bool = True) -> Prepared:
    """A folder that `prepare` wrote, here or on another machine, after checking every file against the manifest.

    Raises UserError when the folder, its manifest or a file is missing, or a file has changed.
    """
    prepared = _read_manifest(output_dir)
    if fault := _first_fault(output_dir, prepared.manifest, progress):
        raise UserError(f"{fault}; run `{PREPARE_COMMAND}` again")
    return prepared


def _counts(findings: Findings) -> dict[str, Any]:
    records = {split: findings.records(split) for split in SPLITS}
    return {
        "counts": {
            "read": sum(source.read for source in findings.sources),
            **{split: len(records[split]) for split in SPLITS},
            "rejected": len(findings.rejections),
            "left_out_by_max_train_records": findings.left_out,
        },
        "rejected": dict(sorted(Counter(rejection.reason for rejection in findings.rejections).items())),
        "records_per_database": {split: per_database(records[split]) for split in SPLITS},
        "without_database": {split: sum(item.database is None for item in findings.splits[split]) for split in SPLITS},
        "skeleton_overlap": {split: skeleton_overlap(records["train"], records[split]) for split in ("val", "test")},
    }


def _tokens(
    findings: Findings,
    template: PromptTemplate,
    tokenizer: Any,
    max_seq_length: int,
    progress: bool,
) -> dict[str, Any] | None:
    if tokenizer is None:
        return None
    return {
        split: token_summary(
            token_counts(
                findings.records(split),
                template,
                tokenizer,
                desc=f"Counting tokens of {split}",
                progress=progress,
            ),
            max_seq_length,
        )
        for split in SPLITS
    }


def _write(folder: Path, findings: Findings, manifest: dict[str, Any], progress: bool) -> bool:
    """Build the set in a scratch folder and swap it in; False when the same set is there already."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        for split in SPLITS:
            write_records(new / f"{split}.jsonl", findings.records(split))
        write_text(new / REJECTED, "".join(_json_line(item.row()) for item in findings.rejections))
        _copy_databases(findings, new, progress)
        manifest["files"] = {str(path.relative_to(new)): _fingerprint(path) for path in _files(new)}
        write_json(new / MANIFEST, manifest)
        if _same(new, folder, progress):
            return False
        _swap_in(new, folder, Path(scratch) / "old")
    return True


def _json_line(value: Any) -> str:
    """Escaped, because what was rejected may hold characters that are no Unicode text."""
    return json.dumps(value, default=str) + "\n"


def _copy_databases(findings: Findings, folder: Path, progress: bool) -> None:
    held_out = [*findings.splits["val"], *findings.splits["test"]]
    databases = {item.record.db_id: item.database for item in held_out if item.database}
    for db_id, source in tqdm(sorted(databases.items()), desc="Copying databases", delay=1, disable=not progress):
        target = folder / _database_name(db_id)
        target.parent.mkdir(parents=True)
        shutil.copyfile(source, target)


def _database_name(db_id: str) -> str:
    return f"{DATABASES}/{db_id}/{db_id}.sqlite"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fingerprint(path: Path) -> dict[str, int | str]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _same(new: Path, folder: Path, progress: bool) -> bool:
    old = folder / MANIFEST
    if not old.is_file() or old.read_bytes() != (new / MANIFEST).read_bytes():
        return False
    return _first_fault(folder, json.loads(old.read_text(encoding="utf-8")), progress) is None


def _swap_in(new: Path, folder: Path, old: Path) -> None:
    new.chmod(0o755)
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(new, folder)
    except BaseException:
        if old.exists():
            os.rename(old, folder)
        raise


def _check_replaceable(folder: Path, name: Path) -> None:
    """Refuse to replace a folder that `prepare` did not write."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{name}: data.output_dir is a file; choose a folder")
    ours = {MANIFEST, REJECTED, DATABASES, *(f"{split}.jsonl" for split in SPLITS)}
    present = {path.name for path in folder.iterdir()}
    strangers = sorted(present if MANIFEST not in present else present - ours)
    if strangers:
        raise UserError(
            f"{name}: data.output_dir holds other things than a prepared set ({strangers[0]}); choose another folder"
        )


def _read_manifest(folder: Path, changed: bool = False) -> Prepared:
    path = folder / MANIFEST
    manifest = read_json(path, PREPARE_COMMAND)
    if manifest.get("format") != MANIFEST_FORMAT or not isinstance(manifest.get("files"), dict):
        raise UserError(f"{path}: not a manifest of this version; run `{PREPARE_COMMAND}` again")
    return Prepared(folder, manifest, sha256_file(path), changed)


def _first_fault(folder: Path, manifest: dict[str, Any], progress: bool) -> str | None:
    """The first file that is not as the manifest says, None when all are."""
    for name, expected in tqdm(manifest["files"].items(), desc="Verifying data", delay=1, disable=not progress):
        path = folder / name
        if not path.is_file():
            return f"{path}: missing, though {MANIFEST} lists it"
        if _fingerprint(path) != expected:
            return f"{path}: changed since it was prepared (its SHA-256 differs from {MANIFEST})"
    return None
