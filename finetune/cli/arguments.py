"""Shared by the commands: adding a parser, and reading a config with its overrides."""

from __future__ import annotations

import argparse
import gc
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError, shown
from finetune.runtime.console import typed_text
from finetune.runtime.paths import expanded

if TYPE_CHECKING:
    from finetune.config.schema import RunConfig
    from finetune.run_folder import RunFolder


OVERRIDES = "key=value pairs that override the config, such as training.num_train_epochs=1"


def add_command(
    commands: Any,
    name: str,
    command: Callable[[argparse.Namespace], int] | None,
    summary: str,
    example: str,
    *,
    continues: bool = False,
    hidden: bool = False,
) -> argparse.ArgumentParser:
    """hidden: the list of commands does not show it. continues: whether the command, interrupted at any time and called again,
    goes on with what it had: Ctrl-C exits 75."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        **({} if hidden else {"help": summary}),
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command, continues=continues)
    return parser


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=path, metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """Every command that prints a table has it; tests/cli/test_json.py asks for it."""
    parser.add_argument("--json", action="store_true", help=f"print {what} as JSON, and nothing else on stdout")


def loaded(arguments: argparse.Namespace, file: Path | None = None) -> RunConfig:
    """Raises UserError also for a config whose data are not prepared here, and whose sources are beside it: its paths count from
    the folder in which a command is typed."""
    from finetune.config.load import load_config
    from finetune.runtime.files import kind_of

    file = file or arguments.config
    config = load_config(file, arguments.overrides)
    folder = file.parent
    for source in config.data.sources if kind_of(Path(config.data.output_dir)) == "nothing" else ():
        if kind_of(Path(source.path)) == "nothing" != kind_of(folder / source.path):
            raise _other_folder(file, source.path, folder, f"the config {file.name}")
    return config


def opened(folder: Path, *, data: bool = True, model: bool = True) -> RunFolder:
    """A run. data, model: whether the command needs its prepared data, and its base model. Raises UserError if it is none, and
    where those are not here but in its project, from which the paths in its config count."""
    from finetune.run_folder import open_run

    run = open_run(folder)
    check_typed_in_project(run, data=data, model=model)
    return run


def check_typed_in_project(run: RunFolder, *, data: bool = True, model: bool = True) -> None:
    """Raises UserError, see `opened`."""
    from finetune.runtime.files import kind_of

    try:
        config = run.config()
    except UserError:
        return  # what reads it says so
    needed = [config.data.output_dir] * data + [config.model.name] * model
    place = Path(os.path.abspath(run.path))  # noqa: PTH100  (`..` as it was typed, links not followed)
    for path in (path for path in needed if kind_of(Path(path)) == "nothing"):
        for folder in place.parents[:-1]:
            if kind_of(folder / path) == "a folder":
                name = f"the run {shlex.quote(str(place.relative_to(folder)))}"
                raise _other_folder(run.path, path, Path(os.path.relpath(folder)), name)


def _other_folder(typed: Path, needed: str, folder: Path, name: str) -> UserError:
    return UserError(
        f"{typed}: {needed} is in {folder}, and paths count from the folder in which you type; "
        f"`cd {shlex.quote(str(folder))}`, and name {name}",
        code="config.other_folder",
    )


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {shown(text)}")
    return value


def whole_above_0(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < len(text) <= 12 and int(text)):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {shown(text)}")
    return int(text)


@contextmanager
def large_imports() -> Iterator[None]:
    """Disables garbage collection around the import of torch and transformers, where it took a fifth of the CPU time for half a
    million permanent objects; these are excluded from later collections too."""
    if "transformers" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def path(argument: str) -> Path:
    """A path as typed; `~` and variables in it are expanded, which the shell does not do in quotes. Raises UserError."""
    return Path(expanded(argument))


def text(argument: str) -> str:
    try:
        return typed_text(argument)
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError(f"expected text in UTF-8, found {argument!a}") from None


def print_result(folder: Path) -> dict[str, Any]:
    """Write a run's report; print its score and its path; add both where its training was logged.
    Returns the content of summary.json."""
    from finetune.report.render import write_report
    from finetune.report.source import read_run
    from finetune.run_folder import open_run
    from finetune.runtime.console import say
    from finetune.training.tracking.results import send_results

    run = open_run(folder)
    summary = write_report(run.path)
    before, after = summary["base_execution_accuracy"], summary["tuned_execution_accuracy"]
    if summary["questions"]:
        print(f"execution accuracy: {_percent(before)} before, {_percent(after)} after, on {summary['questions']} "
              f"{read_run(run.path).which_questions}")  # fmt: skip
    else:
        print("execution accuracy: unknown, because the run was not evaluated")
    print(f"report: {run.path / 'report.html'}")
    send_results(run, say)
    return summary


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"
