"""How far the questions of an evaluation were kept out of training: what the prepared data know about it."""

from __future__ import annotations

from typing import Any

from finetune.data.prepared import Prepared
from finetune.data.validate import LEAK


def leaks(data: Prepared, split: str, trained_on: str | None) -> dict[str, Any]:
    """`leaks` of eval.json. trained_on: the hash of the data that the run was trained on; None if unknown.

    data_of_training: whether these are those data, so that no question and no gold query is in both; None if unknown. removed:
    records that would have been, left out when the data were prepared. same_shape: of the `questions` of the split, those whose
    gold query differs from one in train in its constants at most; None if the manifest does not say.
    """
    overlap = data.manifest.get("skeleton_overlap")
    counts = overlap.get(split) if isinstance(overlap, dict) else None
    rejected = data.manifest.get("rejected")
    return {
        "data_of_training": None if trained_on is None else trained_on == data.manifest_hash,
        "removed": _count(rejected, LEAK) or 0,
        "same_shape": _count(counts, "skeleton_in_train"),
        "questions": _count(counts, "questions"),
    }


def _count(counts: Any, key: str) -> int | None:
    value = counts.get(key) if isinstance(counts, dict) else None
    return value if type(value) is int else None
