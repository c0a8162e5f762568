"""`finetune runs`: all runs of a folder or a bucket in one table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from finetune.cli.arguments import add_command, add_json, text
from finetune.errors import EXIT_OK
from finetune.runtime.document import print_document
from finetune.runtime.paths import expanded

GOOGLE = "gs://"


def add(commands: Any) -> None:
    runs = add_command(
        commands,
        "runs",
        _runs,
        "show all runs of a folder or a bucket: status, score, dollars",
        "finetune runs\n  finetune runs gs://my-bucket/runs --sort score\n  finetune runs --json",
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


def _runs(arguments: argparse.Namespace) -> int:
    from finetune.report.runs import in_order, rows_of, table

    rows = in_order(rows_of(_folder(arguments.folder)), arguments.sort)
    if arguments.json:
        print_document([row.as_dict() for row in rows])
    else:
        print("\n".join(table(rows)))
    return EXIT_OK


def _folder(place: str) -> Path:
    """The local folder; that of a bucket is copied, without what is large."""
    if not place.startswith(GOOGLE):
        return Path(expanded(place))
    from finetune.cloud.gcloud.bucket_files import copy_small_files

    return copy_small_files(place)
