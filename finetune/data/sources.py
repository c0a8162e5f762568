"""The three kinds of source: our JSONL, a Spider-format folder, a Hugging Face dataset.

Each yields raw candidates and where they come from; finetune/data/validate.py decides which of them are usable.
Relative paths are relative to the current directory.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

from finetune.config.schema import SourceSection
from finetune.data.candidates import Candidate, Source
from finetune.data.hub import download
from finetune.data.huggingface import huggingface_source
from finetune.data.records import FIELDS, read_lines
from finetune.data.spider import spider_source
from finetune.errors import UserError
from finetune.sql.dialects import dialect_name

_KEYS = {
    "revision": ("spider", "huggingface"),
    "files": ("spider",),
    "subset": ("huggingface",),
    "columns": ("huggingface",),
}
"""The keys of a source that only some kinds have."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def open_source(section: SourceSection, key: str, *, progress: bool = True) -> Source:
    """Read one source completely. key: its config key, for error messages.

    Raises UserError if a file, folder, dataset or revision is missing, empty or in the wrong format.
    """
    dialect = _known_dialect(section.dialect, f"{key}.dialect")
    databases = Path(section.databases) if section.databases else None
    if databases and not databases.is_dir():
        raise UserError(
            f"{key}.databases: {databases}: no such folder; expected <db_id>/<db_id>.sqlite inside it",
            code="data.not_found",
        )
    if section.kind == "jsonl":
        source = jsonl_source(Path(section.path), databases)
    elif section.kind == "spider":
        folder = _local_or_hub(section.path, section.revision, key)
        if not section.files:
            raise UserError(
                f"{key}.files: expected the question files in {section.path}, such as [train_spider.json]",
                code="data.no_files",
            )
        if folder is None:
            folder = download(section.path, section.revision, section.files, key)
        source = spider_source(folder, section.files, databases, shown=Path(section.path))
    else:
        _local_or_hub(section.path, section.revision, key)
        source = huggingface_source(
            section.path,
            section.revision,
            section.subset,
            section.columns,
            databases,
            key=key,
            progress=progress,
        )
    if not source.candidates:
        raise UserError(f"{key}: {section.path}: empty, expected at least one example", code="data.empty")
    _refuse_unused_keys(section, key)
    candidates = [_with_source_settings(candidate, dialect, section.split, key) for candidate in source.candidates]
    return replace(source, candidates=candidates)


def _refuse_unused_keys(section: SourceSection, key: str) -> None:
    for name, kinds in _KEYS.items():
        if getattr(section, name) and section.kind not in kinds:
            raise UserError(
                f"{key}.{name}: `kind: {section.kind}` does not use this key, only {' and '.join(kinds)} does; remove it"
                + (f", and name the fields of {section.path} {', '.join(FIELDS)}" if name == "columns" else ""),
                code="data.unused_key",
            )


def jsonl_source(path: Path, databases: Path | None) -> Source:
    """Our own format: one record per line, or an array of them, schema included."""
    candidates = [
        Candidate(str(path), line.number, line.place(path), line.value, line.value, line.problem)
        for line in read_lines(path)
    ]
    return Source(candidates, databases, schemas=None, strict=True)


def _local_or_hub(path: str, revision: str | None, key: str) -> Path | None:
    """The local folder, or None for a hub id. Both may look like owner/name, so a revision is what marks a hub id."""
    local = Path(path)
    if revision is None:
        if local.is_dir():
            return local
        if local.exists():
            raise UserError(f"{key}.path: {path}: expected a folder, found a file", code="data.not_found")
        hint = "; a Hugging Face dataset id needs a revision (the commit to pin)" if _HUB_ID.fullmatch(path) else ""
        raise UserError(f"{key}.path: {path}: no such folder in {Path.cwd()}{hint}", code="data.not_found")
    if local.exists():
        raise UserError(
            f"{key}.revision: {path} is a local folder, which has no revision; remove the key",
            code="data.revision_of_folder",
        )
    if not _HUB_ID.fullmatch(path):
        raise UserError(
            f"{key}.path: {path}: neither a folder nor a Hugging Face dataset id (owner/name)",
            code="data.not_found",
        )
    return None


def _with_source_settings(
    candidate: Candidate, dialect: str, split: Literal["auto", "train", "val", "test"], key: str
) -> Candidate:
    """The candidate with the source's dialect and split applied."""
    if not isinstance(candidate.fields, dict):
        return candidate
    fields = {"dialect": dialect} | candidate.fields
    problem = candidate.problem
    if split != "auto":
        if fields.get("split") not in (None, split):
            problem = problem or f"split: the record says {fields['split']!r}, but {key}.split says {split!r}"
        fields["split"] = split
    return replace(candidate, fields=fields, problem=problem)


def _known_dialect(dialect: str, key: str) -> str:
    try:
        return dialect_name(dialect)
    except UserError as error:
        raise UserError(f"{key}: {error}", code="sql.unknown_dialect") from None
