"""The command line: the only place that parses arguments and prints results. Heavy modules are imported by the
sub-command that needs them, so that --help is fast."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from finetune.cli import (
    ask,
    compare,
    completion,
    config,
    data,
    demo,
    doctor,
    evaluate,
    export,
    init,
    job,
    launch,
    machine,
    plan,
    report,
    runs,
    serve,
    sweep,
    train,
    watch,
)
from finetune.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_TRANSIENT,
    EXIT_USER_ERROR,
    LONGEST_MESSAGE,
    Interrupted,
    UserError,
    printable,
    shortened,
    shown,
)
from finetune.runtime.console import escape_unprintable, not_encoded, one_line, typed_text
from finetune.runtime.document import document_only
from finetune.runtime.files import disk_error
from finetune.runtime.installed import extra_of, install_command, version

COMPLETING = "_ARGCOMPLETE"
"""Set by the shell that asks for completions."""
OF_A_PATH = {
    *(errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
}
"""Errors of the system that a user can fix, because they are about a path. Any other one is a fault of this program or of the
machine, and keeps its traceback."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 something is missing, 2 user error, 75 interrupted and to be continued by
    the same command, 130 interrupted with nothing kept."""
    escape_unprintable()
    continues = False
    try:
        parsed = _parse(arguments)
        continues = parsed.continues
        _quiet_libraries()
        with document_only(getattr(parsed, "json", False)):
            code: int = parsed.command(parsed)
        sys.stdout.flush()  # here, where a broken pipe is caught
        return code
    except UserError as error:
        print(f"finetune: {one_line(str(error))}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        extra = extra_of(error.name or "")
        if extra is None:
            raise
        print(f"finetune: {error.name} is not installed; run `{install_command(extra)}`", file=sys.stderr)
        return EXIT_USER_ERROR
    except UnicodeEncodeError as error:
        print(f"finetune: {not_encoded(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output, such as `head`, has exited
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_OK
        if error.errno not in OF_A_PATH or error.filename is None:
            raise
        print(f"finetune: {one_line(str(disk_error(error, Path(os.fsdecode(error.filename)))))}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Interrupted as error:
        print(f"finetune: interrupted: {one_line(str(error))}", file=sys.stderr)
        return EXIT_TRANSIENT if error.resumable or continues else error.code
    except KeyboardInterrupt:
        print("finetune: interrupted", file=sys.stderr)
        return EXIT_TRANSIENT if continues else EXIT_INTERRUPTED


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Also accepts KEY=VALUE pairs after an option, which argparse alone does not."""
    parser = _parser()
    if COMPLETING in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)  # prints what fits, and ends the process
    parsed, rest = parser.parse_known_args(arguments)
    parsed.typed = list(sys.argv[1:] if arguments is None else arguments)
    if rest and not (hasattr(parsed, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {shortened(printable(' '.join(rest)), LONGEST_MESSAGE)}")
    if rest:
        parsed.overrides += rest
    if hasattr(parsed, "overrides"):  # values for a config, which is UTF-8 everywhere
        try:
            parsed.overrides = [typed_text(word) for word in parsed.overrides]
        except UnicodeDecodeError as error:
            parser.error(f"KEY=VALUE: expected text in UTF-8, found {shown(error.object)}")
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="finetune",
        description="Fine-tune a model for text-to-SQL, and measure what it learned.",
        epilog="example:\n  finetune train configs/demo_cpu.yaml\n  finetune evaluate runs/demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"finetune {version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (
        *(init, doctor, data, config, plan, launch, machine, train, sweep, evaluate, compare),
        *(demo, report, runs, watch, ask, export, serve, completion, job),
    ):
        command.add(commands)
    return parser


def _quiet_libraries() -> None:
    """Reduces the log output of libraries; variables that the user has set take precedence."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # on a CPU it warns of a missing hub kernel that we do not use
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL would report usage to the hub


class _Callable(ModuleType):
    """`from finetune.cli import main; main()` is the console script of an environment that was installed while finetune/cli.py
    was one file. It imports this module in place of the function, and would otherwise fail after a `git pull` until the
    next `make setup`."""

    def __call__(self) -> int:
        return main()


sys.modules[__name__].__class__ = _Callable
