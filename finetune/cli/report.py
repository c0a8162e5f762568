"""`finetune report`: a one-page report of a run."""

from __future__ import annotations

import argparse
from typing import Any

from finetune.cli.arguments import add_command, add_json, path, print_result
from finetune.errors import EXIT_OK
from finetune.runtime.document import print_document
from finetune.stage_end.following import after_report
from finetune.stage_end.tell import cost_of_command, tell

BASIS = {
    **dict.fromkeys(("minutes", "peak_memory_gib", "tokens_per_second", "questions"), "measured"),
    "spent_usd": "measured seconds x the machine's price",
}


def add(commands: Any) -> None:
    report = add_command(
        commands, "report", _report, "write report.html, report.md and summary.json", "finetune report runs/demo"
    )
    report.add_argument("run", type=path, metavar="RUN")
    add_json(report, "summary.json, and where its figures come from,")


def _report(arguments: argparse.Namespace) -> int:
    from finetune.run_folder import RunFolder

    summary = print_result(arguments.run)
    if arguments.json:
        print_document(summary | {"basis": BASIS})
    tell("report", cost_of_command(), after_report(RunFolder(arguments.run)))
    return EXIT_OK
