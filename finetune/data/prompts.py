"""The one prompt template, shared by training, evaluation and `generate`.

The template is versioned. Its version and options are saved beside the weights, because an adapter answers well only
with the prompt that it was trained on.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finetune.errors import UserError, first_line, shown
from finetune.runtime.files import load_json, write_text
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

_START = re.compile(
    r"""```(?:(?!select\b|with\b|values\b)\w+(?=[ \t]*\n)|sql\w*\b)?(?P<fenced>.*?)(?P<closed>```|\Z)
      | ^\s*(?P<bare>(?:select|with|values)\b.*)""",
    re.DOTALL | re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
"""Where SQL begins in an answer: at the first code fence or the first line that starts like a query, whichever comes first."""
_END = re.compile(
    r"""'(?:[^']|'')*(?:'|\Z) | "(?:[^"]|"")*(?:"|\Z) | `[^`]*(?:`|\Z) | --[^\n]* | /\*.*?(?:\*/|\Z)
      | (?P<semicolon>;) | (?P<gap>\n[ \t\r]*\n|\n\#\#\#)""",
    re.DOTALL | re.VERBOSE,
)
"""Quoted text and comments, which are skipped, and outside of them what may end the query."""


@dataclass(frozen=True)
class PromptTemplate:
    """Renders a question about a database as the prompt that the answer follows.

    schema_format: `ddl` shows the CREATE TABLE text unchanged, `compact` one line per table without types.
    """

    schema_format: Literal["ddl", "compact"] = "ddl"
    version: str = PROMPT_VERSION

    def render(self, *, schema: str, question: str, dialect: str = "sqlite", evidence: str | None = None) -> str:
        """The prompt for one question. `schema` is DDL text. The answer follows the prompt without any separator."""
        shown = _compact(schema, dialect) if self.schema_format == "compact" else schema.strip()
        hint = _HINT.format(evidence=evidence.strip()) if evidence and evidence.strip() else ""
        return (
            _SCHEMA.format(dialect=dialect, schema=shown) + hint + _QUESTION.format(question=" ".join(question.split()))
        )

    def render_record(self, record: Record) -> str:
        return self.render(
            schema=record.schema, question=record.question, dialect=record.dialect, evidence=record.evidence
        )

    def identity(self) -> str:
        """Version and a short hash of template text and options: templates of equal identity render equal prompts."""
        text = json.dumps([_SCHEMA, _HINT, _QUESTION, asdict(self)])
        return f"{self.version}-{self.schema_format}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def save(self, folder: Path) -> None:
        write_text(folder / PROMPT_FILE, json.dumps({**asdict(self), "identity": self.identity()}, indent=2) + "\n")


@lru_cache(maxsize=1024)
def _compact(schema: str, dialect: str) -> str:
    """Cached, because thousands of questions share a few schemas and parsing one takes milliseconds."""
    return compact(parse_ddl(schema, dialect))


def load_template(folder: Path) -> PromptTemplate:
    """The template saved beside an adapter. Raises UserError if it is missing, corrupt or of another version."""
    path = folder / PROMPT_FILE
    try:
        saved = load_json(path)
        if not all(isinstance(saved[key], str) for key in ("schema_format", "version")):
            raise TypeError("schema_format and version are texts")
        template = PromptTemplate(schema_format=saved["schema_format"], version=saved["version"])
    except FileNotFoundError:
        raise UserError(
            f"{path}: missing; it says which prompt this adapter was trained on", code="prompt.missing"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a prompt file ({first_line(error)}); take the adapter folder from the run again",
            code="prompt.corrupt",
        ) from error
    if template.identity() != saved.get("identity"):
        raise UserError(
            f"{path}: the adapter was trained on prompt {shown(saved.get('identity'))[1:-1]}, this version of finetune renders "
            f"{template.identity()}; use the finetune version that trained it",
            code="prompt.mismatch",
        )
    return template


def completion(sql: str, *, dialect: str = "sqlite") -> str:
    """The answer text to train on: the SQL on one line (except inside quotes), without a closing semicolon."""
    return on_one_line(sql, dialect=dialect).rstrip("; ")


def extract_sql(answer: str) -> str:
    """The SQL in a model's answer, on one line and without its semicolon; "" if the answer is empty.

    The SQL begins at the first code fence or the first line that starts like a query; if there is neither, at the start of
    the answer. It ends at the first semicolon outside quotes and comments, or at the end of the fence; outside a fence also
    at a blank line and at a `###` heading. Lenient on purpose: the base model has never seen the template.
    """
    text, end, _ = _query_in(answer)
    return on_one_line(text[:end])


def answer_is_complete(answer: str) -> bool:
    """Whether generation may stop, because no further text could change `extract_sql(answer)`."""
    return _query_in(answer)[2]


def _query_in(answer: str) -> tuple[str, int, bool]:
    """The text that contains the query, the offset of the query's end, and whether no further text could change that end."""
    start = _START.search(answer)
    fenced = start is not None and start["fenced"] is not None
    text = (start["fenced"] or start["bare"] or "") if start else answer.strip()
    for match in _END.finditer(text):
        if match["semicolon"] or (match["gap"] and not fenced):
            return text, match.start(), start is not None
    return text, len(text), fenced and start is not None and start["closed"] != ""
