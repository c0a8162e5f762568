"""What goes wrong how often: the error classes of eval.json with an example each, and what to do about them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.report.source import UNKNOWN, Json, Source

MOST_NAMED = 3
"""Classes in the line for the console."""
LONGEST_EXAMPLE = 200


@dataclass(frozen=True)
class ErrorRow:
    """One class. base, tuned: answers in it, with their share of all; "–" for a model that was not evaluated. example: an answer
    in it and its error, chosen by the hash of the question's id; "" if there are no rows."""

    name: str
    title: str
    base: str
    tuned: str
    example: str
    advice: str


def error_rows(source: Source) -> list[ErrorRow]:
    """The classes of both models, the most frequent of the tuned model first; empty if eval.json counts none."""
    from finetune.evaluation.error_classes import ERROR_CLASSES  # here, because the command line loads nothing of it

    base, tuned = (scores.get("error_classes") for scores in (source.base, source.tuned))
    first = tuned or base or {}
    names = dict.fromkeys(name for counts in (first, base or {}) for name in counts)
    known = {name: ERROR_CLASSES.get(name) for name in names}
    return [
        ErrorRow(
            name,
            found.title if (found := known[name]) else "",
            _counted(base, name, source.base),
            _counted(tuned, name, source.tuned),
            _example(source, name),
            found.advice if found else "",
        )
        for name in sorted(names, key=lambda name: (-first.get(name, 0), -(base or {}).get(name, 0)))
    ]


def error_lines(scores: Json) -> list[str]:
    """The most frequent classes of one model, a line each below a head; none if it has no error, or none are counted."""
    from finetune.evaluation.error_classes import ERROR_CLASSES

    counts: dict[str, int] = scores.get("error_classes") or {}
    most = sorted(counts.items(), key=lambda pair: -pair[1])[:MOST_NAMED]
    lines = []
    for name, count in most:
        meaning = f": {found.title}" if (found := ERROR_CLASSES.get(name)) else ""
        lines.append(f"  {count} ({count / scores['questions']:.1%}) {name}{meaning}")
    return [f"most frequent errors, of {scores['questions']} answers:", *lines] if lines else []


def _counted(counts: dict[str, int] | None, name: str, scores: Json) -> str:
    if counts is None or not scores.get("questions"):
        return UNKNOWN
    count = counts.get(name, 0)
    return f"{count} ({count / scores['questions']:.1%})"


def _example(source: Source, name: str) -> str:
    from finetune.evaluation.error_classes import as_error_class

    for model in ("tuned", "base"):
        rows = [
            row
            for row in source.rows.get(model, [])
            if as_error_class(str(row["verdict"]), row.get("error_class")) == name
        ]
        if rows:
            return _shown(rows)
    return ""


def _shown(rows: Sequence[Json]) -> str:
    row = min(rows, key=lambda row: hashlib.sha256(str(row["id"]).encode()).digest())
    text = " ".join(str(row.get("prediction") or row.get("answer") or "(nothing)").split())
    text = text if len(text) <= LONGEST_EXAMPLE else f"{text[:LONGEST_EXAMPLE]} …"
    return f"{text} ({row['error']})" if row.get("error") else text
