"""`finetune init`: from a database, a file of questions or a known set to a project whose next commands work."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from typing import Any

from finetune.cli.arguments import add_command, path, text
from finetune.errors import EXIT_OK
from finetune.runtime.console import say, visible
from finetune.stage_end.tell import cost_of_command, program, tell


def add(commands: Any) -> None:
    init = add_command(
        commands,
        "init",
        _init,
        "start a project: look at your data, choose the values, write config and tasks, and say what to type next",
        "finetune init shop --db shop.sqlite\n"
        "  finetune init shop --data pairs.csv --db schema.sql --goal fast\n"
        "  finetune init spider --data premai-io/spider --yes",
    )
    init.add_argument(
        "folder", nargs="?", type=path, metavar="FOLDER", help="a new folder (default: named after the data)"
    )
    init.add_argument(
        "--db",
        type=path,
        metavar="FILE",
        help="SQLite file, folder of <db_id>/<db_id>.sqlite, or schema as .sql (pg_dump)",
    )
    init.add_argument(
        "--data",
        type=text,
        metavar="FILE",
        help="questions with their SQL: CSV, TSV, JSON, JSONL, parquet; a Spider folder or hub id",
    )
    init.add_argument("--goal", choices=("cheap", "fast"), help="fewest dollars, or fewest hours (default: cheap)")
    init.add_argument("--yes", "-y", action="store_true", help="ask nothing")
    init.add_argument(
        "--column", action="append", default=[], type=text, metavar="FIELD=NAME",
        help="which column of --data is which: question, sql, schema, db_id, evidence, split, id",
    )  # fmt: skip
    init.add_argument(
        "--dialect", metavar="NAME", help="of the SQL, such as postgres (default: that of --db, else by trying)"
    )
    init.add_argument("--encoding", metavar="NAME", help="of a CSV that is not UTF-8, such as windows-1252")
    init.add_argument(
        "--drafts", type=_count, default=100, metavar="N",
        help="pairs that OPENAI_MODEL at OPENAI_BASE_URL drafts for a database without questions (default: 100; 0: none)",
    )  # fmt: skip


def _count(typed: str) -> int:
    if not (typed.isascii() and typed.isdecimal() and len(typed) <= 5):
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 or more, found {typed[:20]!r}")
    return int(typed)


def _init(arguments: argparse.Namespace) -> int:
    from finetune.init.ask import asker
    from finetune.init.look import Wanted
    from finetune.init.run import cd_command, init

    wanted = Wanted(
        arguments.folder, arguments.db, arguments.data, arguments.goal, arguments.column, arguments.dialect, arguments.encoding,
        arguments.drafts,
    )  # fmt: skip
    made = init(wanted, asker(yes=arguments.yes), say)
    for line in made.said:
        print(visible(line, one_line=True))
    for name in made.kept:
        print(f"kept as you have changed it: {made.folder / name}")
    print(f"{made.folder}: written")
    if made.by_hand:
        print(visible(f"first {made.by_hand}", one_line=True))
    print("next:")
    for command in filter(None, [cd_command(made.folder)]):
        print(f"  {command}")
    ours = shlex.quote(program("finetune", made.folder))
    for command, why in made.commands:
        typed = re.sub(r"(^|&& )finetune ", lambda found: f"{found[1]}{ours} ", command)
        print(visible(f"  {typed}   ({why})", one_line=True))
    sys.stdout.flush()
    tell("init", cost_of_command())
    return EXIT_OK
