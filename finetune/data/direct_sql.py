"""Follows an answer that begins with its SQL, and finds the SQL's end as soon as no further text could change it.

The text may grow between two calls. Each item of it is read once, so that following an answer takes time in proportion to its
length; the parser is only asked where the SQL may have ended.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass

from finetune.data.fences import LANGUAGES
from finetune.sql.lexer import pieces
from finetune.sql.syntax import QUERY_WORDS, STATEMENT_WORDS, Reading, reading

TURN = r"<\|[\w. -]{1,40}\|>|<｜[^｜\n]{1,40}｜>|</?s>|<(?:start|end)_of_turn>|<(?:eos|bos|pad)>|\[/?INST\]"
"""Tokens of chat templates, where the tokenizer that decodes them takes them for plain text."""
THOUGHTS = "think|thinking|thought|thoughts|reasoning|reason|reflection|scratchpad|analysis|inner_monologue"
MARK = r"(?:(?:[-*+>•]|\(?\d{1,3}[.)])[ ]+)"
"""A list's bullet or number, or the mark of a quotation."""
LABEL = r"""(?:[*_#>-][*_#>\ -]{0,8})?
    (?:(?:(?:the|my|here'?s|here[ ]is|so|therefore|final|correct|corrected|resulting|generated|complete)[, ]{1,3}){0,4}
    (?:sql(?:ite)?|postgresql|mysql|query|answer|solution|result|output|response)
    (?:[ ]{1,3}(?:sql|query|statement|code|command|answer|is|would[ ]be)){0,4}[ *_]{0,4}:\s{0,20}[*_]{0,3}\s{0,20}
    |(?:(?:sqlite|mysql|duckdb)>|(?<![\w-])[\w-]{1,30}=[\#>])[ ]+)"""
"""`SQL:`, `**Final answer:**`, `Here is the query:`, or the prompt of a database shell. For a verbose pattern."""

ANSWERS = "answer|final_answer|final|solution|response|output|sql_query|sql|query"
"""Tags in which models were told to put their answer. SQLCoder's are [SQL] and [/SQL]."""

_LANGUAGE = "|".join(map(re.escape, sorted(LANGUAGES, key=len, reverse=True)))
_BEFORE = rf"""\s*(?:(?!<\|begin_of_thought)(?:{TURN})\s*|assistant\s*(?:\n|:)\s*|<(?:{ANSWERS})>\s*|\[SQL\]\s*
        |[<◁](?P<thought>{THOUGHTS})[>▷](?>.*?[<◁]/(?P=thought)[>▷])\s*)*
    {MARK}?(?:{LABEL})?
    (?:(?P<fence>```+|~~~+)\s*\{{?\.?(?:(?:{_LANGUAGE})(?![\w-]))?\}}?\s*(?:{LABEL})?)?"""
_COMMENTS = r"(?:--[^\n]*\n\s*|/\*(?>.*?\*/)\s*|\(\s*)*"
_FLAGS = re.DOTALL | re.IGNORECASE | re.VERBOSE
_BEGINNING = re.compile(
    rf"""{_BEFORE}(?P<sql>{_COMMENTS}(?:{"|".join((*QUERY_WORDS, *STATEMENT_WORDS))})(?=[\s("'`*\[/+.\d-]))""", _FLAGS
)
_UNFINISHED = re.compile(rf"{_BEFORE}{_COMMENTS}(?:[<◁](?:{THOUGHTS})[>▷](?!.*[<◁]/)|/\*(?!.*\*/)|--[^\n]*\Z)", _FLAGS)
"""A thought or comment before the SQL that has not ended."""
_END = re.compile(
    rf"[;；。]|(?<=\n)\#\#\#|```|~~~|{TURN}|[<◁]/?(?:{THOUGHTS}|answer|sql|query)[>▷]|</(?:{ANSWERS})>|\[/SQL\]",
    re.IGNORECASE,
)
"""What may end the SQL, outside of its quotes and comments; so may a blank line."""
_ENTITY = r"&(?:[gl]t|amp|quot|apos|\#0?39|\#x27)"
_ENTITY_ENDS = re.compile(rf"{_ENTITY}\Z", re.IGNORECASE)
_END_STARTS = frozenset(";；。#`~<◁[")
"""The first characters of what `_END` matches: most pieces need not be matched against it."""
_GAP = re.compile(r"\n[ \t\r]*\n")
_MAY_END = re.compile(rf"[{''.join(map(re.escape, sorted(_END_STARTS)))}]|{_GAP.pattern}")
_GOES_ON_TEXT = """
    and cross except fetch full group having inner intersect join left limit minus natural offset on or order outer qualify
    right union using where window
"""
_GOES_ON = frozenset(_GOES_ON_TEXT.split())
"""Words that go on with a query after a blank line; no statement begins with them."""
_NEXT = re.compile(r"(?:\s+|--[^\n]*+\n|/\*(?>.*?\*/))*+(\w*+)", re.DOTALL)
_MORE_COMMENT = re.compile(r"--[^\n]*+\Z|/\*(?!.*?\*/)|[-/]\Z", re.DOTALL)
_PARTIAL = re.compile(r"(?:[<◁][^\s<>]{0,40}|(?<=\n)\#{1,2}|[`~]{1,2}|\$[^\W\d]*|[nN]?[qQ]'|\[(?:/[sS]?[qQ]?[lL]?)?)\Z")
"""What may become the end of the SQL, or the beginning of a quote, when more text comes."""
_PARTIAL_STARTS = frozenset("<◁#`~$nNqQ[")
_CHECKS = 24
"""How often the parser is asked whether a blank line ends the query, and how many other statements may come before it."""


@dataclass
class DirectSql:
    """sql: the text of the query, None if none was found (yet). end: where in the text it became certain, None if it has not.
    several: whether another statement stands before or after the query."""

    dialect: str = "sqlite"
    sql: str | None = None
    end: int | None = None
    several: bool = False
    over: bool = False  # nothing more is to be found: the SQL has ended, or the text is prose
    _position: int | None = None  # None: the SQL has not begun
    _start: int = 0  # of the present statement
    _fenced: bool = False
    _checks: int = _CHECKS

    def is_possible(self, text: str) -> bool:
        """Whether more text may still show that the answer begins with SQL. text: as given to `feed` last."""
        return not self.over and (self._position is not None or _UNFINISHED.match(text) is not None)

    def feed(self, text: str, *, final: bool = False) -> None:
        """Read on in a text, which begins with the one of the call before. final: it will not grow."""
        if self._position is None and not self.over:
            self._begin(text)
        if final and self._position is not None and not _MAY_END.search(text, self._position):
            self._position = len(text)
        while not self.over and self._position is not None and self._position < len(text):
            if not self._read(text, final):
                break
        if final and not self.over and self._position is not None:
            self._close(text, len(text), reading(self._region(text, len(text)), self.dialect))

    def _region(self, text: str, end: int) -> str:
        return without_entities(text[self._start : end], self.dialect)

    def _begin(self, text: str) -> None:
        match = _BEGINNING.match(text)
        if match is not None:
            self._position = self._start = match.start("sql")
            self._fenced = match["fence"] is not None

    def _read(self, text: str, final: bool) -> bool:
        """Read up to what may end the SQL, and judge it. Returns whether there was any."""
        for piece in pieces(text, dialect=self.dialect, start=self._position or 0):
            first = piece.text[0]
            if piece.kind == "space":
                match = _GAP.search(piece.text)
            else:
                match = _END.match(text, piece.start) if first in _END_STARTS else None
            if match is not None:
                offset = piece.start if piece.kind == "space" else 0
                end = match.end() + offset
                if match[0] == ";" and ends_entity(text, piece.start):
                    self._position = end
                    return True
                goes_on = match[0][0] == "\n" and not self._fenced and _goes_on(text, end, final)
                if goes_on is None:
                    self._position = piece.start
                    return False
                self._position = end
                self._at_end(text, match.start() + offset, match[0], goes_on)
                return True
            if not final and (
                piece.start + len(piece.text) == len(text)
                or (first in _PARTIAL_STARTS and _PARTIAL.match(text, piece.start))
            ):
                return False  # it may go on
            self._position = piece.start + len(piece.text)
        return False

    def _at_end(self, text: str, start: int, kind: str, goes_on: bool) -> None:
        """What it means for the query: a semicolon, a blank line, a heading, a fence, a token of the chat template. goes_on:
        whether the word after a blank line may belong to the query."""
        if self._fenced and kind[0] in "\n#":
            return
        if kind[0] == "\n":
            self._checks -= 1
            if self._checks < 0:
                return
        region, end = self._region(text, start), start + len(kind)
        found = reading(region, self.dialect)
        if kind[0] == "\n" and (found == "open" or (goes_on and found != "none")):
            return
        if (
            found == "statement" and kind == ";" and self._checks > 0
        ):  # a query may follow, as after USE, PRAGMA or CREATE VIEW
            self.several = self.sql is not None
            self.sql = self.sql or region
            self._start = end
            self._checks -= 1
            return
        self._close(text, start, found)
        if self.sql is not None:
            self.end = end
            self.several = self.several or (kind == ";" and _begins_with_sql(text[end:], self.dialect))

    def _close(self, text: str, end: int, found: Reading) -> None:
        """The SQL goes no further than here. Prose may follow it in the text, as lines that do not belong to it."""
        region = self._region(text, end)
        query = region if found == "query" else longest_query(region, self.dialect)
        if query is not None:
            self.several = self.several or self.sql is not None
        elif found == "statement":
            self.several, query = self.sql is not None, self.sql or region
        self.sql = query or self.sql
        self.over = True


def is_all_sql(text: str) -> bool:
    """Whether the text begins with SQL and holds nothing that may end it, so that `feed` would read it in vain before its end."""
    return _MAY_END.search(text) is None and _BEGINNING.match(text) is not None


def ends_entity(text: str, position: int) -> bool:
    """Whether the semicolon there belongs to an entity of HTML, as in `a &gt; 3`."""
    return _ENTITY_ENDS.search(text[max(0, position - 6) : position]) is not None


def without_entities(sql: str, dialect: str) -> str:
    """The SQL with the entities of HTML outside its quotes replaced: some models were trained on the source of web pages."""
    if not re.search(f"{_ENTITY};", sql, re.IGNORECASE):
        return sql
    parts = [""]
    for piece in pieces(sql, dialect=dialect):
        if piece.kind in ("text", "name"):
            parts += [piece.text, ""]
        else:
            parts[-1] += piece.text
    return "".join(part if number % 2 else html.unescape(part) for number, part in enumerate(parts))


def _goes_on(text: str, position: int, final: bool) -> bool | None:
    """Whether the text goes on there, perhaps after comments, with a word that cannot begin a statement; None if more text
    decides it."""
    match = _NEXT.match(text, position)
    assert match is not None
    word = match[1].lower()
    grows = not final and (match.end() == len(text) or _MORE_COMMENT.match(text, match.end()))
    if grows and any(known.startswith(word) for known in _GOES_ON):
        return None
    return word in _GOES_ON


def _begins_with_sql(text: str, dialect: str) -> bool:
    rest = text.lstrip("; \t\r\n")
    if rest.startswith(("`", "~")):
        return False
    more = DirectSql(dialect)
    more.feed(rest, final=True)
    return more.sql is not None


def longest_query(region: str, dialect: str) -> str | None:
    """The most lines or sentences from the start of the text that are a complete query; None if there are none."""
    best = None
    ends = [match.start() for match in re.finditer(r"\n|(?<=\.)\s+(?=[A-Z])", region)][:_CHECKS]
    for end in (*ends, len(region)):
        part = region[:end]
        found = reading(part, dialect)
        if found == "query":
            best = part
            continue
        trimmed = part.rstrip(" \t\r\n.`*_|<>\\")
        if trimmed != part and reading(trimmed, dialect) == "query":
            best = trimmed
        if found == "none":
            break
    return best
