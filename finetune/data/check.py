"""From sources to checked, split records, and nothing written: all of `data check`, the first half of `prepare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.config.schema import DataSection, SourceSection
from finetune.data.records import SPLITS, Record, Split
from finetune.data.sources import open_source
from finetune.data.split import assign_splits, drop_duplicates, find_leaks, thin_out
from finetune.data.validate import Accepted, Rejection, stopping_problem, validate
from finetune.runtime.files import sha256_file


@dataclass(frozen=True)
class SourceCounts:
    """How many examples a source holds, and how many of them are faulty in themselves."""

    read: int
    faulty: int


@dataclass(frozen=True)
class Findings:
    """What checking the sources brought to light.

    rejections are sorted by file and line. left_out: train records beyond max_train_records. problems: what keeps
    `prepare` from writing anything, one line each.
    """

    splits: dict[Split, list[Accepted]]
    rejections: list[Rejection]
    sources: list[SourceCounts]
    left_out: int
    problems: list[str]

    def records(self, split: Split) -> list[Record]:
        return [replace(item.record, split=split) for item in self.splits[split]]


def check(data: DataSection, *, timeout_seconds: float, progress: bool = True) -> Findings:
    """Read, validate and split everything. timeout_seconds: wall-clock limit of one gold query; evaluation.timeout_seconds, under
    which gold has to run again.

    Raises UserError only where a source cannot be read at all; everything else is in the findings.
    """
    accepted, rejections, counts, problems = _validate_all(data.sources, timeout_seconds, progress)
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
    if not problems:  # else an empty split would only be a consequence
        fractions = {"val": data.val_fraction, "test": data.test_fraction}
        problems = [*_empty_splits(splits, fractions), *ambiguous_databases(splits)]
    return Findings(splits, rejections, counts, left_out, problems)


def _validate_all(
    sources: Sequence[SourceSection], timeout_seconds: float, progress: bool
) -> tuple[list[Accepted], list[Rejection], list[SourceCounts], list[str]]:
    accepted: list[Accepted] = []
    rejections: list[Rejection] = []
    counts: list[SourceCounts] = []
    problems: list[str] = []
    for number, section in enumerate(sources):
        source = open_source(section, f"data.sources[{number}]", progress=progress)
        good, bad = validate(source, timeout_seconds=timeout_seconds, progress=progress)
        problem = stopping_problem(bad, len(source.candidates), source.strict)
        problems += [problem] if problem else []
        counts.append(SourceCounts(read=len(source.candidates), faulty=len(bad)))
        accepted += good
        rejections += bad
    return accepted, rejections, counts, problems


def _limit_train(splits: dict[Split, list[Accepted]], limit: int | None, seed: int) -> int:
    """Thin out train to `limit` records; how many were left out."""
    train = splits["train"]
    if limit is None or len(train) <= limit:
        return 0
    keep = thin_out([item.record for item in train], limit, seed)
    splits["train"] = [item for index, item in enumerate(train) if index in keep]
    return len(train) - limit


def _empty_splits(splits: Mapping[Split, list[Accepted]], fractions: Mapping[str, float]) -> list[str]:
    """Train and test must hold something; val may be empty if nobody asked for it."""
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


def ambiguous_databases(splits: Mapping[Split, list[Accepted]]) -> list[str]:
    """A db_id that two sources use for different databases: evaluation could not tell which one is meant."""
    chosen: dict[str, Path] = {}
    problems = {}
    for item in (*splits["val"], *splits["test"]):
        if item.database is None:
            continue
        first = chosen.setdefault(item.record.db_id, item.database)
        if first != item.database and sha256_file(first) != sha256_file(item.database):
            problems[item.record.db_id] = (
                f"{item.candidate.where}: db_id {item.record.db_id!r} means {item.database} here and {first} "
                "elsewhere, and they differ; rename one"
            )
    return list(problems.values())
