"""What two lists of verdicts on the same questions say about which of them is better: the gain of `evaluate`, and `compare`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.evaluation.error_classes import as_error_class
from finetune.evaluation.score import CAN_TELL, CORRECT, Row, rules_of
from finetune.evaluation.statistics import bootstrap_by_database, mcnemar_exact, paired_interval

Pair = tuple[Row, Row]
"""The verdicts of the first and of the second on one question."""


@dataclass(frozen=True)
class Difference:
    """The second less the first. won: questions that only the second answers correctly. over_questions, over_databases: 95%
    intervals of `share`, a fraction of the questions; over_databases is None for fewer than two. databases: how many the
    questions are about. p: McNemar's exact test."""

    won: int
    lost: int
    both: int
    neither: int
    over_questions: tuple[float, float]
    over_databases: tuple[float, float] | None
    databases: int
    p: float

    @property
    def questions(self) -> int:
        return self.won + self.lost + self.both + self.neither

    @property
    def share(self) -> float:
        return (self.won - self.lost) / max(self.questions, 1)

    @property
    def counts(self) -> dict[str, int]:
        return {"won": self.won, "lost": self.lost, "both": self.both, "neither": self.neither}


def paired(first: Iterable[Row], second: Iterable[Row]) -> list[Pair]:
    """The questions that both were asked, in the order of the second."""
    known = {row.id: row for row in first}
    return [(known[row.id], row) for row in second if row.id in known]


def is_right(row: Row, rule: str | None = None) -> bool:
    """rule: None for that of `Row.verdict`."""
    return (row.verdicts.get(rule) if rule else row.verdict) == CORRECT


def error_class(row: Row) -> str | None:
    """What is wrong with an answer (error_classes.py), None if it is correct."""
    return None if is_right(row) else as_error_class(row.verdict, row.error_class)


def telling(pairs: Iterable[Pair]) -> list[Pair]:
    """Those whose gold query is not hollow."""
    return [pair for pair in pairs if all(row.gold_kind in CAN_TELL for row in pair)]


def difference(pairs: Sequence[Pair], rule: str | None = None) -> Difference:
    """rule: None for that of `Row.verdict`."""
    cells = Counter((is_right(first, rule), is_right(second, rule)) for first, second in pairs)
    won, lost = cells[False, True], cells[True, False]
    by_database = _points_by_database(pairs, rule)
    return Difference(
        won=won,
        lost=lost,
        both=cells[True, True],
        neither=cells[False, False],
        over_questions=paired_interval(won, lost, len(pairs)),
        over_databases=bootstrap_by_database(by_database),
        databases=len(by_database),
        p=mcnemar_exact(won, lost),
    )


def differences_by_rule(pairs: Sequence[Pair]) -> dict[str, Difference]:
    """Under each rule that all of the rows were judged by."""
    return {rule: difference(pairs, rule) for rule in rules_of(row for pair in pairs for row in pair)}


def gain(base: Iterable[Row], tuned: Iterable[Row], rule: str | None = None) -> dict[str, int]:
    """How many questions only the tuned model (won), only the base model (lost), both or neither answered correctly, over the
    questions that both were asked. rule: None for that of `Row.verdict`."""
    return difference(paired(base, tuned), rule).counts


def gains(base: Sequence[Row], tuned: Sequence[Row]) -> dict[str, Any]:
    """`gain` under each rule, and without the questions whose gold is hollow; its 95% intervals as fractions, over questions and
    over databases (None for fewer than two)."""
    pairs = paired(base, tuned)
    chosen = difference(pairs)
    return {
        "gain": chosen.counts,
        "gain_interval95": {"questions": chosen.over_questions, "databases": chosen.over_databases},
        "gain_by_rule": {rule: found.counts for rule, found in differences_by_rule(pairs).items()},
        "gain_without_hollow": difference(telling(pairs)).counts,
    }


def _points_by_database(pairs: Iterable[Pair], rule: str | None) -> list[tuple[float, int]]:
    """(questions won less questions lost, questions) of each database."""
    found: dict[str, tuple[float, int]] = {}
    for first, second in pairs:
        points, questions = found.get(second.db_id, (0.0, 0))
        found[second.db_id] = points + is_right(second, rule) - is_right(first, rule), questions + 1
    return [found[name] for name in sorted(found)]
