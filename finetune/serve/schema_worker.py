"""`python -m finetune.serve.schema_worker` renders prompts with schemas of clients, one JSON object a line; client_schemas.py
starts it.

{"schema", "question", "dialect", "evidence", "schema_format", "version"} gives {"prompt"} or {"error"}.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from functools import lru_cache
from typing import Any

from finetune.data.prompts import PromptTemplate
from finetune.errors import UserError
from finetune.sql.engines.confinement import end_with_parent
from finetune.sql.schema import parse_ddl

MEMORY_BYTES = 2 << 30
READERS = ("postgres", "mysql", "tsql", "snowflake", "bigquery", "duckdb", "oracle", "sqlite")
"""Dialects that are tried for a schema that cannot be read in the dialect of the question."""


@lru_cache(maxsize=256)
def reader(schema: str, dialect: str) -> str:
    """The dialect that reads a schema: the one that is asked in, else the first other. Raises UserError if none does."""
    first: UserError | None = None
    for known in (dialect, *READERS):
        try:
            parse_ddl(schema, known)
            return known
        except UserError as error:
            first = first or error
            if error.code != "sql.bad_schema":
                break
    assert first is not None
    raise first


def reply(request: dict[str, Any]) -> dict[str, str]:
    template = PromptTemplate(schema_format=request["schema_format"], version=request["version"])
    try:
        prompt = template.render(
            schema=request["schema"],
            question=request["question"],
            dialect=request["dialect"],
            evidence=request["evidence"],
            schema_dialect=reader(request["schema"], request["dialect"]),
        )
    except (UserError, ValueError) as error:  # a NUL character
        return {"error": str(error)}
    except (MemoryError, RecursionError):
        return {"error": "schema: it is too large or nested too deeply"}
    return {"prompt": prompt}


def main() -> None:
    end_with_parent(os.getppid())
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print("{}", flush=True)
    for line in sys.stdin.buffer:
        print(json.dumps(reply(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
