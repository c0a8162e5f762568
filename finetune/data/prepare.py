"""Data preparation: turns sources into a self-contained folder of checked and split records.

    train.jsonl  val.jsonl  test.jsonl     records, each with its split
    rejected.jsonl                         file, line, reason, detail and raw record of everything rejected
    databases/<db_id>/<db_id>.sqlite       copies of the databases of val and test (.sqlite: the engine's suffix)
    manifest.json                          counts, token lengths, settings, SHA-256 of every other file; written last

The same inputs give the same bytes. The folder is replaced atomically.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.config.schema import DataSection, RunConfig
from finetune.data.check import Findings, check
from finetune.data.golds import tally
from finetune.data.limits import limits_of
from finetune.data.prepared import (
    MANIFEST_FORMAT,
    Prepared,
    database_name,
    fingerprint,
    first_fault,
    read_manifest,
)
from finetune.data.prompts import PromptTemplate
from finetune.data.records import SPLITS, write_records
from finetune.data.stats import per_database, skeleton_overlap, token_counts, token_summary
from finetune.errors import UserError
from finetune.prepared_folder import DATABASES, MANIFEST, REJECTED, SOURCES, records_file
from finetune.prepared_from import settings_of
from finetune.runtime.console import say
from finetune.runtime.files import disk_error, sha256_file, write_json, write_text
from finetune.sql.engines.base import Limits
from finetune.sql.engines.registry import ENGINES


def prepare(
    data: DataSection,
    *,
    max_seq_length: int,
    timeout_seconds: float,
    limits: Limits | None = None,
    tokenizer: Any = None,
    tokenizer_name: str | None = None,
    progress: bool = True,
) -> Prepared:
    """Check all sources and write the prepared folder, data.output_dir. A prepared set that is already there is replaced.

    max_seq_length (tokens): longer records are written and counted; training leaves them out. timeout_seconds, limits: of each
    gold query. tokenizer: without one the token counts are null.

    Raises UserError, before anything is written, if a source is unusable, a split ends up empty, or output_dir holds
    anything other than a prepared set.
    """
    output_dir = Path(data.output_dir)
    folder = Path(os.path.realpath(output_dir))
    _check_replaceable(folder, output_dir)
    findings = check(data, timeout_seconds=timeout_seconds, limits=limits, progress=progress)
    template = PromptTemplate(data.schema_format)
    if findings.problems:
        raise UserError("; ".join(findings.problems), code="data.refused")
    if apart := Counter(flag.kind for flag in findings.scored_apart()):
        say(f"gold queries of val and test that say little about an answer, and are scored apart: {tally(apart)}; "
            "`finetune data check` lists them")  # fmt: skip
    manifest = {
        "format": MANIFEST_FORMAT,
        **_counts(findings),
        "tokens": _tokens(findings, template, tokenizer, max_seq_length, progress),
        "settings": settings_of(data, max_seq_length),
        "prompt": template.identity(),
        "tokenizer": tokenizer_name if tokenizer is not None else None,
        "sources": [asdict(one) | asdict(count) for one, count in zip(data.sources, findings.sources, strict=True)],
    }
    try:
        changed = _write(folder, findings, manifest, progress)
    except OSError as error:
        raise disk_error(error, output_dir) from error
    return read_manifest(output_dir, changed=changed)


def prepare_data(config: RunConfig, tokenizer: Any = None) -> Prepared:
    """`prepare` with the config's settings. tokenizer: as in `prepare`."""
    return prepare(
        config.data,
        max_seq_length=config.model.max_seq_length,
        timeout_seconds=config.evaluation.timeout_seconds,
        limits=limits_of(config.evaluation),
        tokenizer=tokenizer,
        tokenizer_name=config.model.name,
    )


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
    """Build the set in a scratch folder and swap it in. Returns False if an identical set is already in place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        for split in SPLITS:
            write_records(new / records_file(split), findings.records(split))
        write_text(new / REJECTED, "".join(_json_line(item.row()) for item in findings.rejections))
        _copy_databases(findings, new, progress)
        manifest["files"] = {str(path.relative_to(new)): fingerprint(path) for path in _files(new)}
        write_json(new / MANIFEST, manifest)
        write_json(new / SOURCES, _hashes_of_sources(findings))
        if _same(new, folder, progress):
            _renew_sources(new, folder)
            return False
        _swap_in(new, folder, Path(scratch) / "old")
    return True


def _renew_sources(new: Path, folder: Path) -> None:
    """A change of a source that changes nothing in the set. A folder that cannot be written has to do as it is."""
    there = folder / SOURCES
    if not there.is_file() or there.read_bytes() != (new / SOURCES).read_bytes():
        with suppress(OSError):
            os.replace(new / SOURCES, there)


def _hashes_of_sources(findings: Findings) -> dict[str, str]:
    """Of the files that are here; a hub's cache is kept by commit."""
    accepted = [item.candidate for split in SPLITS for item in findings.splits[split]]
    files = {str(one.file) for one in (*accepted, *(item.candidate for item in findings.rejections))}
    return {file: sha256_file(Path(file)) for file in sorted(files) if Path(file).is_file()}


def _json_line(value: Any) -> str:
    """Non-ASCII is escaped, because a rejected record may hold lone surrogates, which cannot be encoded as UTF-8."""
    return json.dumps(value, default=str) + "\n"


def _copy_databases(findings: Findings, folder: Path, progress: bool) -> None:
    held_out = [*findings.splits["val"], *findings.splits["test"]]
    databases = {
        name: (ENGINES[item.record.dialect], item.database)
        for item in held_out
        if item.database and (name := database_name(item.record))
    }
    for name in tqdm(sorted(databases), desc="Copying databases", delay=1, disable=not progress):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        engine, database = databases[name]
        engine.copy(database, target)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _same(new: Path, folder: Path, progress: bool) -> bool:
    old = folder / MANIFEST
    if not old.is_file() or old.read_bytes() != (new / MANIFEST).read_bytes():
        return False
    return first_fault(folder, json.loads(old.read_text(encoding="utf-8")), progress) is None


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
        raise UserError(f"{name}: data.output_dir is a file; choose a folder", code="data.output_dir_taken")
    ours = {MANIFEST, REJECTED, DATABASES, SOURCES, *map(records_file, SPLITS)}
    present = {path.name for path in folder.iterdir()}
    unexpected = sorted(present if MANIFEST not in present else present - ours)
    if unexpected:
        raise UserError(
            f"{name}: data.output_dir holds files that are not of a prepared set ({unexpected[0]}); choose another folder",
            code="data.output_dir_taken",
        )
