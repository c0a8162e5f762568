"""Shares of right answers by group, each with its 95% interval: the bars of a page and the tables of report.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.evaluation.statistics import wilson_interval

LEVELS = ("easy", "medium", "hard", "extra")
MODELS = ("base", "tuned")
ALL = "all questions"
OF_DIFFICULTY = (
    "Easy, medium, hard, extra: Spider's difficulty, by how many clauses, conditions and nested "
    "queries the gold SQL has."
)


@dataclass(frozen=True)
class Rate:
    """The share of right answers of one model, with its 95% interval over questions (Wilson), all three in percent. model: the
    first (base, or a comparison's reference) or the second (tuned)."""

    model: str
    correct: int
    questions: int
    percent: float
    low: float
    high: float

    @property
    def interval(self) -> str:
        return f"{self.low:.1f} to {self.high:.1f}"

    def __str__(self) -> str:
        return f"{self.correct} of {self.questions}, {self.percent:.1f}% ({self.interval})"


@dataclass(frozen=True)
class Bar:
    """The questions of one group, and how many each model answered correctly; None if it was not evaluated."""

    name: str
    questions: int
    base: int | None
    tuned: int | None

    @property
    def rates(self) -> list[Rate]:
        known = zip(MODELS, (self.base, self.tuned), strict=True)
        return [rate(model, correct, self.questions) for model, correct in known if correct is not None]


@dataclass(frozen=True)
class Group:
    """One figure. labels: what the legend calls the models that have a bar. note: a sentence below the bars."""

    title: str
    caption: str
    bars: list[Bar]
    labels: tuple[str, str] = ("base model", "tuned model")
    note: str = ""

    @property
    def legend(self) -> list[tuple[str, str]]:
        models = dict.fromkeys(one.model for bar in self.bars for one in bar.rates)
        return [(model, label) for model, label in zip(MODELS, self.labels, strict=True) if model in models]


def rate(model: str, correct: int, questions: int) -> Rate:
    low, high = wilson_interval(min(correct, questions), questions)
    return Rate(model, correct, questions, 100 * correct / max(questions, 1), 100 * low, 100 * high)


def group_bars(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> list[Bar]:
    """Both models' `{group: {"correct", "questions"}}` as bars: difficulties from easy to extra, other groups by name."""
    names = sorted({**base, **tuned}, key=lambda name: (LEVELS.index(name) if name in LEVELS else len(LEVELS), name))
    return [
        Bar(
            name,
            ({**base, **tuned})[name]["questions"],
            base[name]["correct"] if name in base else None,
            tuned[name]["correct"] if name in tuned else None,
        )
        for name in names
    ]


def overall(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> Bar:
    """All questions as one bar. base, tuned: scores of eval.json, empty for a model that was not evaluated."""
    return Bar(ALL, (tuned or base)["questions"], base.get("correct"), tuned.get("correct"))


def counts(bar: Bar) -> str:
    """`3 → 12 of 40`: correct answers of the base model, of the tuned model, and questions."""
    known = [str(count) for count in (bar.base, bar.tuned) if count is not None]
    return f"{' → '.join(known)} of {bar.questions}"
