"""Drafts questions and SQL about a database with a model behind an OpenAI-compatible endpoint.

The model is shown the schema, never a row. What it writes is kept only if it is one query that runs on the database, in the
sandbox of all SQL, with a result that tells a right answer from a wrong one (`sql.gold`), and asks what no other pair asks.
"""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from finetune.data.records import Record
from finetune.errors import UserError
from finetune.init.database import Database
from finetune.runtime.console import say
from finetune.runtime.files import parse_json
from finetune.serve.client import Advice, Endpoint
from finetune.sql.engines.registry import open_sessions
from finetune.sql.gold import GoldExaminer
from finetune.sql.parsing import parses

URL, KEY, MODEL = "OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL"
DEFAULT_URL = "https://api.openai.com/v1"
BATCH = 10
TEMPERATURE = 0.9
SECONDS = 5.0
QUIET_SECONDS = 15.0
"""After so much silence the user is told what is waited for."""
IN_VAIN = 3
"""So many replies in a row without a new pair end the drafting."""
LATEST = 30
"""Questions so far that the model is told not to repeat."""
SYSTEM = (
    "You write test questions for a text-to-SQL system. Questions are what a person who knows the business, but no SQL, "
    "would ask. Each SQL is one SQLite query that answers its question exactly, uses the tables and columns of the schema "
    "only, and needs no value that you would have to guess. Reply with a JSON array of objects with the keys question and "
    "sql, and nothing else."
)
SHAPES = (
    "counting and filtering in one table",
    "joins of two tables",
    "GROUP BY with an aggregate, and HAVING",
    "the largest, smallest, newest or oldest ones, with ORDER BY and LIMIT",
    "sub-queries: NOT IN, EXISTS, above average",
    "joins of three tables, or set operations",
)

REFUSED = {
    "failed": "do not run",
    "no_rows": "without rows",
    "nothing_found": "with only 0 or NULL as result",
    "limit": "too slow or too large",
    "constant": "read no table",
}
"""Of a pair whose SQL is of that kind of gold (`sql.gold`), in a few words."""


@dataclass(frozen=True)
class Writer:
    """Who drafts: an endpoint and its model's name."""

    endpoint: Endpoint
    model: str

    def __str__(self) -> str:
        return f"{self.model} at {self.endpoint.url}"


def writer_in(environment: Mapping[str, str] = os.environ) -> Writer | None:
    """The endpoint that the environment names; None without a model's name, because none is a good guess. Raises UserError for
    an address that is none."""
    model = environment.get(MODEL, "").strip()
    if not model or not (environment.get(URL) or environment.get(KEY)):
        return None
    url = environment.get(URL) or DEFAULT_URL
    advice = Advice(
        f"set {KEY} to one that this server knows", f"is it the address (with /v1, or as its manual says) for {URL}?"
    )
    try:
        return Writer(Endpoint(url, environment.get(KEY) or None, advice=advice), model)
    except UserError as error:
        raise UserError(f"{URL}: {error}", code="endpoint.bad_url") from None


@dataclass
class Drafts:
    """records: the pairs that were kept. refused: how many were not, by reason. trouble: why the drafting ended early."""

    records: list[Record] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    trouble: str = ""

    def __str__(self) -> str:
        refused = ", ".join(f"{number} {why}" for why, number in self.refused.most_common())
        return f"{len(self.records)} synthetic pairs kept" + (f"; not kept: {refused}" if refused else "")


def draft(writer: Writer, database: Database, wanted: int) -> Drafts:
    """Up to `wanted` pairs. An endpoint that fails ends the drafting with what there is; with nothing at all it raises its
    UserError."""
    drafts = Drafts()
    questions, queries = set[str](), set[str]()
    in_vain = calls = 0
    with open_sessions() as session:
        examiner = GoldExaminer(session, SECONDS)
        while len(drafts.records) < wanted and in_vain < IN_VAIN:
            before = len(drafts.records)
            try:
                with _told_of_silence(writer):
                    reply = writer.endpoint.complete(
                        writer.model, SYSTEM, _request(database, calls, drafts), TEMPERATURE
                    )
            except UserError as error:
                if not drafts.records:
                    raise
                drafts.trouble = str(error)
                break
            calls += 1
            for question, sql in _pairs(reply, drafts.refused):
                if len(drafts.records) == wanted:
                    break
                why = _refusal(question, sql, questions, queries, examiner, database)
                if why:
                    drafts.refused[why] += 1
                    continue
                questions.add(_same(question))
                queries.add(_same(sql))
                number = len(drafts.records) + 1
                schema = database.schemas[database.db_id]
                drafts.records.append(Record(f"synthetic-{number:04d}", database.db_id, question, sql, schema))
            in_vain = 0 if len(drafts.records) > before else in_vain + 1
            say(f"{calls} replies of {writer.model}: {len(drafts.records)} of {wanted} pairs")
    if in_vain == IN_VAIN:
        drafts.trouble = f"{IN_VAIN} replies in a row held no new pair that could be kept"
    return drafts


@contextmanager
def _told_of_silence(writer: Writer) -> Iterator[None]:
    """Says, while a reply takes long, that it is waited for, and how long."""

    def tell() -> None:
        say(
            f"{writer} has not answered for {QUIET_SECONDS:g} s; it has {writer.endpoint.seconds:g} s "
            "(Ctrl-C ends this, and --drafts 0 asks for none)"
        )

    timer = threading.Timer(QUIET_SECONDS, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _request(database: Database, calls: int, drafts: Drafts) -> str:
    latest = "\n".join(f"- {record.question}" for record in drafts.records[-LATEST:])
    known = f"\n\nAlready asked, so ask something else:\n{latest}" if latest else ""
    shape = SHAPES[calls % len(SHAPES)]
    return f"Schema (SQLite):\n{database.schemas[database.db_id]}\n\nWrite {BATCH} pairs. This time: {shape}.{known}"


def _pairs(reply: str, refused: Counter[str]) -> Iterator[tuple[str, str]]:
    """Those in the outermost JSON array of a reply, whatever stands around it."""
    found = re.search(r"\[.*\]", reply, re.DOTALL)
    try:
        entries: Any = parse_json(found[0]) if found else None
    except ValueError:
        entries = None
    if not isinstance(entries, list):
        refused["replies without a JSON array"] += 1
        return
    for entry in entries:
        question, sql = (entry.get(name) if isinstance(entry, dict) else None for name in ("question", "sql"))
        if isinstance(question, str) and isinstance(sql, str) and question.strip() and sql.strip():
            yield " ".join(question.split()), sql.strip().rstrip(";").strip()
        else:
            refused["without question or SQL"] += 1


def _refusal(
    question: str, sql: str, questions: set[str], queries: set[str], examiner: GoldExaminer, database: Database
) -> str:
    """Why a pair is not kept, in a few words; "" if it is."""
    if _same(question) in questions or _same(sql) in queries:
        return "asked already"
    if parses(sql) is not None:
        return "not one query"
    gold = examiner.examine(database.path, sql, "sqlite", twice=True)
    return "" if gold.kind == "sound" else REFUSED.get(gold.kind, f"of the kind {gold.kind}")


def _same(text: str) -> str:
    return " ".join(re.findall(r"\w+|[^\w\s]", text.lower()))
