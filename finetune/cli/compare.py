"""`finetune compare`: which of several evaluated models is better, and whether that can be said."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cli.arguments import add_command, add_json, path, text
from finetune.errors import EXIT_OK, UserError
from finetune.runtime.commands import as_command
from finetune.runtime.console import visible
from finetune.runtime.document import print_document
from finetune.stage_end.following import after_comparison
from finetune.stage_end.tell import cost_of_command, finetune, tell

if TYPE_CHECKING:
    from finetune.report.comparison import Comparison
    from finetune.report.sweep import SweepReport


def add(commands: Any) -> None:
    compare = add_command(
        commands,
        "compare",
        _compare,
        "compare evaluated models with the first one by an exact paired test",
        "finetune compare runs/a runs/b\n  finetune compare runs/a:base runs/a runs/predictions/theirs\n"
        "  finetune compare runs/a runs/b --common   (on the questions that both were asked)\n"
        "  finetune compare runs/sweeps/a   (the table of a sweep's trials)",
    )
    compare.description = (
        f"{compare.description} Writes compare.html and compare.json: the difference with its intervals, by difficulty, database "
        "and error class, and every question won and lost."
    )
    compare.add_argument(
        "compared",
        nargs="+",
        type=text,
        metavar="RUN|RUN:MODEL|RESULT|SWEEP",
        help="the reference first: a run's folder (its tuned model), RUN:base, RUN:vote, RUN:retry, RUN:NAME of predictions "
        "judged for the run, or the folder of a result of `evaluate CONFIG --predictions`; "
        "or one folder of a sweep alone",
    )
    compare.add_argument(
        "--common",
        action="store_true",
        help="leave out the questions that are not the same for all, instead of refusing",
    )
    add_json(compare, "compare.json, or the table of the sweep,")
    compare.add_argument("--output", type=path, metavar="FOLDER", help="without it, comparisons/<a>-vs-<b>")


def _compare(arguments: argparse.Namespace) -> int:
    if len(arguments.compared) == 1 and (report := _sweep_report(arguments.compared[0])):
        if arguments.json:
            print_document(report.as_json())
        else:
            print("\n".join(visible(line, one_line=True) for line in _sweep_table(report)))
        return EXIT_OK
    if len(arguments.compared) < 2:
        raise UserError("compare: expected two or more, the reference first", code="cli.conflicting_options")
    from finetune.report.comparison import as_json, compare
    from finetune.report.comparison_page import write_comparison

    comparison = compare(arguments.compared, common=arguments.common)
    folder = write_comparison(comparison, arguments.output)
    if arguments.json:
        print_document(as_json(comparison))
    for line in [] if arguments.json else _summary(comparison):
        print(visible(line, one_line=True))
    print(f"comparison: {folder / 'compare.html'}")
    accuracies = [scores["execution_accuracy"] for scores in comparison.scores]
    tell("compare", cost_of_command(), after_comparison([one.given for one in comparison.compared], accuracies))
    return EXIT_OK


def _sweep_report(given: str) -> SweepReport | None:
    """Of a sweep, if the folder is one's; it is written anew."""
    from finetune.report.sweep import is_sweep, write_sweep
    from finetune.runtime.paths import expanded

    folder = Path(expanded(given))
    return write_sweep(folder) if is_sweep(folder) else None


def _sweep_table(report: SweepReport) -> list[str]:
    """The runs are named by a path that works from here, wherever the sweep's folder was named from."""
    runs = report.page.parents[3]
    here = Path.cwd()
    shown = runs.relative_to(here) if runs.is_relative_to(here) else runs
    scored = [shown / row.run for row in report.rows if row.accuracy is not None]
    again = finetune("compare", *scored, why="").here()
    more = [f"the scored ones, question by question: {as_command(*again.words)}"] if len(scored) > 1 else []
    return [*report.lines, *more, f"report: {report.page}"]


def _summary(comparison: Comparison) -> list[str]:
    from finetune.report.certainty import points
    from finetune.report.comparison import conclusion, exceptions
    from finetune.runtime.table import aligned

    rows = [
        (
            one.label,
            f"{scores['execution_accuracy']:.1%}",
            f"{scores['correct']} of {scores['questions']}",
            f"95% interval {points(scores['execution_accuracy_interval95'])}",
            "reference" if one is comparison.reference else "",
        )
        for one, scores in zip(comparison.compared, comparison.scores, strict=True)
    ]
    several = len(comparison.versus) > 1
    lines = [
        *aligned([tuple(visible(cell, one_line=True) for cell in row) for row in rows], "lrr l"),
        *comparison.common.left_out,
    ]
    for versus in comparison.versus:
        lines.append(conclusion(versus))
        lines += [f"  {text}" for text in exceptions(versus)]
    if several:
        lines.append(f"p adjusted for {len(comparison.versus)} comparisons with {comparison.reference.label} (Holm)")
    return lines
