"""`finetune demo`: the whole workflow within a given number of minutes."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cli.arguments import add_command, add_config, large_imports, loaded, positive, print_result
from finetune.errors import EXIT_OK, EXIT_TRANSIENT
from finetune.stage_end.following import DEMO_MINUTES, after_demo, after_stopped_demo, is_make_demo
from finetune.stage_end.tell import cost_of_command, tell

if TYPE_CHECKING:
    from finetune.config.schema import RunConfig
    from finetune.run_folder import RunFolder

LONGER_MINUTES = 30


def add(commands: Any) -> None:
    demo = add_command(
        commands,
        "demo",
        _demo,
        "score, train, score again and report, within about the given minutes on any machine",
        "finetune demo configs/demo_cpu.yaml --minutes 10",
        continues=True,
    )
    add_config(demo)
    demo.add_argument(
        "--minutes",
        type=positive,
        default=DEMO_MINUTES,
        metavar="N",
        help="how long it may take; the speed of this machine determines what fits (default: 10)",
    )


def _demo(arguments: argparse.Namespace) -> int:
    deadline = time.monotonic() + 60 * arguments.minutes
    config = loaded(arguments)
    from finetune.runtime.console import broken_pipe_safe, say

    say("loading torch and transformers, up to a minute on a busy machine")
    with large_imports():
        from finetune.demo.run import run_demo

    try:
        with broken_pipe_safe():
            code = run_demo(config, arguments.config, deadline)
    except KeyboardInterrupt:
        _stopped(arguments, config)
        raise
    if code == EXIT_TRANSIENT:
        _stopped(arguments, config)
    if code == EXIT_OK:
        from finetune.run_folder import RunFolder

        folder = Path(config.training.output_dir) / str(config.training.run_name)
        print_result(folder)
        _say_what_it_saw(RunFolder(folder), arguments)
        tell("demo", cost_of_command(config.budget.usd_per_hour), after_demo(RunFolder(folder)))
    return code


def _say_what_it_saw(run: RunFolder, arguments: argparse.Namespace) -> None:
    """What part of the training examples the run was trained on, and how to train on more of them."""
    from finetune.report.caveats import seen_examples
    from finetune.runtime.console import say

    found = seen_examples(run.record())
    if found is None:
        return
    longer = math.ceil(max(LONGER_MINUTES, 2 * arguments.minutes))
    again = f"another training.run_name with --minutes {longer}"
    if is_make_demo(arguments.config, arguments.overrides):
        again = f"`make demo-fresh DEMO_MINUTES={longer}`"
    more = f"; {again} trains on more" if found.less_than_an_epoch else ""
    say(f"trained on {found} (measured){more}")


def _stopped(arguments: argparse.Namespace, config: RunConfig) -> None:
    following = after_stopped_demo(arguments.config, arguments.overrides, arguments.minutes, arguments.typed)
    tell("demo", cost_of_command(config.budget.usd_per_hour), following)
