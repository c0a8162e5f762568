"""From a question to SQL: the prompt, the backend's answer, the SQL in it, and on request its rows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.answers import extract_sql
from finetune.errors import UserError
from finetune.evaluation.generators.base import Answer
from finetune.serve.api_errors import ApiError, invalid
from finetune.serve.backends.base import Backend, BackendError, PromptTooLong
from finetune.serve.client_schemas import ClientSchemas
from finetune.serve.databases import Database, Databases
from finetune.serve.questions import Question
from finetune.serve.rows import Rows
from finetune.serve.sql_stream import SqlStream
from finetune.serve.target import Target
from finetune.sql.dialects import dialect_name
from finetune.sql.engines.registry import ENGINES


@dataclass(frozen=True)
class Prepared:
    """A question with its prompt. database: on which the SQL may be executed; None for a schema alone."""

    prompt: str
    dialect: str
    max_new_tokens: int
    database: Path | None
    database_name: str | None


@dataclass(frozen=True)
class Result:
    """sql: "" if the answer holds none. cut: whether the answer ended because it had as many tokens as it may have. rows: as in
    `Rows.of`; None if they were not asked for."""

    sql: str
    answer: Answer
    cut: bool
    rows: dict[str, Any] | None


class Answering:
    """rows: None unless SQL is executed."""

    def __init__(self, target: Target, databases: Databases, backend: Backend, rows: Rows | None) -> None:
        self.target, self.databases, self.backend, self.rows = target, databases, backend, rows
        self.schemas = ClientSchemas(target.template)

    async def prepare(self, question: Question) -> Prepared:
        """Raises ApiError for an unknown database or dialect, and for a schema that cannot be read."""
        wanted = _dialect(question.dialect)
        database: Database | None = None
        if question.schema is not None:
            dialect = wanted or self.target.dialect_for(None)
            prompt = await self.schemas.prompt(question.schema, question.text, dialect, question.evidence)
        else:
            database = self.databases.named(question.database)
            dialect = wanted or self.target.dialect_for(database.dialect)
            prompt = await asyncio.to_thread(self._prompt, database, dialect, question)
        most = self.target.config.evaluation.max_new_tokens
        return Prepared(
            prompt=prompt,
            dialect=dialect,
            max_new_tokens=min(most, question.max_tokens or most),
            database=database.path if database is not None and database.dialect is not None else None,
            database_name=database.name if database is not None else None,
        )

    def _prompt(self, database: Database, dialect: str, question: Question) -> str:
        try:
            schema, schema_dialect = database.schema()
            return self.target.template.render(
                schema=schema,
                question=question.text,
                dialect=dialect,
                evidence=question.evidence,
                schema_dialect=schema_dialect,
            )
        except UserError as error:  # it could be read when the server was started
            raise ApiError(
                503, f"the database {database.name} cannot be read now: {error}", code="database_unreadable"
            ) from error

    async def steps(self, asked: Prepared, *, partial: bool) -> AsyncGenerator[str | Result, None]:
        """Parts of the SQL, if `partial` and where they are certain, then the result, whose SQL begins with them.

        Raises ApiError, also where the SQL turns out not to begin with what was sent.
        """
        sent = SqlStream(asked.dialect)
        steps = self.backend.answer(asked.prompt, asked.dialect, asked.max_new_tokens, partial=partial)
        try:
            async with aclosing(steps):
                async for step in steps:
                    if isinstance(step, Answer):
                        result = await self._result(asked, step)
                        rest = sent.rest(result.sql)
                        if rest is None:
                            raise ApiError(
                                500,
                                "the answer turned out not to be the SQL with which it began; ask again without `stream`",
                                code="answer_changed",
                            )
                        if partial and rest:
                            yield rest
                        yield result
                        return
                    if new := sent.feed(step):
                        yield new
        except PromptTooLong as error:
            raise too_long(error.tokens, error.limit) from None
        except BackendError as error:
            raise ApiError(
                502, f"the backend {self.backend.name} gives no answer: {error}", code="backend_down"
            ) from None
        except UserError as error:  # a text that the tokenizer cannot write
            raise invalid(str(error), code="unreadable_text") from None
        raise ApiError(502, f"the backend {self.backend.name} ended without an answer", code="backend_down")

    async def _result(self, asked: Prepared, answer: Answer) -> Result:
        if answer.problem == "too_long":
            raise too_long(answer.prompt_tokens, None)
        if answer.problem == "out_of_memory":
            raise ApiError(
                503, f"out of memory with a prompt of {answer.prompt_tokens} tokens; give a schema with fewer tables",
                code="out_of_memory",
            )  # fmt: skip
        if answer.problem is not None:
            raise ApiError(502, f"the backend {self.backend.name} refused the prompt", code="backend_down")
        sql = extract_sql(answer.text, asked.dialect)
        return Result(sql, answer, answer.new_tokens >= asked.max_new_tokens, await self._rows_of(asked, sql))

    async def _rows_of(self, asked: Prepared, sql: str) -> dict[str, Any] | None:
        if self.rows is None or asked.database is None:
            return None
        if not sql:
            return {"error": "the model answered without SQL"}
        if asked.dialect not in ENGINES:
            return {"error": f"no engine runs {asked.dialect}; engines are there for {', '.join(ENGINES)}"}
        return await self.rows.of(asked.database, sql)


def too_long(tokens: int | None, limit: int | None) -> ApiError:
    size = "the prompt" if tokens is None else f"the prompt of {tokens} tokens"
    most = "" if limit is None else f" ({limit})"
    return ApiError(
        400, f"{size} leaves no room for the answer in the model's positions{most}; give a schema with fewer tables, or a "
        "shorter question", code="context_length_exceeded",
    )  # fmt: skip


def _dialect(name: str | None) -> str | None:
    try:
        return None if name is None else dialect_name(name)
    except UserError as error:
        raise invalid(str(error), param="dialect", code="unknown_dialect") from error
