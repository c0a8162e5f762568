"""Asks a trained model one question about one database: returns the SQL and, on request, its rows."""

from __future__ import annotations

from pathlib import Path

from finetune.data.prompts import extract_sql, load_template
from finetune.errors import UserError
from finetune.evaluation.generators.registry import DEFAULT as DEFAULT_GENERATOR
from finetune.evaluation.generators.registry import generator_named
from finetune.models.load import require_adapter
from finetune.run_folder import RunFolder
from finetune.runtime.table import aligned
from finetune.sql.engines.registry import DEFAULT as DEFAULT_DIALECT
from finetune.sql.engines.registry import engine_of_file
from finetune.sql.schema import schema_of_script

ROWS_SHOWN = 50


def ask(run: RunFolder, database: Path, question: str, *, evidence: str | None = None, base: bool = False) -> str:
    """The SQL with which a run's model (or its base model) answers a question about a database or .sql schema.

    Raises UserError if the run or the database cannot be read, or if the answer contains no SQL.
    """
    schema = schema_of(database)
    if not question.strip():
        raise UserError("the question is empty", code="ask.empty_question")
    require_adapter(run.adapter)
    template = load_template(run.adapter)
    config = run.config()
    model = generator_named(DEFAULT_GENERATOR).load(config, None if base else run.adapter)
    dialect = DEFAULT_DIALECT if is_schema(database) else engine_of_file(database).dialect
    prompt = template.render(schema=schema, question=question, dialect=dialect, evidence=evidence)
    [(answer, _)] = model.answers(
        [prompt], tuned=not base, batch_size=1, max_new_tokens=config.evaluation.max_new_tokens, progress=False
    )
    sql = extract_sql(answer)
    if not sql:
        raise UserError(f"the model answered without SQL: {answer.strip()[:200]!r}", code="ask.no_sql")
    return sql


def schema_of(path: Path) -> str:
    """The schema of a database or a .sql file, one statement per line. Raises UserError if it has no tables."""
    if not is_schema(path):
        return engine_of_file(path).schema(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as text ({error})", code="file.unreadable") from error
    try:
        return schema_of_script(text)
    except UserError as error:
        raise UserError(f"{path}: {error}", code=error.code) from None


def is_schema(path: Path) -> bool:
    """Whether a --db file is a schema in text form, which has no rows; any other file is a database."""
    return path.suffix.lower() == ".sql"


def run_and_format(database: Path, sql: str, timeout_seconds: float) -> str:
    """The rows of a query as an aligned text table, at most ROWS_SHOWN of them."""
    with engine_of_file(database).open() as session:
        result = session.run(database, sql, timeout_seconds)
    if result.rows is None:
        raise UserError(f"the SQL does not run: {result.error}", code="ask.sql_failed")
    cells = [list(result.columns)] + [
        ["NULL" if v is None else str(v) for v in row] for row in result.rows[:ROWS_SHOWN]
    ]
    lines = aligned(cells, rule=True)
    count, hidden = len(result.rows), len(result.rows) - ROWS_SHOWN
    lines.append(f"({count} row{'' if count == 1 else 's'}{f', {hidden} not shown' if hidden > 0 else ''})")
    return "\n".join(lines)
