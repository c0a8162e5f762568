"""How certain the scores are: an interval over questions and one over databases, what each supports, and the test of the gain.

Questions on one database are right or wrong together, and several may share a gold query. So an interval that takes them as
independent says how the model does on more such questions about these databases; what other databases would give is much less
certain, and is estimated by drawing whole databases.
"""

from __future__ import annotations

from collections.abc import Iterable

from finetune.evaluation.statistics import (
    FEW_DATABASES,
    bootstrap_by_database,
    enough_databases,
    mcnemar_exact,
    paired_interval,
)
from finetune.report.source import Json, Source, dig

Interval = tuple[float, float]


def by_database(scores: Json) -> Interval | None:
    """The interval of a model's accuracy over databases, fractions from 0 to 1; None if it has fewer than two."""
    groups = (scores.get("by_database") or {}).values()
    return bootstrap_by_database([(group["correct"], group["questions"]) for group in groups if group["questions"]])


def intervals_in_words(scores: Json) -> str:
    """The intervals of a model's accuracy for the headline, "" if eval.json has none; that over databases only of enough."""
    of_questions = scores.get("execution_accuracy_interval95")
    if not of_questions:
        return ""
    text, databases = f", 95% interval {points(of_questions)} over questions", by_database(scores)
    return text + (f", {points(databases)} over databases" if databases and enough_databases(scores) else "")


def certainty(source: Source) -> list[str]:
    """Sentences on how certain the accuracy and the gain are; empty if nothing was evaluated."""
    scored = source.tuned or source.base
    return [*_accuracy(source, scored), *_gain(source)] if scored else []


def _accuracy(source: Source, scored: Json) -> list[str]:
    name = "tuned" if source.tuned else "base"
    number, interval = len(scored.get("by_database") or {}), by_database(scored)
    of_questions = scored.get("execution_accuracy_interval95")
    sentences = []
    if of_questions:
        sentences.append(
            f"The {name} model's accuracy is {100 * scored['execution_accuracy']:.1f}%, 95% interval {points(of_questions)} "
            f"over questions (Wilson): this supports a claim about more questions of this kind on {_these(number)}."
        )
    if interval:
        sentences.append(
            f"Over databases the interval is {points(interval)} (bootstrap of the {number} databases): this supports a claim "
            f"about other databases{_limits(source, number)}."
        )
    elif number == 1:
        sentences.append("All questions are about one database, so nothing can be said about another one.")
    golds = {row["gold_sha256"] for row in source.rows.get(name, []) if row.get("gold_sha256")}
    asked = scored["questions"]
    if golds and len(golds) < asked:
        sentences.append(
            f"The {asked} questions have {len(golds)} different gold queries, so they are fewer than they look."
        )
    return sentences


def _gain(source: Source) -> list[str]:
    gain = source.evaluation.get("gain")
    if not gain or not source.base or not source.tuned:
        return []
    won, lost, both, neither = (gain[key] for key in ("won", "lost", "both", "neither"))
    questions = won + lost + both + neither
    p = mcnemar_exact(won, lost)
    verdict = "hardly explains" if p < 0.05 else "may explain"
    probability = p_value(p).removeprefix("= ")
    chance = f"If tuning had no effect, a split as uneven as {won} to {lost} would occur with probability {probability}"
    return [
        f"Tuning won {won} questions and lost {lost}; {both} were right and {neither} wrong for both models.",
        f"The change is {100 * (won - lost) / max(questions, 1):+.1f} points, 95% interval "
        f"{points(paired_interval(won, lost, questions), '+')} over questions (paired, Agresti-Min)"
        f"{_gain_by_database(source)}.",
        f"{chance} (McNemar's exact test, two-sided). Chance alone {verdict} the change on these databases.",
        "No figure here accounts for the choice of the training seed.",
    ]


def _gain_by_database(source: Source) -> str:
    """The interval of the gain over databases; "" if eval.json has none, as for one database and in earlier versions."""
    interval = dig(source.evaluation, "gain_interval95.databases")
    if not interval:
        return ""
    zero = "; it includes 0" if interval[0] <= 0 <= interval[1] else ""
    return f", {points(interval, '+')} over databases (bootstrap{zero})"


def _limits(source: Source, number: int) -> str:
    """What weakens a claim about other databases."""
    data = (source.run.config or {}).get("data") or {}
    weak = []
    if data.get("split_by") == "question":
        weak.append("other questions on these databases were trained on (data.split_by: question)")
    if number < FEW_DATABASES:
        weak.append("with so few of them the interval is too narrow")
    return f", and only with reserve: {'; '.join(weak)}" if weak else ""


def _these(number: int) -> str:
    return f"these {number} databases" if number > 1 else "this database"


def p_value(p: float) -> str:
    """Very small ones are not said exactly: of many questions they are zero as a float."""
    return "< 0.0001" if p < 0.0001 else f"= {p:.2g}"


def points(interval: Iterable[float], sign: str = "") -> str:
    low, high = (f"{100 * bound:{sign}.1f}" for bound in interval)
    return f"{low} to {high}"
