"""The one prompt template, shared by training, evaluation and `generate`.

The template is versioned. Its version and options are saved beside the weights, because an adapter answers well only
with the prompt that it was trained on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finetune.data.answers import answer_is_complete as answer_is_complete
from finetune.data.answers import extract_sql as extract_sql
from finetune.errors import UserError, first_line, printable, shown
from finetune.runtime.files import load_json, write_text
from finetune.sql.dialects import dialect_name
from finetune.sql.schema import compact, parse_ddl
from finetune.sql.text import on_one_line
from finetune.tokens import encode_examples as encode_examples
from finetune.tokens import encode_prompts as encode_prompts

if TYPE_CHECKING:
    from finetune.data.records import Record

PROMPT_VERSION = "1"
PROMPT_FILE = "prompt.json"

_SCHEMA = "### {dialect} schema\n{schema}\n"
_HINT = "### Hint\n{evidence}\n"
_QUESTION = "### Question\n{question}\n### SQL\n"
_RETRY = "{prompt}{sql}\n### Error\n{error}\n### SQL\n"
RETRY_VERSION = "1"
"""Of the text above: part of the key of kept answers, not of a template's identity, because no adapter is trained on it."""
ERROR_CHARACTERS = 200
"""Of an error message in a prompt."""


@dataclass(frozen=True)
class PromptTemplate:
    """Renders a question about a database as the prompt that the answer follows.

    schema_format: `ddl` shows the CREATE TABLE text unchanged, `compact` one line per table without types.
    dialects: those of the records that an adapter was trained on, the most frequent first; empty if unknown, as in adapters of
    earlier versions.
    """

    schema_format: Literal["ddl", "compact"] = "ddl"
    version: str = PROMPT_VERSION
    dialects: tuple[str, ...] = field(default=(), compare=False)

    def render(
        self,
        *,
        schema: str,
        question: str,
        dialect: str = "sqlite",
        evidence: str | None = None,
        schema_dialect: str | None = None,
    ) -> str:
        """The prompt for one question. The answer follows the prompt without any separator.

        schema: DDL text. dialect: that the answer is asked in. schema_dialect: that of the schema, if it is another one.
        """
        shown = _compact(schema, schema_dialect or dialect) if self.schema_format == "compact" else schema.strip()
        hint = _HINT.format(evidence=evidence.strip()) if evidence and evidence.strip() else ""
        return (
            _SCHEMA.format(dialect=dialect, schema=shown) + hint + _QUESTION.format(question=" ".join(question.split()))
        )

    def render_record(self, record: Record) -> str:
        return self.render(
            schema=record.schema, question=record.question, dialect=record.dialect, evidence=record.evidence
        )

    def render_retry(self, prompt: str, sql: str, error: str) -> str:
        """The prompt that asks once more: `prompt`, the SQL that it was answered with, and why that did not run.

        error: becomes one line of at most ERROR_CHARACTERS characters, because it quotes what the SQL says.
        """
        line = printable(" ".join(error.split()))
        if len(line) > ERROR_CHARACTERS:
            line = line[: ERROR_CHARACTERS - 1] + "…"
        return _RETRY.format(prompt=prompt, sql=sql.strip(), error=line)

    def identity(self) -> str:
        """Version and a short hash of template text and options: templates of equal identity render equal prompts."""
        options = {"schema_format": self.schema_format, "version": self.version}
        text = json.dumps([_SCHEMA, _HINT, _QUESTION, options])
        return f"{self.version}-{self.schema_format}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def save(self, folder: Path) -> None:
        saved = {"schema_format": self.schema_format, "version": self.version, "identity": self.identity()}
        other = self.dialects not in (
            (),
            ("sqlite",),
        )  # left out, as in earlier versions, where there is nothing to say
        dialects = {"dialects": list(self.dialects)} if other else {}
        write_text(folder / PROMPT_FILE, json.dumps(saved | dialects, indent=2) + "\n")


@lru_cache(maxsize=1024)
def _compact(schema: str, dialect: str) -> str:
    """Cached, because thousands of questions share a few schemas and parsing one takes milliseconds."""
    return compact(parse_ddl(schema, dialect))


def dialects_of(records: Iterable[Record]) -> tuple[str, ...]:
    """The dialects of records, the most frequent first."""
    return tuple(dialect for dialect, _ in Counter(record.dialect for record in records).most_common())


def load_template(folder: Path) -> PromptTemplate:
    """The template saved beside an adapter. Raises UserError if it is missing, corrupt or of another version."""
    path = folder / PROMPT_FILE
    try:
        saved = load_json(path)
        if not all(isinstance(saved[key], str) for key in ("schema_format", "version")):
            raise TypeError("schema_format and version are texts")
        dialects = tuple(map(dialect_name, saved.get("dialects", ())))
        template = PromptTemplate(schema_format=saved["schema_format"], version=saved["version"], dialects=dialects)
    except FileNotFoundError:
        raise UserError(
            f"{path}: missing; it says which prompt this adapter was trained on", code="prompt.missing"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(
            f"{path}: not a prompt file ({first_line(error)}); take the adapter folder from the run again",
            code="prompt.corrupt",
        ) from error
    if template.identity() != saved.get("identity"):
        raise UserError(
            f"{path}: the adapter was trained on prompt {shown(saved.get('identity'))[1:-1]}, this version of finetune renders "
            f"{shown(template.identity())[1:-1]}; use the finetune version that trained it",
            code="prompt.mismatch",
        )
    return template


def prompt_dialect(prompt: str) -> str:
    """The dialect that a prompt of this template asks for, in sqlglot's spelling; SQLite for any other text."""
    match = re.match(r"### (.{1,40}) schema\n", prompt)
    try:
        return dialect_name(match[1]) if match else "sqlite"
    except UserError:
        return "sqlite"


def completion(sql: str, *, dialect: str = "sqlite") -> str:
    """The answer text to train on: the SQL on one line (except inside quotes), without a closing semicolon."""
    return on_one_line(sql, dialect=dialect).rstrip("; ")
