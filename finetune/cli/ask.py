"""`finetune ask`: one question, answered with SQL by a run, an export or an endpoint; `finetune generate` until now."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cli.arguments import (
    add_command,
    add_json,
    check_typed_in_project,
    large_imports,
    path,
    text,
    whole_above_0,
)
from finetune.errors import EXIT_OK, UserError
from finetune.runtime.document import print_document

if TYPE_CHECKING:
    from finetune.evaluation.ask import Rows


def add(commands: Any) -> None:
    for name in ("ask", "generate"):
        ask = add_command(
            commands,
            name,
            _ask,
            "answer one question with SQL",
            f'finetune {name} runs/demo --db shop.sqlite --execute "Which customers ordered twice in May?"\n'
            f'  finetune {name} http://127.0.0.1:8000 --db shop "Which customers ordered twice in May?"',
            hidden=name == "generate",
        )
        ask.set_defaults(option="--execute" if name == "ask" else "--run")
        _add_arguments(ask)


def _add_arguments(ask: argparse.ArgumentParser) -> None:
    ask.add_argument("target", metavar="RUN|EXPORT|URL", help="URL: of `finetune serve`")
    ask.add_argument("question", type=text, metavar="QUESTION")
    ask.add_argument(
        "--db", required=True, metavar="FILE|NAME",
        help="a SQLite file, or a schema as .sql file, in any dialect; with a URL also the name of a database there",
    )  # fmt: skip
    ask.add_argument("--execute", "--run", action="store_true", help="also run the SQL, read-only, and print the rows")
    ask.add_argument("--evidence", type=text, metavar="TEXT", help="a hint that the prompt shows with the question")
    ask.add_argument(
        "--dialect", type=text, metavar="NAME", help="the SQL dialect to ask for; without it, that of the run's data"
    )
    ask.add_argument(
        "--max-new-tokens", type=whole_above_0, metavar="N",
        help="cut the answer off at N tokens; without it, at evaluation.max_new_tokens of the run, which is also a URL's most",
    )  # fmt: skip
    ask.add_argument("--base", action="store_true", help="ask the base model instead of the tuned one")
    ask.add_argument(
        "--api-key-env", type=text, metavar="VARIABLE", help="the environment variable with the key of the URL"
    )
    add_json(ask, "SQL and rows")


def _ask(arguments: argparse.Namespace) -> int:
    from finetune.serve.client import is_url

    if is_url(arguments.target):
        return _ask_endpoint(arguments)
    if arguments.api_key_env is not None:
        raise UserError("--api-key-env: only a URL has a key", code="cli.conflicting_options")
    return _ask_folder(arguments, path(arguments.target), path(arguments.db))


def _ask_folder(arguments: argparse.Namespace, folder: Path, database: Path) -> int:
    with large_imports():
        from finetune.serve.target import open_target
    from finetune.data.limits import limits_of
    from finetune.evaluation.ask import ask, asked_dialect, prompt_about, require_engine, rows_of
    from finetune.run_folder import RunFolder
    from finetune.runtime.console import visible
    from finetune.runtime.sign_of_life import sign_of_life

    check_typed_in_project(RunFolder(folder), data=False)
    target = open_target(folder)
    _check_has_rows(arguments, database)
    dialect = asked_dialect(folder, target.dialects, database, arguments.dialect)
    if arguments.execute:
        require_engine(database, dialect, arguments.option)
    prompt = prompt_about(database, arguments.question, target.template, dialect, arguments.evidence)
    evaluation = target.config.evaluation
    most = arguments.max_new_tokens or evaluation.max_new_tokens
    doing = f"loading the model and answering with at most {most} tokens"
    with sign_of_life(doing), _without_bars(), target.loaded(base=arguments.base) as model:
        sql = ask(model, prompt, dialect, tuned=not arguments.base, max_new_tokens=most)
    if not arguments.json:
        print(visible(sql))
    found = rows_of(database, sql, evaluation.timeout_seconds, limits_of(evaluation)) if arguments.execute else None
    return _shown(arguments, sql, found)


def _ask_endpoint(arguments: argparse.Namespace) -> int:
    from finetune.evaluation.ask import (
        Rows,
        asked_dialect,
        is_schema,
        read_schema,
        require_engine,
        require_question,
        rows_of,
        say_cut,
        sql_failed,
        sql_in,
    )  # fmt: skip
    from finetune.runtime.console import say, visible
    from finetune.runtime.sign_of_life import sign_of_life
    from finetune.serve.client import Endpoint

    if arguments.base:
        raise UserError("--base: an endpoint serves the tuned model alone", code="cli.conflicting_options")
    require_question(arguments.question)
    endpoint = Endpoint(arguments.target, _key(arguments.api_key_env))
    file = path(arguments.db)
    is_file = file.exists() or os.sep in arguments.db or is_schema(file)
    if is_file:
        _check_has_rows(arguments, file)
    served = endpoint.served()
    extra: dict[str, str | int | None] = {"evidence": arguments.evidence, "dialect": arguments.dialect}
    extra["max_tokens"] = arguments.max_new_tokens
    if is_file:
        dialect = asked_dialect(arguments.target, served.dialects, file, arguments.dialect)
        if arguments.execute:
            require_engine(file, dialect, arguments.option)
        extra |= {"schema": read_schema(file, dialect)[0], "dialect": dialect}
    elif arguments.db not in served.databases:
        known = f"it has {', '.join(served.databases)}" if served.databases else "it has none"
        raise UserError(
            f"--db {arguments.db}: neither a file here nor a database of {arguments.target} ({known})",
            code="endpoint.unknown_database",
        )
    elif arguments.execute and not served.executes:
        raise UserError(
            f"{arguments.option}: {arguments.target} was started without --execute; start it with that, or give the database "
            "as a file",
            code="endpoint.not_executing",
        )
    else:
        extra["database"] = arguments.db
    with sign_of_life(f"waiting for the answer of {arguments.target}"):
        sql, rows = endpoint.ask(arguments.question, served, **extra)
    if endpoint.cut:
        own = endpoint.new_tokens == arguments.max_new_tokens  # else the server's limit, which may be lower
        say_cut(arguments.max_new_tokens if own else None)
    sql = sql_in("", sql)
    if not arguments.json:
        print(visible(sql))
    found: Rows | None = None
    if arguments.execute and is_file:
        found = rows_of(file, sql, 10.0)
    elif arguments.execute and (rows is None or "rows" not in rows):
        raise sql_failed((rows or {}).get("error"))
    elif rows is not None and "rows" not in rows:
        say(f"{arguments.target} has run it: {sql_failed(rows.get('error'))}")
    elif arguments.execute and rows is not None:
        cells = [[_value(cell) for cell in row] for row in rows["rows"]]
        found = Rows(rows["columns"], cells, truncated=bool(rows.get("truncated")))
    return _shown(arguments, sql, found)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the progress bars of transformers, such as that of loading the weights."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _shown(arguments: argparse.Namespace, sql: str, found: Rows | None) -> int:
    """Prints what is not printed yet. The SQL comes before it is run, because that may take long or fail."""
    from finetune.evaluation.ask import formatted

    if arguments.json:
        print_document({"sql": sql, **(found.as_json() if found else {})})
    elif found:
        print(formatted(found.columns, found.rows, more=found.truncated))
    return EXIT_OK


def _value(cell: Any) -> Any:
    with suppress(LookupError, TypeError, ValueError):
        return bytes.fromhex(cell["blob"])
    return cell


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise UserError(f"--api-key-env: the variable {variable} is not set", code="endpoint.no_key")
    key = os.environ[variable]
    if not key.isascii() or not key.isprintable() or " " in key:  # `serve` takes no such key either
        raise UserError(
            f"--api-key-env: the variable {variable} holds no good key: letters, digits and signs of ASCII, no spaces or line "
            "ends; set it to the key that the server has",
            code="endpoint.bad_key",
        )
    return key


def _check_has_rows(arguments: argparse.Namespace, database: Path) -> None:
    from finetune.evaluation.ask import is_schema

    if arguments.execute and is_schema(database):
        raise UserError(
            f"{database}: a schema has no rows; give a SQLite file to --db to use {arguments.option}",
            code="cli.conflicting_options",
        )
