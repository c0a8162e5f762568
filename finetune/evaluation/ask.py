"""Asks a trained model one question about one database: returns the SQL and, on request, its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.answers import answer_is_complete, extract_sql
from finetune.data.prompts import PromptTemplate
from finetune.errors import UserError
from finetune.evaluation.generators.base import Answer, LoadedModel
from finetune.runtime.console import say, visible
from finetune.runtime.files import read_text
from finetune.runtime.table import aligned
from finetune.sql.dialects import dialect_name
from finetune.sql.engines.base import Limits
from finetune.sql.engines.registry import DEFAULT as DEFAULT_DIALECT
from finetune.sql.engines.registry import ENGINES, engine_of_file
from finetune.sql.schema_text import readable_schema

ROWS_SHOWN = 50
MAX_SHOWN = 200
"""Characters of an answer without SQL that a message shows."""


def ask(model: LoadedModel, prompt: str, dialect: str, *, tuned: bool, max_new_tokens: int) -> str:
    """The SQL with which a loaded model answers a prompt. tuned: as in `LoadedModel.answers`. Says on stderr when it is cut off.

    Raises UserError if the prompt is too long, or if the answer contains no SQL.
    """
    [answer] = model.answers([prompt], tuned=tuned, batch_size=1, max_new_tokens=max_new_tokens, progress=False)
    _check(answer, max_new_tokens)
    if answer.new_tokens >= max_new_tokens and not answer_is_complete(answer.text, dialect):
        say_cut(max_new_tokens)
    return sql_in(answer.text, extract_sql(answer.text, dialect))


def say_cut(max_new_tokens: int | None) -> None:
    """max_new_tokens: at which the answer was cut off; None for as many as the server allows."""
    at = f"{max_new_tokens} tokens (--max-new-tokens)" if max_new_tokens else "as many tokens as the server allows"
    say(f"the answer was cut off at {at}, so its SQL may be incomplete")


def sql_in(answer: str, sql: str) -> str:
    """The SQL that was found in an answer. Raises UserError if it is empty."""
    if not sql:
        raise UserError(f"the model answered without SQL: {answer.strip()[:MAX_SHOWN]!r}", code="ask.no_sql")
    return sql


def prompt_about(
    database: Path, question: str, template: PromptTemplate, dialect: str, evidence: str | None = None
) -> str:
    """The prompt of a question about a database or a .sql schema. Raises UserError for an empty question, and for a database that
    cannot be read."""
    schema, schema_dialect = read_schema(database, dialect)
    require_question(question)
    return template.render(
        schema=schema, question=question, dialect=dialect, evidence=evidence, schema_dialect=schema_dialect
    )


def require_question(question: str) -> None:
    if not question.strip():
        raise UserError("the question is empty", code="ask.empty_question")


def _check(answer: Answer, max_new_tokens: int) -> None:
    remedy = "give a schema with fewer tables, or train with data.schema_format=compact"
    if answer.problem == "too_long":
        raise UserError(
            f"the prompt of {answer.prompt_tokens} tokens leaves no room for an answer of {max_new_tokens} in the model's "
            f"positions; lower --max-new-tokens, {remedy}",
            code="ask.too_long",
        )
    if answer.problem == "out_of_memory":
        raise UserError(
            f"out of memory with a prompt of {answer.prompt_tokens} tokens; {remedy}", code="ask.out_of_memory"
        )
    if answer.problem is not None:
        raise UserError("the generator refused the prompt; what it printed before says why", code="ask.failed")


def asked_dialect(name: Path | str, known: Sequence[str], database: Path | None, wanted: str | None = None) -> str:
    """The dialect to ask in: the wanted one, else that of the database if the model was trained on it, else the model's most
    frequent one.

    name: of the model in messages. known: dialects that it was trained on, the most frequent first; empty if unknown. database:
    None for a schema or a database without a file here. Raises UserError for an unknown dialect.
    """
    if wanted is not None:
        return dialect_name(wanted)
    own = None if database is None or is_schema(database) else engine_of_file(database).dialect
    if not known or own in known:
        return own or DEFAULT_DIALECT
    if len(known) > 1:
        say(f"{name} was trained on {', '.join(known)}; asking in {known[0]}, --dialect chooses another")
    return known[0]


def require_engine(database: Path, dialect: str, option: str) -> None:
    """Raises UserError unless SQL of the dialect can be run on the database. option: that asks for it."""
    if dialect not in ENGINES or engine_of_file(database).dialect != dialect:
        raise UserError(
            f"{option}: {database} cannot run {dialect}; engines are there for {', '.join(ENGINES)}: leave {option} out, or "
            "choose with --dialect",
            code="ask.no_engine",
        )


def schema_of(path: Path, dialect: str = DEFAULT_DIALECT) -> str:
    """The schema of a database or a .sql file, one statement per line. dialect: of a .sql file; others are tried if it cannot
    be read. Raises UserError if it has no tables or cannot be read."""
    return read_schema(path, dialect)[0]


def read_schema(path: Path, dialect: str) -> tuple[str, str]:
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
        return readable_schema(text, dialect)
    except UserError as error:
        raise UserError(f"{path}: {error}", code=error.code) from None


def is_schema(path: Path) -> bool:
    """Whether a --db file is a schema in text form, which has no rows; any other file is a database."""
    return path.suffix.lower() == ".sql"


@dataclass(frozen=True)
class Rows:
    """What a query has returned. truncated: whether there are more rows."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    truncated: bool = False

    def as_json(self) -> dict[str, Any]:
        """A blob is {"blob": its hexadecimal digits}, as from `finetune serve`."""
        cells = [[{"blob": cell.hex()} if isinstance(cell, bytes) else cell for cell in row] for row in self.rows]
        return {"columns": list(self.columns), "rows": cells, "truncated": self.truncated}


def rows_of(database: Path, sql: str, timeout_seconds: float, limits: Limits | None = None) -> Rows:
    with engine_of_file(database).open(limits or Limits()) as session:
        result = session.run(database, sql, timeout_seconds)
    if result.rows is None:
        raise sql_failed(result.error)
    return Rows(result.columns, result.rows)


def sql_failed(why: str | None) -> UserError:
    return UserError(f"the SQL does not run: {why}", code="ask.sql_failed")


def formatted(columns: Sequence[str], found: Sequence[Sequence[Any]], *, more: bool = False) -> str:
    """Rows as an aligned text table. more: whether there are more than those found."""
    rows = [["NULL" if v is None else str(v) for v in row] for row in found[:ROWS_SHOWN]]
    cells = [[visible(cell, one_line=True) for cell in row] for row in [list(columns), *rows]]
    lines = aligned(cells, rule=True)
    count, hidden = len(found), len(found) - ROWS_SHOWN
    number = f"more than {count}" if more else str(count)
    lines.append(f"({number} row{'' if count == 1 else 's'}{f', {hidden} not shown' if hidden > 0 else ''})")
    return "\n".join(lines)
