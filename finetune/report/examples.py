"""Questions that stand for the others: of each outcome some, over all kinds of error, chosen by a hash and not by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from finetune.report.samples import SampleTable, sample_table
from finetune.report.source import Json, Source

CORRECT = "correct"
EXAMPLES = 4
"""Shown per outcome; more if there are more kinds of error, one of each."""
MAX_CHARACTERS = 600
"""Shown of one query, answer or message; an answer of a base model may be pages long."""

Known = list[tuple[str, Json]]
"""The rows of one question: (model, row)."""


@dataclass(frozen=True)
class Answer:
    label: str
    text: str
    verdict: str = ""
    error: str = ""
    error_class: str = ""
    sample: SampleTable | None = None


@dataclass(frozen=True)
class Examples:
    """One outcome, the number of questions with it, and a few of them with their answers side by side."""

    title: str
    total: int
    shown: list[tuple[Json, list[Answer]]]


def examples(source: Source) -> list[Examples]:
    """A few questions of each outcome and of every kind of error in it, selected by the hash of their id: reproducible."""
    known = {name: {str(row["id"]): row for row in rows} for name, rows in source.rows.items()}
    titles: dict[tuple[bool, ...], str] = {(True,): "Right", (False,): "Wrong"}
    if len(known) == 2:
        titles = {(False, True): "Won", (True, False): "Lost", (False, False): "Still wrong"}
    groups: dict[tuple[bool, ...], list[Known]] = {outcome: [] for outcome in titles}
    shared = set.intersection(*map(set, known.values())) if known else set()
    for name in sorted(shared, key=_place):
        pair = [(model, known[model][name]) for model in sorted(known)]
        groups.get(tuple(row["verdict"] == CORRECT for _, row in pair), []).append(pair)
    return [
        Examples(titles[outcome], len(pairs), [(pair[0][1], _answers(pair)) for pair in over_all_kinds(pairs)])
        for outcome, pairs in groups.items()
        if known
    ]


def over_all_kinds(pairs: Sequence[Known]) -> list[Known]:
    """EXAMPLES of them, or one of each kind if there are more kinds: in turn one of each, the most frequent kind first."""
    by_kind: dict[str, list[Known]] = {}
    for pair in pairs:
        by_kind.setdefault(kind_of(pair), []).append(pair)
    kinds = sorted(by_kind, key=lambda kind: (-len(by_kind[kind]), kind))
    in_turn = [pair for each in zip_longest(*(by_kind[kind] for kind in kinds)) for pair in each if pair is not None]
    return in_turn[: max(EXAMPLES, len(kinds))]


def kind_of(pair: Known) -> str:
    """The error class of the answer that is wrong, of the last model if both are; "" if none is."""
    wrong = [error_class(row) for _, row in pair if row["verdict"] != CORRECT]
    return wrong[-1] if wrong else ""


def error_class(row: Json) -> str:
    from finetune.evaluation.error_classes import as_error_class  # here, because the command line loads nothing of it

    recorded = row.get("error_class")
    return as_error_class(str(row["verdict"]), recorded if isinstance(recorded, str) else None) or ""


def clipped(text: str, most: int = MAX_CHARACTERS) -> str:
    more = len(text) - most
    return text[:most] + (f" … ({more} more characters)" if more > 0 else "")


def _answers(known: Known) -> list[Answer]:
    """The gold SQL and each model's SQL, or its raw answer if that contains no SQL, with the rows they return."""
    first = known[0][1]
    answers = [
        Answer(
            "gold",
            clipped(str(first.get("gold"))),
            sample=sample_table(_kept(row.get("gold_sample") for _, row in known)),
        )
    ]
    for name, row in known:
        text = clipped(str(row.get("prediction") or row.get("answer") or "(nothing)"))
        wrong = error_class(row)
        answers.append(
            Answer(
                f"{name} model",
                text,
                str(row["verdict"]),
                clipped(str(row.get("error") or "")),
                "" if wrong == row["verdict"] else wrong,
                sample_table(row.get("result_sample")),
            )
        )
    return answers


def _kept(found: Iterable[Any]) -> Any:
    return next((sample for sample in found if sample), None)


def _place(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="backslashreplace")).digest()
