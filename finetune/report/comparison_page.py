"""Writes a comparison: compare.json, and compare.html with the same tables on one page that looks like a run's report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UserError
from finetune.evaluation.error_classes import ERROR_CLASSES
from finetune.evaluation.paired import Pair, error_class
from finetune.evaluation.questions import short_hash
from finetune.evaluation.score import Row
from finetune.report.bars import LEVELS, OF_DIFFICULTY, Bar
from finetune.report.bars import Group as Bars
from finetune.report.certainty import p_value, points
from finetune.report.comparison import (
    Comparison,
    Errors,
    Group,
    Versus,
    as_json,
    conclusion,
    errors,
    exceptions,
    groups,
    lost,
    signed,
    won,
)
from finetune.report.examples import Answer, clipped
from finetune.report.pages import pages
from finetune.report.plots import Interval, Plot, draw_differences
from finetune.report.render import WILSON, Tile
from finetune.runtime.files import as_text, kind_of, write_json, write_text

MOST_LISTED = 200
"""Questions that the page shows of those won, and of those lost; compare.json has all."""


@dataclass(frozen=True)
class Listed:
    """Questions with the gold query and both answers. total: with those that are not shown."""

    title: str
    total: int
    shown: list[tuple[Row, list[Answer]]]


@dataclass(frozen=True)
class Section:
    """One model against the reference."""

    versus: Versus
    conclusion: str
    exceptions: list[str]
    bars: list[Bars]
    differences: list[tuple[str, str, str, str, int, int, str]]
    tables: list[tuple[str, list[tuple[str, Group]]]]
    errors: list[tuple[str, Errors]]
    lists: list[Listed]


def write_comparison(comparison: Comparison, folder: Path | None = None) -> Path:
    """Write compare.html and compare.json into the folder, by default comparisons/<a>-vs-<b>, replacing those of an earlier
    comparison. Returns the folder. Raises UserError if it cannot be written."""
    folder = folder or default_folder(comparison)
    if kind_of(folder) not in ("a folder", "nothing"):
        raise UserError(f"{as_text(folder)}: is {kind_of(folder)}; choose a folder", code="compare.output_taken")
    text = page(comparison)
    write_json(folder / "compare.json", as_json(comparison))
    write_text(folder / "compare.html", text)
    return folder


def default_folder(comparison: Comparison) -> Path:
    """comparisons/<a>-vs-<b>, of names that any file system takes; with a hash where names were cut or left out, so that another
    comparison gets another folder."""
    names = ["".join(c if c.isalnum() or c in "._-" else "-" for c in one.label) for one in comparison.compared]
    short = "-vs-".join(name.lstrip(".-")[:30] or "model" for name in names[:4])
    places = [str(one.folder.resolve()) for one in comparison.compared]
    cut = len(names) > 4 or any(len(name) > 30 for name in names)
    return Path("comparisons") / (f"{short}-{short_hash([names, places])[:8]}" if cut else short)


def page(comparison: Comparison) -> str:
    """compare.html."""
    content = {
        "comparison": comparison,
        "evaluation": comparison.reference.evaluation,
        "tiles": _tiles(comparison),
        "titles": {name: one.title for name, one in ERROR_CLASSES.items()},
        "plot": _differences_plot(comparison),
        "sections": [_section(versus) for versus in comparison.versus],
    }
    return pages().get_template("compare.html.j2").render(content)


def _tiles(comparison: Comparison) -> list[Tile]:
    return [
        Tile(
            one.label,
            f"{scores['execution_accuracy']:.1%}",
            f"{scores['correct']} of {scores['questions']} questions, 95% interval "
            f"{points(scores['execution_accuracy_interval95'])}",
            "measured",
        )
        for one, scores in zip(comparison.compared, comparison.scores, strict=True)
    ]


def _differences_plot(comparison: Comparison) -> Plot:
    return draw_differences(
        f"Difference to {comparison.reference.label}",
        [
            Interval(
                versus.challenger.label,
                100 * versus.found.share,
                _hundredfold(versus.found.over_questions),
                versus.found.over_databases and _hundredfold(versus.found.over_databases),
            )
            for versus in comparison.versus
        ],
    )


def _hundredfold(interval: tuple[float, float]) -> tuple[float, float]:
    return 100 * interval[0], 100 * interval[1]


def _section(versus: Versus) -> Section:
    by_difficulty = groups(versus.pairs, lambda row: row.difficulty)
    levels = sorted(by_difficulty.items(), key=lambda item: LEVELS.index(item[0]) if item[0] in LEVELS else len(LEVELS))
    databases = list(groups(versus.pairs, lambda row: row.db_id).items())
    titles = ("By difficulty", "By database")
    labels = versus.reference.label, versus.challenger.label
    bars = [
        Bars(title, WILSON, _bars(found), labels, note)
        for title, found, note in zip(titles, (levels, databases), (OF_DIFFICULTY, ""), strict=True)
    ]
    return Section(
        versus=versus,
        conclusion=conclusion(versus),
        exceptions=exceptions(versus),
        bars=bars,
        differences=_differences(versus),
        tables=list(zip(titles, (levels, databases), strict=True)),
        errors=list(errors(versus.pairs).items()),
        lists=[_listed("Won", versus, won(versus.pairs)), _listed("Lost", versus, lost(versus.pairs))],
    )


def _bars(found: Sequence[tuple[str, Group]]) -> list[Bar]:
    return [Bar(name, group.questions, group.reference, group.challenger) for name, group in found]


def _differences(versus: Versus) -> list[tuple[str, str, str, str, int, int, str]]:
    rule = str(versus.reference.evaluation.get("rule"))
    all_of_them = {f"{rule} (chosen)": (versus.found, versus.p), **versus.others}
    all_of_them.pop(rule, None)
    return [
        (
            name,
            f"{100 * found.share:+.1f}",
            signed(found.over_questions),
            signed(found.over_databases) if found.over_databases else "–",
            found.won,
            found.lost,
            p_value(p).removeprefix("= "),
        )
        for name, (found, p) in all_of_them.items()
    ]


def _listed(title: str, versus: Versus, pairs: Sequence[Pair]) -> Listed:
    names = versus.reference.label, versus.challenger.label
    return Listed(title, len(pairs), [(pair[1], _answers(names, pair)) for pair in pairs[:MOST_LISTED]])


def _answers(names: tuple[str, str], pair: Pair) -> list[Answer]:
    answers = [Answer("gold", clipped(pair[0].gold))]
    for name, row in zip(names, pair, strict=True):
        text = clipped(row.prediction or row.answer or "(nothing)")
        answers.append(Answer(name, text, error_class(row) or row.verdict, clipped(row.error or "")))
    return answers
