"""`finetune report`: a one-page report of a run."""

from __future__ import annotations

import argparse
from typing import Any

from finetune.cli.arguments import add_command, path, print_result
from finetune.errors import EXIT_OK
from finetune.stage_end.following import after_report
from finetune.stage_end.tell import cost_of_command, tell


def add(commands: Any) -> None:
    report = add_command(
        commands, "report", _report, "write report.html, report.md and summary.json", "finetune report runs/demo"
    )
    report.add_argument("run", type=path, metavar="RUN")


def _report(arguments: argparse.Namespace) -> int:
    from finetune.run_folder import RunFolder

    print_result(arguments.run)
    tell("report", cost_of_command(), after_report(RunFolder(arguments.run)))
    return EXIT_OK
