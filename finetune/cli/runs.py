"""`finetune runs`: all runs of a folder or a bucket in one table, or on one page."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from finetune.cli.arguments import add_command, add_json, path, text
from finetune.errors import EXIT_OK, UserError
from finetune.runtime.document import print_document
from finetune.runtime.paths import expanded

GOOGLE = "gs://"


def add(commands: Any) -> None:
    runs = add_command(
        commands,
        "runs",
        _runs,
        "show all runs of a folder or a bucket: status, score, dollars",
        "finetune runs\n  finetune runs gs://my-bucket/runs --sort score\n  finetune runs --json\n"
        "  finetune runs --html   (a page with filters, dollars against accuracy, and any two runs compared)",
    )
    runs.add_argument(
        "folder", nargs="?", type=text, default="runs", metavar="FOLDER|gs://BUCKET/runs", help="without it, runs"
    )
    runs.add_argument(
        "--sort",
        choices=("started", "name", "score", "usd", "point"),
        default="started",
        help="started: the newest first; name; score: the best first; usd, and point, dollars a point gained: the cheapest first",
    )
    add_json(runs, "a list with nothing cut")
    runs.add_argument(
        "--html", action="store_true", help="write index.html into the folder: one page, without a network"
    )
    runs.add_argument(
        "--output",
        type=path,
        metavar="FILE",
        help="of --html; without it, FOLDER/index.html, or for a bucket the same in its copy on this computer",
    )


def _runs(arguments: argparse.Namespace) -> int:
    from finetune.report.runs import in_order, rows_of, table

    if arguments.output and not arguments.html:
        raise UserError("--output: belongs to --html; add --html, or leave it out", code="cli.conflicting_options")
    if arguments.json and arguments.html:
        raise UserError("--json and --html: expected one of them", code="cli.conflicting_options")
    folder = _folder(arguments.folder, whole=arguments.html)
    rows = in_order(rows_of(folder), arguments.sort)
    if arguments.html:
        from finetune.report.runs_page import write_runs_page

        print(f"page: {write_runs_page(folder, rows, arguments.output)}")
    elif arguments.json:
        print_document([row.as_dict() for row in rows])
    else:
        print("\n".join(table(rows)))
    return EXIT_OK


def _folder(place: str, *, whole: bool) -> Path:
    """The local folder; that of a bucket is copied, without what is large. whole: with reports and answers, for a page."""
    if not place.startswith(GOOGLE):
        return Path(expanded(place))
    from finetune.cloud.gcloud.bucket_files import copy_small_files

    if not whole:
        return copy_small_files(place)
    from finetune.report.runs_page import OF_A_PAGE

    return copy_small_files(place, re.compile(f"[^/]+/{OF_A_PAGE}"))
