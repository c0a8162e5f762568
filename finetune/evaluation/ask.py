"""Asks a trained model one question about one database: returns the SQL and, on request, its rows."""

from __future__ import annotations

import re
from pathlib import Path

from finetune.data.answers import extract_sql
from finetune.data.prompts import load_template
from finetune.errors import UserError
from finetune.evaluation.generators.base import Answer
from finetune.evaluation.generators.registry import generator_for
from finetune.models.load import require_adapter
from finetune.run_folder import RunFolder
from finetune.runtime.console import say, visible
from finetune.runtime.files import read_text
from finetune.runtime.table import aligned
from finetune.sql.dialects import dialect_name
from finetune.sql.engines.base import Limits
from finetune.sql.engines.registry import DEFAULT as DEFAULT_DIALECT
from finetune.sql.engines.registry import ENGINES, engine_of_file
from finetune.sql.schema import parse_ddl, schema_of_script
from finetune.sql.text import on_one_line, statements

ROWS_SHOWN = 50
MAX_SHOWN = 200
"""Characters of an answer without SQL that a message shows."""

_READERS = ("postgres", "mysql", "tsql", "snowflake", "bigquery", "duckdb", "oracle", "sqlite")
"""Dialects that are tried for a schema file that cannot be read in the dialect of the question."""
_SHOWN = re.compile(r"(?:CREATE\b(?:\s+\w+){0,6}?\s+(?:TABLE|VIEW)|ALTER\s+TABLE|COMMENT\s+ON)\b", re.IGNORECASE)


def ask(
    run: RunFolder,
    database: Path,
    question: str,
    *,
    evidence: str | None = None,
    base: bool = False,
    dialect: str | None = None,
) -> str:
    """The SQL with which a run's model (or its base model) answers a question about a database or .sql schema.

    dialect: as for `asked_dialect`. Raises UserError if the run or the database cannot be read, if the prompt is too long, or
    if the answer contains no SQL.
    """
    asked = asked_dialect(run, database, dialect)
    schema, schema_dialect = _read_schema(database, asked)
    if not question.strip():
        raise UserError("the question is empty", code="ask.empty_question")
    template, config = load_template(run.adapter), run.config()
    model = generator_for(config, questions=1).load(config, None if base else run.adapter)
    prompt = template.render(
        schema=schema, question=question, dialect=asked, evidence=evidence, schema_dialect=schema_dialect
    )
    [answer] = model.answers(
        [prompt], tuned=not base, batch_size=1, max_new_tokens=config.evaluation.max_new_tokens, progress=False
    )
    _check_length(answer)
    sql = extract_sql(answer.text, asked)
    if not sql:
        raise UserError(f"the model answered without SQL: {answer.text.strip()[:MAX_SHOWN]!r}", code="ask.no_sql")
    return sql


def _check_length(answer: Answer) -> None:
    remedy = "give a schema with fewer tables, or train with data.schema_format=compact"
    if answer.problem == "too_long":
        raise UserError(
            f"the prompt of {answer.prompt_tokens} tokens leaves no room for the answer in the model's positions; {remedy}",
            code="ask.too_long",
        )
    if answer.problem == "out_of_memory":
        raise UserError(
            f"out of memory with a prompt of {answer.prompt_tokens} tokens; {remedy}", code="ask.out_of_memory"
        )


def asked_dialect(run: RunFolder, database: Path, wanted: str | None = None) -> str:
    """The dialect to ask in: the wanted one, else that of the database if the run was trained on it, else the run's most
    frequent one. Runs of earlier versions do not record theirs; the sources in their config say most.

    Raises UserError for an unknown dialect, and if the run has no adapter.
    """
    require_adapter(run.adapter)
    if wanted is not None:
        return dialect_name(wanted)
    sources = (dialect_name(source.dialect) for source in run.config().data.sources)
    known = load_template(run.adapter).dialects or tuple(dict.fromkeys(sources))
    own = None if is_schema(database) else engine_of_file(database).dialect
    if not known or own in known:
        return own or DEFAULT_DIALECT
    if len(known) > 1:
        say(f"{run.path} was trained on {', '.join(known)}; asking in {known[0]}, --dialect chooses another")
    return known[0]


def require_engine(database: Path, dialect: str) -> None:
    """Raises UserError unless SQL of the dialect can be run on the database."""
    if dialect not in ENGINES or engine_of_file(database).dialect != dialect:
        raise UserError(
            f"--run: {database} cannot run {dialect}; engines are there for {', '.join(ENGINES)}: leave --run out, or choose "
            "with --dialect",
            code="ask.no_engine",
        )


def schema_of(path: Path, dialect: str = DEFAULT_DIALECT) -> str:
    """The schema of a database or a .sql file, one statement per line. dialect: of a .sql file; others are tried if it cannot
    be read. Raises UserError if it has no tables or cannot be read."""
    return _read_schema(path, dialect)[0]


def _read_schema(path: Path, dialect: str) -> tuple[str, str]:
    """The schema and the dialect that reads it."""
    if not is_schema(path):
        engine = engine_of_file(path)
        return engine.schema(path), engine.dialect
    try:
        text = read_text(path).removeprefix("\ufeff")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: not readable as text ({why})", code="file.unreadable") from error
    try:
        return _shown(text, dialect), dialect
    except UserError as error:
        for other in _READERS if error.code == "sql.bad_schema" else ():
            try:
                return _shown(text, other), other
            except UserError:
                continue
        raise UserError(f"{path}: {error}", code=error.code) from None


def _shown(text: str, dialect: str) -> str:
    if dialect == DEFAULT_DIALECT:
        return schema_of_script(text)
    parse_ddl(text, dialect)
    lines = [on_one_line(statement, dialect=dialect) for statement in statements(text, dialect=dialect)]
    return "\n".join(line for line in lines if _SHOWN.match(line))


def is_schema(path: Path) -> bool:
    """Whether a --db file is a schema in text form, which has no rows; any other file is a database."""
    return path.suffix.lower() == ".sql"


def run_and_format(database: Path, sql: str, timeout_seconds: float, limits: Limits | None = None) -> str:
    """The rows of a query as an aligned text table, at most ROWS_SHOWN of them, with control characters as escapes."""
    with engine_of_file(database).open(limits or Limits()) as session:
        result = session.run(database, sql, timeout_seconds)
    if result.rows is None:
        raise UserError(f"the SQL does not run: {result.error}", code="ask.sql_failed")
    rows = [["NULL" if v is None else str(v) for v in row] for row in result.rows[:ROWS_SHOWN]]
    cells = [[visible(cell, one_line=True) for cell in row] for row in [list(result.columns), *rows]]
    lines = aligned(cells, rule=True)
    count, hidden = len(result.rows), len(result.rows) - ROWS_SHOWN
    lines.append(f"({count} row{'' if count == 1 else 's'}{f', {hidden} not shown' if hidden > 0 else ''})")
    return "\n".join(lines)
