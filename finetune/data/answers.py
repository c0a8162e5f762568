"""Takes the SQL out of a model's answer, and tells while the answer is generated when that SQL can no longer change.

After a change, raise the versions in evaluation/questions.py, so that cached answers and verdicts are not used.

One definition serves both. Lenient on purpose: the base model has never seen our template. In this order:

1. An answer that begins with SQL, in a code fence or not, perhaps after a thought or a label such as `SQL:`: its first query,
   up to a semicolon, the fence's end, a heading, or a blank line at which the query is complete and after which no word
   such as WHERE or UNION goes on with it. Generation stops there.
2. An answer that begins with prose: the last code fence with a query, unless the words before it call it an alternative; then
   code within the text, labelled queries, lines that begin like a query, queries within a sentence or in quotes. Generation
   goes on until the model ends, or begins a question of its own.
3. An answer without a query: what looks most like one, up to its end, so that it fails honestly.

What counts as a query is decided by the dialect's own parser (`finetune/sql/syntax.py`). Thoughts (`<think>`) are never searched.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import islice

from finetune.data.direct_sql import (
    LABEL,
    MARK,
    THOUGHTS,
    TURN,
    DirectSql,
    ends_entity,
    is_all_sql,
    longest_query,
    without_entities,
)
from finetune.data.fences import LANGUAGES, Block, blocks_in
from finetune.sql.lexer import pieces
from finetune.sql.syntax import QUERY_WORDS, STATEMENT_WORDS, reading
from finetune.sql.text import on_one_line

_QUERY = "|".join(QUERY_WORDS)
_SQL = "|".join((*QUERY_WORDS, *STATEMENT_WORDS))
_NEW_QUESTION = re.compile(
    rf"""^(?:\#{{1,4}}[ \t]*(?:question|hint|instruction|input|user|\w+[ \t]schema)[ \t:]*\n
    |(?:question|user|human|input)[ \t]*\d*:)|{TURN}""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_ALTERNATIVE = re.compile(
    r"\b(?:alternativ\w*|or else|another (?:way|option|approach|version|possibility)|other (?:ways?|options?)|equivalent(?:ly)?"
    r"|(?:can|could|may|might) also|if you (?:also|want|need|prefer|would|wish|only)|(?:test|verify|check) (?:this|it)"
    r"|verification|for example)\b",
    re.IGNORECASE,
)
_THOUGHT = re.compile(rf"(?<!['\"%])(?:[<◁](/?)(?:seed:)?({THOUGHTS})[>▷]|\[(?-i:(/?)(THINK))\])", re.IGNORECASE)
_CHANNEL = re.compile(
    r"<\|begin_of_thought\|>.*?(?:<\|end_of_thought\|>|\Z)"
    r"|<\|channel\|>(?:analysis|commentary).*?(?:<\|end\|>|\Z)|\Aanalysis.*?assistantfinal",
    re.DOTALL | re.IGNORECASE,
)
_ANSWER = re.compile(r".*(?<!['\"%])<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_LEADING = re.compile(rf"\s*(?:(?:{TURN})\s*|assistant\s*(?:\n|:|(?=<\|))\s*|final(?=<\|message))+", re.IGNORECASE)
_TURN = re.compile(rf"(?<!['\"%])(?:{TURN})")
_UNLABELLED = re.compile(
    rf"\s*(?:(?:{'|'.join(sorted(LANGUAGES))})[ \t]*\n\s*)?{MARK}?(?:{LABEL})?", re.IGNORECASE | re.VERBOSE
)
_LABELLED = re.compile(rf"(?:{LABEL})`*(?=\(*(?:{_QUERY})\b)", re.IGNORECASE | re.VERBOSE)
_LINE = re.compile(rf"^[ \t]*+{MARK}?[*_`]*+(?=\(*+[ \t]*+(?:{_QUERY})\b)", re.IGNORECASE | re.MULTILINE)
_ANYWHERE = re.compile(rf"(?<![\w'\"`])(?=(?:{_QUERY})\s)", re.IGNORECASE)
_INLINE = re.compile(r"(?<!`)(`{1,2})(?!`)([^`]+)\1(?!`)")
_BOXED = re.compile(r"\\boxed\{\s*(?:\\\w+\{\s*)?([^{}]+)\}")
_QUOTED = re.compile(
    rf"""(?<![\w'"])(\"{{3}}|'{{3}}|["'])\s*+(?=\(*+(?:{_QUERY})\b)(.*?)(?<!\\)\1""", re.IGNORECASE | re.DOTALL
)
"""A query as text of a program: `query = "SELECT ..."`."""
_JSON = re.compile(r'"\w*(?:sql|query|answer)\w*"\s*:\s*("(?:[^"\\]|\\.)*+")', re.IGNORECASE)
_END = re.compile(r";|\n[ \t\r]*\n|(?<=\n)###|```")
MAX_CHARACTERS = 32_000
"""An answer is read up to here, about 8,000 tokens; the time for text that is made to be slow grows with its square."""
_TRIES = 12
"""How many candidates of one kind are given to the parser, and how many new questions end an answer."""


@dataclass(frozen=True)
class SqlAnswer:
    """sql: on one line and without its semicolon; "" if there is none at all. several: whether the answer holds more statements
    than this one, which the official evaluators, as they run the whole text, would run too."""

    sql: str
    several: bool = False


def read_answer(answer: str, dialect: str = "sqlite") -> SqlAnswer:
    """The SQL of an answer, which has ended."""
    reader = AnswerReader(dialect)
    if not is_all_sql(answer) or len(answer) >= MAX_CHARACTERS:
        reader.feed(answer)
    return reader.result(answer)


def extract_sql(answer: str, dialect: str = "sqlite") -> str:
    """The SQL in a model's answer, on one line and without its semicolon; "" if it is empty or never left its thoughts."""
    return read_answer(answer, dialect).sql


def answer_is_complete(answer: str, dialect: str = "sqlite") -> bool:
    """Whether generation may stop, because no further text could change `extract_sql(answer)`."""
    return AnswerReader(dialect).feed(answer)


class AnswerReader:
    """Follows one answer while it is generated."""

    def __init__(self, dialect: str = "sqlite") -> None:
        self._dialect = dialect
        self._direct = DirectSql(dialect)
        self._searched, self._checks = 0, _TRIES
        self._prose_end: int | None = None

    def feed(self, text: str) -> bool:
        """Read on in a text, which begins with the one of the call before. Returns whether the SQL in it is final."""
        whole = len(text) < MAX_CHARACTERS
        if self._direct.end is None and self._prose_end is None:
            text = text[:MAX_CHARACTERS]
            self._direct.feed(text)
            if not self._direct.is_possible(text) and self._direct.end is None:
                self._search_new_question(text)
        return self._direct.end is not None or self._prose_end is not None or not whole

    def _search_new_question(self, text: str) -> None:
        """A model that does not end goes on with a question of its own; its answer ends there, if it held a query."""
        while self._checks and (match := _NEW_QUESTION.search(text, self._searched)):
            self._searched = match.end()
            self._checks -= 1
            before = text[: match.start()]
            blocks = blocks_in(_without_thought(before))
            if all(block.closed for block in blocks) and _read_whole(before, self._dialect) is not None:
                self._prose_end = match.start()
                return
        self._searched = max(self._searched, text.rfind("\n", 0, -1) + 1)

    def result(self, text: str) -> SqlAnswer:
        """The SQL of the text that `feed` was given last, if it ends there."""
        if self._direct.end is not None:
            return SqlAnswer(on_one_line(self._direct.sql or "", dialect=self._dialect), self._direct.several)
        text = text[:MAX_CHARACTERS][: self._prose_end]
        return _read_whole(text, self._dialect) or SqlAnswer(
            on_one_line(_looks_like_sql(text, self._dialect), dialect=self._dialect)
        )


def _read_whole(text: str, dialect: str) -> SqlAnswer | None:
    """The query in a text that will not grow; None if no part of it reads as a query."""
    direct = DirectSql(dialect)
    direct.feed(text, final=True)
    body = _without_thought(text)
    if direct.sql is None and body != text:
        direct = DirectSql(dialect)
        direct.feed(body, final=True)
    if direct.sql is not None:
        return SqlAnswer(on_one_line(direct.sql, dialect=dialect), direct.several)
    blocks = blocks_in(body)
    inline = [Block(match[2], "sql", True, *match.span()) for match in _INLINE.finditer(body)]
    texts = [Block(_json_text(match[1]), "sql", True, *match.span()) for match in _JSON.finditer(body)]
    boxed = [Block(match[1].replace("\\", ""), "sql", True, *match.span()) for match in _BOXED.finditer(body)]
    return (
        _of_blocks(body, blocks, dialect)
        or _of_blocks(body, texts, dialect)
        or _of_blocks(body, boxed[-_TRIES:], dialect)
        or _of_blocks(body, inline[-_TRIES:], dialect)
        or _of_lines(body, dialect)
        or _of_blocks(body, _quoted(body)[-_TRIES:], dialect)
    )


def _quoted(body: str) -> list[Block]:
    return [
        Block(re.sub(r"\\(['\"])", r"\1", match[2]), "sql", True, *match.span()) for match in _QUOTED.finditer(body)
    ]


def _without_thought(text: str) -> str:
    """The answer itself: without thoughts, closed or not, without the tokens of a chat template and what comes after them."""
    body = _outside_thoughts(_CHANNEL.sub("", text))
    body = _LEADING.sub("", body, count=1) if _LEADING.match(body) else body
    answer = _ANSWER.match(body)
    body = answer[1] if answer else body
    end = _TURN.search(body)
    return body[: end.start()] if end else body


def _outside_thoughts(text: str) -> str:
    """A thought without its first tag, which some prompts end with, begins where the answer begins."""
    parts: list[str] = []
    start, thinks = 0, ""
    for match in _THOUGHT.finditer(text):
        closes, name = bool(match[1] or match[3]), (match[2] or match[4]).lower()
        if not thinks and closes:
            parts, start = [], match.end()
        elif not thinks:
            parts.append(text[start : match.start()])
            thinks = name
        elif closes and name == thinks:
            start, thinks = match.end(), ""
    return "".join(parts) if thinks else "".join([*parts, text[start:]])


def _json_text(literal: str) -> str:
    try:
        return str(json.loads(literal, strict=False))
    except ValueError:
        return ""


def _of_blocks(body: str, blocks: list[Block], dialect: str) -> SqlAnswer | None:
    """The last block with a query that is not called an alternative; of those marked as SQL, if there are any."""
    chosen: tuple[tuple[bool, bool, bool], SqlAnswer] | None = None
    end = 0
    for block in blocks:
        answer, is_query = _of_block(block.text, dialect)
        if answer is not None:
            rank = is_query, block.closed, block.language in LANGUAGES
            alternative = _ALTERNATIVE.search(body[max(end, block.start - 300) : block.start])
            if chosen is None or rank > chosen[0] or (rank == chosen[0] and not alternative):
                chosen = rank, answer
            end = block.end
    return chosen[1] if chosen else None


def _of_block(text: str, dialect: str) -> tuple[SqlAnswer | None, bool]:
    """The first query in the text of a block, else its first other statement, and whether it is a query."""
    parts = _statements(text, dialect)
    kinds = [reading(part, dialect) for part in parts]
    several = sum(kind in ("query", "statement") for kind in kinds) > 1
    for part, kind in zip(parts, kinds, strict=True):
        query = part if kind == "query" else longest_query(part, dialect)
        if query is not None:
            return SqlAnswer(on_one_line(query, dialect=dialect), several), True
    if "statement" in kinds:
        return SqlAnswer(on_one_line(parts[kinds.index("statement")], dialect=dialect), several), False
    return None, False


def _statements(text: str, dialect: str) -> list[str]:
    """The parts of a block between its semicolons, without labels and without those that hold nothing but comments."""
    parts, start = [], 0
    for piece in pieces(text, dialect=dialect):
        if piece.text == ";" and not ends_entity(text, piece.start):
            parts.append(text[start : piece.start])
            start = piece.start + 1
    parts = [without_entities(part, dialect) for part in (*parts, text[start:])]
    unlabelled = [_UNLABELLED.sub("", part, count=1) for part in parts]
    return [part for part in unlabelled if on_one_line(part, dialect=dialect)][:_TRIES]


def _of_lines(body: str, dialect: str) -> SqlAnswer | None:
    """The first query that follows a label, else at the start of a line, else anywhere."""
    tried: set[int] = set()
    for pattern in (_LABELLED, _LINE, _ANYWHERE):
        for match in islice(pattern.finditer(body), _TRIES):
            if match.end() in tried:
                continue
            tried.add(match.end())
            direct = DirectSql(dialect)
            direct.feed(body[match.end() :], final=True)
            if direct.sql is not None:
                return SqlAnswer(on_one_line(direct.sql, dialect=dialect), direct.several)
    return None


def _looks_like_sql(text: str, dialect: str) -> str:
    """Where nothing reads as a query: the last fence marked as SQL, else from the first line on that begins like a query, else
    all; up to the first end of a statement outside quotes and comments."""
    body = _without_thought(text)
    begins = re.compile(rf"^[ \t]*+(?=\(*+(?:{_SQL})\b)", re.IGNORECASE | re.MULTILINE)
    blocks = [block for block in blocks_in(body) if block.language in LANGUAGES or begins.match(block.text)]
    blocks = [block for block in blocks if block.closed] or blocks
    if blocks:
        return next(iter(_statements(blocks[-1].text, dialect)), "")
    start = _LABELLED.search(body) or begins.search(body)
    rest = body[start.end() if start else 0 :].lstrip()
    for piece in pieces(rest, dialect=dialect):
        match = _END.search(piece.text) if piece.kind == "space" else _END.match(rest, piece.start)
        if match is not None:
            return rest[: match.start() + (piece.start if piece.kind == "space" else 0)]
    return rest
