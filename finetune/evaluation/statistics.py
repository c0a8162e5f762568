"""Confidence intervals of proportions and of paired differences, and the exact test of a paired difference."""

from __future__ import annotations

import math


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


def paired_interval(won: int, lost: int, questions: int) -> tuple[float, float]:
    """95% interval of the gain as a fraction: Wald's interval after adding 1/2 to each cell (Agresti and Min 2005)."""
    n, plus, minus = questions + 2, won + 0.5, lost + 0.5
    half = 1.959964 * math.sqrt(plus + minus - (plus - minus) ** 2 / n) / n
    return (plus - minus) / n - half, (plus - minus) / n + half
