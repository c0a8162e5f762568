"""Confidence intervals of proportions and of paired differences, and the exact test of a paired difference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

FEW_DATABASES = 10
"""With fewer, an interval over databases is too narrow: no sentence that is quoted on its own has it."""


def enough_databases(scores: Mapping[str, Any]) -> bool:
    """Whether the questions of a model's scores are about so many databases that an interval over them can be quoted."""
    return len(scores.get("by_database") or {}) >= FEW_DATABASES


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson 1927), 95% by default; reliable near 0 and 1 and for few trials."""
    if trials == 0:
        return 0.0, 1.0
    share, square = successes / trials, z * z / trials
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / trials + square / (4 * trials))
    return max(0.0, min(share, middle - half)), min(
        1.0, max(share, middle + half)
    )  # rounding must not exclude the share


def mcnemar_exact(won: int, lost: int) -> float:
    """Two-sided p-value of McNemar's exact test; `won` and `lost` count the pairs on which the two models differ.

    Twice the smaller tail of a binomial distribution with probability 1/2, at most 1 (McNemar 1947).
    """
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    return float(min(1, 2 * tail / 2 ** (won + lost)))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of several tests, adjusted so that the chance of a single false finding among all of them stays below the
    level (Holm 1979). One p-value stays as it is."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def paired_interval(won: int, lost: int, questions: int) -> tuple[float, float]:
    """95% interval of the gain as a fraction: Wald's interval after adding 1/2 to each cell (Agresti and Min 2005), without what
    lies beyond -1 and 1, which no gain can reach."""
    n, plus, minus = questions + 2, won + 0.5, lost + 0.5
    half = 1.959964 * math.sqrt(plus + minus - (plus - minus) ** 2 / n) / n
    return max(-1.0, (plus - minus) / n - half), min(1.0, (plus - minus) / n + half)


RESAMPLES = 10_000
SEED = 20


def bootstrap_by_database(databases: Sequence[tuple[float, int]]) -> tuple[float, float] | None:
    """95% interval of a score when other databases might have been asked: the percentile bootstrap over whole databases (Efron
    and Tibshirani 1993, chapter 13), whose questions stay together because they are right or wrong together.

    databases: (points, questions) of each; the score is all points divided by all questions. None for fewer than two databases,
    of which nothing can be said. With few databases the interval is still somewhat too narrow. The same input gives the same
    interval: the draws are seeded.
    """
    if len(databases) < 2:
        return None
    import numpy  # here, because most of the command line needs none

    points, questions = numpy.array(databases, dtype=float).T
    drawn = numpy.random.RandomState(SEED).randint(
        len(databases), size=(RESAMPLES, len(databases))
    )  # the same in every version
    low, high = numpy.quantile(points[drawn].sum(axis=1) / questions[drawn].sum(axis=1), [0.025, 0.975])
    return float(low), float(high)
