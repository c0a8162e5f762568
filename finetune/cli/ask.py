"""`finetune generate`: one question, answered with SQL."""

from __future__ import annotations

import argparse
from typing import Any

from finetune.cli.arguments import add_command, path, text
from finetune.errors import EXIT_OK, UserError


def add(commands: Any) -> None:
    generate = add_command(
        commands,
        "generate",
        _generate,
        "answer one question with SQL",
        'finetune generate runs/demo --db shop.sqlite --run "Which customers ordered twice in May?"',
    )
    generate.add_argument("run_folder", type=path, metavar="RUN")
    generate.add_argument("question", type=text, metavar="QUESTION")
    generate.add_argument(
        "--db", type=path, required=True, metavar="FILE", help="a SQLite file, or a schema as .sql file, in any dialect"
    )
    generate.add_argument("--run", action="store_true", help="also run the SQL, read-only, and print the rows")
    generate.add_argument(
        "--evidence", type=text, metavar="TEXT", help="a hint that the prompt shows with the question"
    )
    generate.add_argument(
        "--dialect", type=text, metavar="NAME", help="the SQL dialect to ask for; without it, that of the run's data"
    )
    generate.add_argument("--base", action="store_true", help="ask the base model instead of the tuned one")


def _generate(arguments: argparse.Namespace) -> int:
    from finetune.run_folder import open_run

    run = open_run(arguments.run_folder)
    from finetune.data.limits import limits_of
    from finetune.evaluation.ask import ask, asked_dialect, is_schema, require_engine, run_and_format
    from finetune.runtime.console import visible

    if arguments.run and is_schema(arguments.db):
        raise UserError(
            f"{arguments.db}: a schema has no rows; give a SQLite file to --db to use --run",
            code="cli.conflicting_options",
        )
    dialect = asked_dialect(run, arguments.db, arguments.dialect)
    if arguments.run:
        require_engine(arguments.db, dialect)
    sql = ask(run, arguments.db, arguments.question, evidence=arguments.evidence, base=arguments.base, dialect=dialect)
    print(visible(sql))
    if arguments.run:
        evaluation = run.config().evaluation
        print(run_and_format(arguments.db, sql, evaluation.timeout_seconds, limits_of(evaluation)))
    return EXIT_OK
