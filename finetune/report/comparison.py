"""Compares the verdicts on several models' answers with those of the first, the reference: compare.json and compare.html.

Each pair is tested on the questions that all were asked, by McNemar's exact test; over several pairs the p-values are adjusted
(Holm), so that one of many does not look better by chance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from finetune.evaluation.paired import (
    Difference,
    Pair,
    difference,
    differences_by_rule,
    error_class,
    is_right,
    telling,
)
from finetune.evaluation.score import Row, score
from finetune.evaluation.statistics import FEW_DATABASES, holm
from finetune.report.certainty import p_value, points
from finetune.report.compared import Common, Compared, common_questions, read_all
from finetune.report.comparison_notes import notes
from finetune.report.source import Json

LEVEL = 0.05
WITHOUT_HOLLOW = "without hollow golds"


@dataclass(frozen=True)
class Versus:
    """One model against the reference. p: of the exact test, adjusted for the number of models. others: the differences under
    every rule and without hollow golds, by name, with their adjusted p."""

    reference: Compared
    challenger: Compared
    pairs: list[Pair]
    found: Difference
    p: float
    others: dict[str, tuple[Difference, float]]

    @property
    def shown(self) -> bool:
        """Whether the exact test shows a difference."""
        return self.p < LEVEL


@dataclass(frozen=True)
class Comparison:
    """All models on the common questions. scores: as score.score has them, over these questions, in the order of `compared`."""

    compared: list[Compared]
    common: Common
    scores: list[Json]
    versus: list[Versus]
    notes: list[str]

    @property
    def reference(self) -> Compared:
        return self.compared[0]


def compare(given: Sequence[str], *, common: bool = False) -> Comparison:
    """given: what to compare, the reference first (compared.read_compared). common: on the common questions only. Raises
    UserError for what cannot be compared."""
    compared = read_all(given)
    questions = common_questions(compared, common=common)
    rows = [[one.rows[name] for name in questions.ids] for one in compared]
    pairs = [list(zip(rows[0], other, strict=True)) for other in rows[1:]]
    found = _with_holm([difference(each) for each in pairs])
    others = [{**differences_by_rule(each), WITHOUT_HOLLOW: difference(telling(each))} for each in pairs]
    adjusted = {
        name: _with_holm([each[name] for each in others]) for name in others[0] if all(name in o for o in others)
    }
    versus = [
        Versus(compared[0], one, each, *found[number], {name: values[number] for name, values in adjusted.items()})
        for number, (one, each) in enumerate(zip(compared[1:], pairs, strict=True))
    ]
    return Comparison(compared, questions, [score(each) for each in rows], versus, notes(compared, questions, rows))


def _with_holm(found: Sequence[Difference]) -> list[tuple[Difference, float]]:
    return list(zip(found, holm([one.p for one in found]), strict=True))


def conclusion(versus: Versus) -> str:
    """What the comparison shows, in one sentence."""
    found, first, second = versus.found, versus.reference.label, versus.challenger.label
    if found.won == found.lost == 0:
        return f"no difference: {second} and {first} are right on the same {found.both} of {found.questions} questions"
    if not versus.shown:
        return f"no difference shown between {second} and {first}: {figures(found, versus.p)}"
    text = f"{second} is {'better' if found.won > found.lost else 'worse'} than {first}: {figures(found, versus.p)}"
    if found.over_databases is None:
        return text + "; all questions are about one database, so nothing is shown for others"
    if found.databases < FEW_DATABASES:
        return text + f"; shown for these {found.databases} databases, too few to say it of others"
    if found.over_databases[0] <= 0 <= found.over_databases[1]:
        return text + "; shown for these databases, not for others: that interval includes 0"
    return text


def exceptions(versus: Versus) -> list[str]:
    """Where another rule, or leaving out hollow golds, leads to another conclusion."""
    said = []
    for name, (found, p) in versus.others.items():
        better = (found.won > found.lost) == (versus.found.won > versus.found.lost)
        if (p < LEVEL) != versus.shown or (versus.shown and not better):
            outcome = "no difference shown" if p >= LEVEL else "better" if found.won > found.lost else "worse"
            where = name if name == WITHOUT_HOLLOW else f"under the rule {name}"
            said.append(f"{where}: {outcome} ({figures(found, p)})")
    return said


def figures(found: Difference, p: float) -> str:
    over = found.over_databases if found.databases >= FEW_DATABASES else None
    databases = f", {signed(over)} over databases" if over else ""
    return (
        f"{100 * found.share:+.1f} points (95% interval {signed(found.over_questions)} over questions{databases}), "
        f"p {p_value(p)}, won {found.won}, lost {found.lost}"
    )


def signed(interval: tuple[float, float]) -> str:
    return points(interval, "+")


@dataclass(frozen=True)
class Group:
    """The questions of one group: how many each of the two answers correctly, and how many only one of them does."""

    questions: int
    reference: int
    challenger: int
    won: int
    lost: int


def groups(pairs: Sequence[Pair], key: Callable[[Row], str]) -> dict[str, Group]:
    by_name: dict[str, list[tuple[bool, bool]]] = {}
    for first, second in pairs:
        by_name.setdefault(key(second), []).append((is_right(first), is_right(second)))
    return {
        name: Group(
            len(found),
            sum(first for first, _ in found),
            sum(second for _, second in found),
            found.count((False, True)),
            found.count((True, False)),
        )
        for name, found in sorted(by_name.items())
    }


@dataclass(frozen=True)
class Errors:
    """How many answers of each have an error of one class; repaired: those of the reference that the other answers correctly;
    new: those of the other that the reference answers correctly."""

    reference: int
    challenger: int
    repaired: int
    new: int


def errors(pairs: Sequence[Pair]) -> dict[str, Errors]:
    """By error class, the most frequent first."""
    first, second, repaired, new = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for before, after in pairs:
        old, now = error_class(before), error_class(after)
        if old:
            first[old] += 1
            repaired[old] += now is None
        if now:
            second[now] += 1
            new[now] += old is None
    names = sorted({*first, *second}, key=lambda name: (-first[name] - second[name], name))
    return {name: Errors(first[name], second[name], repaired[name], new[name]) for name in names}


def as_json(comparison: Comparison) -> Json:
    """The content of compare.json. Accuracies, differences and intervals are fractions from -1 to 1; an interval over databases
    is null for fewer than two of them."""
    first = comparison.reference
    evaluation = first.evaluation
    return {
        "format": 1,
        "reference": first.label,
        "split": evaluation.get("split"),
        "rule": evaluation.get("rule"),
        "judging": first.judging,
        "questions": len(comparison.common.ids),
        "notes": comparison.notes,
        "models": [_model(one, scores) for one, scores in zip(comparison.compared, comparison.scores, strict=True)],
        "pairs": [_pair(versus) for versus in comparison.versus],
    }


def _model(one: Compared, scores: Json) -> Json:
    return {
        "label": one.label,
        "given": one.given,
        "model": one.scores.get("model"),
        "adapter": one.scores.get("adapter"),
        "prompt_version": one.evaluation.get("prompt_version"),
        "data_manifest_sha256": one.data,
        "questions_evaluated": len(one.rows),
        **{key: value for key, value in scores.items() if key not in ("new_tokens", "longest_prompt")},
    }


def _pair(versus: Versus) -> Json:
    by_difficulty = groups(versus.pairs, lambda row: row.difficulty)
    return {
        "reference": versus.reference.label,
        "challenger": versus.challenger.label,
        "conclusion": conclusion(versus),
        "exceptions": exceptions(versus),
        **_figures(versus.found, versus.p),
        "under": {name: _figures(found, p) for name, (found, p) in versus.others.items()},
        "by_difficulty": {name: asdict(group) for name, group in by_difficulty.items()},
        "by_database": {name: asdict(group) for name, group in groups(versus.pairs, lambda row: row.db_id).items()},
        "by_error_class": {name: asdict(found) for name, found in errors(versus.pairs).items()},
        "questions_won": [_question(pair) for pair in won(versus.pairs)],
        "questions_lost": [_question(pair) for pair in lost(versus.pairs)],
    }


def _figures(found: Difference, p: float) -> Json:
    return {
        **found.counts,
        "difference": found.share,
        "interval95": {"questions": found.over_questions, "databases": found.over_databases},
        "p": found.p,
        "p_holm": p,
    }


def won(pairs: Sequence[Pair]) -> list[Pair]:
    """The questions that only the second answers correctly."""
    return [pair for pair in pairs if is_right(pair[1]) and not is_right(pair[0])]


def lost(pairs: Sequence[Pair]) -> list[Pair]:
    return [pair for pair in pairs if is_right(pair[0]) and not is_right(pair[1])]


def _question(pair: Pair) -> dict[str, Any]:
    row = pair[1]
    return {
        "id": row.id,
        "db_id": row.db_id,
        "question": row.question,
        "difficulty": row.difficulty,
        "gold": row.gold,
        "reference": _answer(pair[0]),
        "challenger": _answer(pair[1]),
    }


def _answer(row: Row) -> dict[str, str | None]:
    sql = row.prediction or row.answer
    return {"sql": sql, "verdict": row.verdict, "error_class": error_class(row), "error": row.error}
