"""Reads, validates and splits the sources without writing anything: all of `data check`, the first half of `prepare`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from finetune.config.schema import DataSection
from finetune.data.golds import Flag, Golds, HollowDatabase, hollow_databases
from finetune.data.records import SPLITS, Record, Split
from finetune.data.sources import open_source
from finetune.data.split import assign_splits, drop_duplicates, find_leaks, subsample
from finetune.data.validate import GOLD_UNSTABLE, LEFT_OUT, Accepted, Rejection, stopping_problem, validate
from finetune.runtime.files import sha256_file
from finetune.sql.engines.base import Limits
from finetune.sql.engines.registry import ENGINES
from finetune.sql.gold import SOUND, WHY


@dataclass(frozen=True)
class SourceCounts:
    """How many examples a source holds, and how many of them are faulty (duplicates and leaks not counted)."""

    read: int
    faulty: int


@dataclass(frozen=True)
class Findings:
    """The result of checking all sources.

    rejections: sorted by file and line. left_out: number of train records dropped because of max_train_records. problems: why
    `prepare` refuses to write, one line each; empty if it does not. flags: the records whose gold query says little about an
    answer (sql/gold.py), sorted likewise; they are used, and scored apart if they are scored at all.
    """

    splits: dict[Split, list[Accepted]]
    rejections: list[Rejection]
    sources: list[SourceCounts]
    left_out: int
    problems: list[str]
    flags: list[Flag]

    def records(self, split: Split) -> list[Record]:
        return [replace(item.record, split=split) for item in self.splits[split]]

    def hollow_databases(self) -> list[HollowDatabase]:
        return hollow_databases(self.flags, Counter(i.record.db_id for items in self.splits.values() for i in items))

    def scored_apart(self) -> list[Flag]:
        """The flags of val and test, but for records without a database: those have no score."""
        scored = {i.candidate.where for split in ("val", "test") for i in self.splits[split] if i.database is not None}
        return [flag for flag in self.flags if flag.where in scored]

    def as_json(self) -> dict[str, Any]:
        """Everything with its file and line: for other programs."""
        return {
            "records": {split: len(items) for split, items in self.splits.items()},
            "sources": [asdict(source) for source in self.sources],
            "left_out": self.left_out,
            "rejections": [
                {
                    "where": item.candidate.where, "file": str(item.candidate.file), "line": item.candidate.line,
                    "reason": item.reason, "left_out": item.reason == LEFT_OUT, "text": str(item),
                }
                for item in self.rejections
            ],
            "problems": list(self.problems),
            "flags": [asdict(flag) | {"file": str(flag.file), "text": str(flag)} for flag in self.flags],
            "hollow_databases": [asdict(database) for database in self.hollow_databases()],
        }  # fmt: skip


def check(
    data: DataSection, *, timeout_seconds: float, limits: Limits | None = None, progress: bool = True
) -> Findings:
    """Read, validate and split all sources. timeout_seconds: wall-clock limit of one gold query; pass evaluation.timeout_seconds,
    and as limits `limits_of(evaluation)`, since evaluation runs the gold queries again under those limits.

    Raises UserError only if a source cannot be read at all; every other problem is in the findings.
    """
    golds = Golds(limits)
    accepted, rejections, counts, problems = _validate_all(data, timeout_seconds, limits, golds, progress)
    accepted, repeated = drop_duplicates(accepted)
    assigned = assign_splits(
        [item.record for item in accepted],
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        split_by=data.split_by,
        seed=data.seed,
        progress=progress,
    )
    leaks = find_leaks(accepted, assigned, data.split_by)
    splits: dict[Split, list[Accepted]] = {split: [] for split in SPLITS}
    for index, (item, split) in enumerate(zip(accepted, assigned, strict=True)):
        if index not in leaks:
            splits[split].append(item)
    left_out = _limit_train(splits, data.max_train_records, data.seed)
    rejections = sorted(
        [*rejections, *repeated, *leaks.values()], key=lambda item: (item.candidate.file, item.candidate.line)
    )
    if not problems:  # otherwise an empty split would only be a consequence of them
        fractions = {"val": data.val_fraction, "test": data.test_fraction}
        problems = [*_empty_splits(splits, fractions), *ambiguous_databases(splits)]
    return Findings(splits, rejections, counts, left_out, problems, _flags(splits, golds))


def _validate_all(
    data: DataSection, timeout_seconds: float, limits: Limits | None, golds: Golds, progress: bool
) -> tuple[list[Accepted], list[Rejection], list[SourceCounts], list[str]]:
    accepted: list[Accepted] = []
    rejections: list[Rejection] = []
    counts: list[SourceCounts] = []
    problems: list[str] = []
    for number, section in enumerate(data.sources):
        source = open_source(section, f"data.sources[{number}]", progress=progress)
        good, bad = validate(
            source,
            timeout_seconds=timeout_seconds,
            limits=limits,
            statements=data.statements,
            golds=golds,
            progress=progress,
        )
        good, bad = _without_changing(good, bad, golds, timeout_seconds)
        problem = stopping_problem(bad, len(source.candidates), source.strict)
        problems += [problem] if problem else []
        counts.append(SourceCounts(read=len(source.candidates), faulty=sum(item.reason != LEFT_OUT for item in bad)))
        accepted += good
        rejections += bad
    return accepted, rejections, counts, problems


def _without_changing(
    good: list[Accepted], bad: list[Rejection], golds: Golds, timeout_seconds: float
) -> tuple[list[Accepted], list[Rejection]]:
    """Moves the records whose gold query gives something else a second later from the usable ones to the rejections."""
    changing = golds.changing(timeout_seconds)
    kept: list[Accepted] = []
    for item in good:
        if (item.record.dialect, item.database, item.record.sql) in changing:
            bad = [*bad, Rejection(item.candidate, GOLD_UNSTABLE, WHY["unstable"])]
        else:
            kept.append(item)
    return kept, bad


def _flags(splits: Mapping[Split, list[Accepted]], golds: Golds) -> list[Flag]:
    found = []
    for split, items in splits.items():
        for item in items:
            kind = golds.kind(item.record, item.database)
            if kind != SOUND:
                place = item.candidate
                found.append(Flag(place.where, place.file, place.line, item.record.db_id, split, kind))
    return sorted(found, key=lambda flag: (flag.file, flag.line))


def _limit_train(splits: dict[Split, list[Accepted]], limit: int | None, seed: int) -> int:
    """Reduce train to at most `limit` records. Returns how many were left out."""
    train = splits["train"]
    if limit is None or len(train) <= limit:
        return 0
    keep = subsample([item.record for item in train], limit, seed)
    splits["train"] = [item for index, item in enumerate(train) if index in keep]
    return len(train) - limit


def _empty_splits(splits: Mapping[Split, list[Accepted]], fractions: Mapping[str, float]) -> list[str]:
    """Train and test must not be empty; val may be if its fraction is 0."""
    records = sum(map(len, splits.values()))
    databases = len({item.record.db_id for items in splits.values() for item in items})
    problems = []
    for split, items in splits.items():
        if items or (split == "val" and fractions["val"] == 0):
            continue
        remedy = (
            "lower data.val_fraction and data.test_fraction"
            if split == "train"
            else f"raise data.{split}_fraction (now {fractions[split]:g}), try another data.seed"
        )
        problems.append(
            f"data: the split {split} is empty ({records} usable records on {databases} databases in all); {remedy}, "
            f"or give a source `split: {split}`"
        )
    return problems


def _hashes(files: Iterable[Path]) -> list[str]:
    return [sha256_file(file) for file in files]


def ambiguous_databases(splits: Mapping[Split, list[Accepted]]) -> list[str]:
    """One problem for each db_id that two sources use for different databases: evaluation could not tell which one is meant."""
    chosen: dict[str, Path] = {}
    problems = {}
    for item in (*splits["val"], *splits["test"]):
        if item.database is None:
            continue
        first = chosen.setdefault(item.record.db_id, item.database)
        files = ENGINES[item.record.dialect].files
        if first != item.database and _hashes(files(first)) != _hashes(files(item.database)):
            problems[item.record.db_id] = (
                f"{item.candidate.where}: db_id {item.record.db_id!r} means {item.database} here and {first} "
                "elsewhere, and they differ; rename one"
            )
    return list(problems.values())
