"""`finetune watch`: how a run is doing, here or in a bucket, until Ctrl-C."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cli.arguments import add_command, positive, text
from finetune.cli.runs import GOOGLE
from finetune.errors import EXIT_OK, UserError
from finetune.runtime.console import one_line
from finetune.runtime.paths import expanded

if TYPE_CHECKING:
    from rich.console import RenderableType

    from finetune.report.watch import Watched

EVERY_SECONDS, EVERY_SECONDS_IN_A_BUCKET = 2.0, 15.0


def add(commands: Any) -> None:
    watch = add_command(
        commands,
        "watch",
        _watch,
        "show how a run is doing: loss, speed, dollars, attempts; Ctrl-C ends it",
        "finetune watch runs/demo\n  finetune watch gs://my-bucket/runs/NAME",
    )
    watch.add_argument("run", type=text, metavar="RUN|gs://BUCKET/runs/NAME")
    watch.add_argument(
        "--once", action="store_true", help="print it once; also what happens where stdout is no terminal"
    )
    watch.add_argument(
        "--every", type=positive, metavar="SECONDS",
        help=f"between two looks ({EVERY_SECONDS:g}; {EVERY_SECONDS_IN_A_BUCKET:g} for a bucket)",
    )  # fmt: skip


def _watch(arguments: argparse.Namespace) -> int:
    from finetune.report.watch import lines

    look = _looker(arguments.run)
    seen = look()
    if arguments.once or not sys.stdout.isatty():
        width = max(len(label) for label, _ in lines(seen))
        print("\n".join(f"{label:<{width}}  {text}" for label, text in lines(seen)))
        return EXIT_OK
    in_bucket = arguments.run.startswith(GOOGLE)
    every = arguments.every or (EVERY_SECONDS_IN_A_BUCKET if in_bucket else EVERY_SECONDS)
    return _live(arguments.run, look, seen, every)


def _live(name: str, look: Callable[[], Watched], seen: Watched, every: float) -> int:
    from rich.live import Live

    problem = ""
    with Live(_panel(name, seen, problem), auto_refresh=False) as screen:
        try:
            while True:
                time.sleep(every)
                try:
                    seen, problem = look(), ""
                except UserError as error:  # the bucket does not answer for once, or a file is being replaced
                    problem = one_line(str(error))
                screen.update(_panel(name, seen, problem), refresh=True)
        except KeyboardInterrupt:
            return EXIT_OK


def _panel(name: str, seen: Watched, problem: str) -> RenderableType:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from finetune.report.watch import lines

    grid = Table.grid(padding=(0, 2))
    for label, said in [*lines(seen), *([("last look", problem)] if problem else [])]:
        grid.add_row(Text(label, style="bold"), Text(said))
    return Panel(grid, title=Text(one_line(name)), title_align="left")


def _looker(place: str) -> Callable[[], Watched]:
    """What looks at the run. Raises UserError if there is none."""
    from finetune.report.watch import look
    from finetune.run_folder import open_run

    if place.startswith(GOOGLE):
        from finetune.cloud.gcloud.bucket_files import OF_ONE_RUN, copy_small_files

        return lambda: look(copy_small_files(place, re.compile(OF_ONE_RUN)), time.time())
    folder = open_run(Path(expanded(place))).path
    return lambda: look(folder, time.time())
