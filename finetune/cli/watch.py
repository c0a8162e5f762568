"""`finetune watch`: how a run is doing, here or in a bucket, until Ctrl-C."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cli.arguments import add_command, add_json, positive, text
from finetune.cli.runs import GOOGLE
from finetune.errors import EXIT_OK, UserError
from finetune.runtime.console import one_line
from finetune.runtime.document import print_document
from finetune.runtime.paths import expanded

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

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
        "--once",
        action="store_true",
        help="print it once; also what happens where stdout is no terminal, or one that cannot move its cursor",
    )
    add_json(watch, "one look")
    watch.add_argument(
        "--every", type=positive, metavar="SECONDS",
        help=f"between two looks ({EVERY_SECONDS:g}; {EVERY_SECONDS_IN_A_BUCKET:g} for a bucket)",
    )  # fmt: skip


def _watch(arguments: argparse.Namespace) -> int:
    from finetune.report.watch import as_json, lines

    look = _looker(arguments.run)
    seen = look()
    if arguments.json:
        print_document(as_json(seen))
        return EXIT_OK
    if arguments.once or not sys.stdout.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        width = max(len(label) for label, _ in lines(seen))
        print("\n".join(f"{label:<{width}}  {text}" for label, text in lines(seen)))
        return EXIT_OK
    in_bucket = arguments.run.startswith(GOOGLE)
    every = arguments.every or (EVERY_SECONDS_IN_A_BUCKET if in_bucket else EVERY_SECONDS)
    return _live(arguments.run, look, seen, every)


def _live(name: str, look: Callable[[], Watched], seen: Watched, every: float) -> int:
    from rich.console import Console
    from rich.live import Live

    problem, console = "", Console()
    with Live(_fitting(console, name, seen, problem), console=console, auto_refresh=False) as screen:
        try:
            while True:
                time.sleep(every)
                try:
                    seen, problem = look(), ""
                except UserError as error:  # the bucket does not answer for once, or a file is being replaced
                    problem = one_line(str(error))
                screen.update(_fitting(console, name, seen, problem), refresh=True)
        except KeyboardInterrupt:
            return EXIT_OK


def _fitting(console: Console, name: str, seen: Watched, problem: str) -> RenderableType:
    """With as many attempts as the terminal has room for, which may have been resized."""
    from finetune.report.watch import MOST_ATTEMPTS

    panels = [_panel(name, seen, problem, most) for most in range(MOST_ATTEMPTS, 0, -1)]
    return next((panel for panel in panels if len(console.render_lines(panel)) < console.height), panels[-1])


def _panel(name: str, seen: Watched, problem: str, most: int) -> RenderableType:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from finetune.report.watch import lines

    grid = Table.grid(padding=(0, 2))
    for label, said in [*lines(seen, most), *([("last look", problem)] if problem else [])]:
        grid.add_row(Text(label, style="bold"), Text(said, style=_colour(label, said)))
    return Panel(grid, title=Text(one_line(name)), title_align="left")


def _colour(label: str, said: str) -> str:
    """rich leaves it out where NO_COLOR is set. The text says the same without it."""
    if label in ("problem", "last look") or said.startswith("failed"):
        return "red"
    if "it may be gone" in said or "it will stop at the ceiling" in said:
        return "yellow"
    return "green" if label == "status" and said.startswith(("running", "done")) else ""


def _looker(place: str) -> Callable[[], Watched]:
    """What looks at the run. Raises UserError if there is none."""
    from finetune.report.watch import look
    from finetune.run_folder import open_run

    if place.startswith(GOOGLE):
        from finetune.cloud.gcloud.bucket_files import OF_ONE_RUN, copy_small_files

        return lambda: look(copy_small_files(place, re.compile(OF_ONE_RUN)), time.time())
    folder = open_run(Path(expanded(place))).path
    return lambda: look(folder, time.time())
