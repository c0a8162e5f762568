"""Splits SQL text of any dialect into pieces: quoted text, quoted names, comments, spaces, words and signs.

The pieces of a text are the whole text, so that what is not SQL (a model's answer, prose) can be split, too, and nothing is
lost. One pass, in time proportional to the length. What is quoted how in a dialect is read off sqlglot's tokenizer of that
dialect, which throws away comments and spaces, rejects what it cannot read, and knows too little in these places, where the
engines' own documentation and grammars decide:

- Athena reads queries as Trino does and only its DDL as Hive does; sqlglot's table holds the rules of both.
- In PostgreSQL and its relatives a text in quotes goes on after a line break, by the rules of its beginning: E'a' <line break>
  '\\'b'.
- Spark, Databricks and Doris continue a -- comment that ends with a backslash on the next line.
- ClickHouse has // comments, and # begins one only before a space or an exclamation mark.
- MySQL and its relatives execute what is inside /*! ... */ (MariaDB: /*M! ... */).
- {# ... #}, which sqlglot takes for a comment in every dialect, is one in none.

SQLite's rules are written out here, because reading SQLite's text must not need sqlglot, which takes long to import.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from finetune.sql.dialects import dialect_name

MAX_STATEMENT_BYTES = 1_000_000
"""A longer statement is refused before anything reads it; SQLite's own default limit (SQLITE_MAX_SQL_LENGTH)."""

Kind = Literal["text", "name", "comment", "hint", "space", "word", "sign"]


class Piece(NamedTuple):
    """A part of an SQL text.

    kind: `text` and `name` with their quotes; `hint`: a comment that the engine heeds (an optimizer hint, the beginning of
    MySQL's executed comments); `sign`: any other single character. closed: whether the end of the quotes or comment was found;
    if not, the piece is all the rest of the text.
    """

    kind: Kind
    text: str
    start: int
    closed: bool = True

    @property
    def word(self) -> str:
        """The word in lower case; "" if the piece is none."""
        return self.text.lower() if self.kind == "word" else ""

    @property
    def is_code(self) -> bool:
        return self.kind not in ("space", "comment")


_PLAIN = frozenset(("space", "word", "sign"))
_new_piece = tuple.__new__
"""Half of the time of splitting a text is spent on making pieces, which the class itself does more slowly."""

_OPENS = re.compile(r"""['"`\[$]|/\*""").search
"""What a quote or a block comment of any dialect begins with."""

FindEnd = Callable[[str, "re.Match[str]"], int]
"""Text and match of an opening quote -> the offset after the closing one, or -1 if there is none."""


@dataclass(frozen=True)
class _Quoted:
    kind: Kind
    opening: str
    """A regular expression."""
    end: FindEnd


@dataclass(frozen=True)
class _Lexer:
    quoted: tuple[_Quoted, ...]
    pattern: re.Pattern[str]
    unclosed_comment_is_one: bool


def pieces(sql: str, *, dialect: str = "sqlite", start: int = 0) -> Iterator[Piece]:
    """The pieces of the text in order, from an offset on at which a piece begins.

    Raises UserError for an unknown dialect, and nothing else: any text has pieces.
    """
    lexer = _lexer("athena hive" if _is_hive_part_of_athena(sql, dialect) else dialect)
    position, match_at = start, lexer.pattern.match
    while match := match_at(sql, position):
        group, end = match.lastgroup or "", match.end()
        if group in _PLAIN:
            yield _new_piece(Piece, (group, match[0], position, True))
            position = end
            continue
        quoted = lexer.quoted[int(group[1:])]
        end = quoted.end(sql, match)
        closed = end >= 0 or (quoted.kind == "comment" and lexer.unclosed_comment_is_one)
        end = end if end >= 0 else len(sql)
        yield Piece(quoted.kind, sql[position:end], position, closed)
        position = end


def unclosed(sql: str, *, dialect: str = "sqlite") -> str | None:
    """What is opened in the text and not closed, and where, in one line; None if all is closed."""
    if not _OPENS(sql):
        return None
    end = deque(pieces(sql, dialect=dialect), maxlen=1)
    if not end or end[0].closed:
        return None
    last = end[0]
    line = sql.count("\n", 0, last.start) + 1
    column = last.start - (sql.rfind("\n", 0, last.start) + 1) + 1
    what = {"comment": "a comment", "hint": "a comment", "name": "a quoted name"}.get(last.kind, "a quoted text")
    return f"line {line}, column {column}: {what} begins there ({last.text[:20]!r}) and is not closed"


def too_long(sql: str) -> str | None:
    """Why a statement is too long to be read, in one line; None if it is not."""
    if len(sql) <= MAX_STATEMENT_BYTES // 4:  # a character has four bytes at most
        return None
    size = len(sql) if len(sql) > MAX_STATEMENT_BYTES else len(sql.encode("utf-8", "surrogatepass"))
    if size <= MAX_STATEMENT_BYTES:
        return None
    return f"the statement is {size / 1e6:.1f} MB long; {MAX_STATEMENT_BYTES / 1e6:.0f} MB is the limit"


@lru_cache(maxsize=64)
def _lexer(dialect: str) -> _Lexer:
    name = "hive" if dialect == "athena hive" else dialect_name(dialect)
    quoted = _SQLITE if name == "sqlite" else tuple(_quoted_in("trino" if name == "athena" else name))
    openings = [f"(?P<q{number}>{part.opening})" for number, part in enumerate(quoted)]
    pattern = "|".join([*openings, r"(?P<space>\s+)", r"(?P<word>\w[\w$]*+)", r"(?P<sign>.)"])
    return _Lexer(quoted, re.compile(pattern, re.DOTALL), unclosed_comment_is_one=name == "sqlite")


def _is_hive_part_of_athena(sql: str, dialect: str) -> bool:
    return (
        dialect.lower().endswith("athena")
        and re.match(r"\s*(create|alter|drop|describe|show)\b", sql, re.I) is not None
    )


# Ends of quotes and comments ----------------------------------------------------------------------------------


def _until(pattern: str) -> FindEnd:
    """The end of what a regular expression matches after the opening. It must be linear: no repetition may backtrack."""
    compiled = re.compile(pattern, re.DOTALL)

    def end(sql: str, opening: "re.Match[str]") -> int:
        match = compiled.match(sql, opening.end())
        return match.end() if match else -1

    return end


def _doubled(quote: str) -> FindEnd:
    """Up to the closing quote; two in a row stand for one."""
    close = re.escape(quote)
    return _until(rf"[^{close}]*+(?:{close}{close}[^{close}]*+)*+{close}")


def _escaped(quote: str, also: str = "") -> FindEnd:
    """Up to the closing quote; a backslash takes away the meaning of the next character. also: what may follow the end."""
    close = re.escape(quote)
    return _until(rf"[^{close}\\]*+(?:(?:\\.|{close}{close})[^{close}\\]*+)*+{close}{also}")


def _tripled(quote: str) -> FindEnd:
    return _until(rf"(?:[^{quote}\\]|\\.|{quote}(?!{quote}{quote}))*+{quote}{quote}{quote}")


def _found(closing: Callable[["re.Match[str]"], str]) -> FindEnd:
    """Up to a plain text that follows from the opening."""

    def end(sql: str, opening: "re.Match[str]") -> int:
        close = closing(opening)
        found = sql.find(close, opening.end())
        return found + len(close) if found >= 0 else -1

    return end


def _nested(sql: str, opening: "re.Match[str]") -> int:
    depth = 1
    for sign in re.compile(r"/\*|\*/").finditer(sql, opening.end()):
        depth += 1 if sign[0] == "/*" else -1
        if depth == 0:
            return sign.end()
    return -1


def _nothing_more(_: str, opening: "re.Match[str]") -> int:
    return opening.end()


_BLOCK = _found(lambda _: "*/")
_SQLITE = (
    _Quoted("text", "'", _doubled("'")),
    _Quoted("name", '"', _doubled('"')),
    _Quoted("name", "`", _doubled("`")),
    _Quoted("name", r"\[", _until(r"[^\]]*+\]")),
    _Quoted("comment", "--", _until(r"[^\n]*+")),
    _Quoted("comment", r"/\*", _BLOCK),
)

# The rules of the other dialects, from sqlglot's tokenizers ---------------------------------------------------

_EXECUTED_COMMENTS = {"mysql", "doris", "starrocks", "singlestore"}
_CONTINUED_COMMENTS = {"spark", "spark2", "databricks", "doris"}
_CONTINUATION = r"(?:[ \t\f\v]*+(?:--[^\r\n]*+)?[\r\n](?:\s|--[^\r\n]*+[\r\n])*+'[^'\\]*+(?:(?:\\.|'')[^'\\]*+)*+')*+"


def _quoted_in(name: str) -> Iterator[_Quoted]:
    """All that is quoted or commented in a dialect; of two that begin alike, the longer opening first."""
    from sqlglot.dialects.dialect import Dialect

    rules = Dialect.get_or_raise(name).tokenizer_class
    yield from _comments_in(name, rules)
    yield from _prefixed_texts_in(name, rules)
    for quote in sorted(rules._QUOTES, key=len, reverse=True):
        if len(quote) == 3:
            yield _Quoted("text", re.escape(quote), _tripled(quote[0]))
        elif len(quote) == 1:
            yield _Quoted("text", re.escape(quote), (_escaped if "\\" in rules.STRING_ESCAPES else _doubled)(quote))
    for opening, closing in rules._IDENTIFIERS.items():
        if opening not in rules._QUOTES:
            how = _escaped if "\\" in rules.IDENTIFIER_ESCAPES else _doubled
            yield _Quoted("name", re.escape(opening), how(closing))


def _comments_in(name: str, rules: Any) -> Iterator[_Quoted]:
    if name in _EXECUTED_COMMENTS:  # what is inside is code, so only the sign itself is a piece; */ are two more
        yield _Quoted("hint", r"/\*M?!\d*+", _nothing_more)
    if "/*+" in rules._COMMENTS:
        yield _Quoted("hint", r"/\*\+", _BLOCK)
    line_end = r"[^\n]*+" if rules.COMMENTS_TERMINATE_AT_NEWLINE_ONLY else r"[^\r\n]*+"
    line_end = r"(?:\\\n|[^\r\n])*+" if name in _CONTINUED_COMMENTS else line_end
    dashes = r"--(?=[\x00-\x20\x7f]|\Z)" if rules.DASH_COMMENT_REQUIRES_BOUNDARY else "--"
    openings = {"--": dashes, "#": r"\#", "//": "//"}
    if name == "clickhouse":
        openings |= {"#": r"\#(?=[\s!])"}
    for opening in [*rules.COMMENTS, *(["//"] if name == "clickhouse" else [])]:
        if opening in openings:
            yield _Quoted("comment", openings[opening], _until(line_end))
    yield _Quoted("comment", r"/\*", _nested if rules.NESTED_COMMENTS else _BLOCK)


def _prefixed_texts_in(name: str, rules: Any) -> Iterator[_Quoted]:
    """Texts with a letter or a tag before the quote, if they end by other rules than texts without."""
    tag = {"clickhouse": r"\w*+", "snowflake": ""}.get(name, r"(?:[^\W\d]\w*+)?")
    if "$" in rules._FORMAT_STRINGS or "$$" in rules._FORMAT_STRINGS:
        yield _Quoted("text", rf"\${tag}\$", _found(lambda opening: opening[0]))
    if name == "oracle":
        pairs = {"[": "]", "{": "}", "(": ")", "<": ">"}
        yield _Quoted("text", r"[nN]?[qQ]'\S", _found(lambda opening: pairs.get(opening[0][-1], opening[0][-1]) + "'"))
    if "e'" in rules._FORMAT_STRINGS and "\\" in rules.BYTE_STRING_ESCAPES:
        yield _Quoted("text", "[eE]'", _escaped("'", also=_CONTINUATION))
    if "r'" in rules._FORMAT_STRINGS and not rules.STRING_ESCAPES_ALLOWED_IN_RAW_STRINGS:
        for quote in ("'", '"'):
            yield _Quoted("text", f"[rR]{quote}", _until(f"[^{quote}]*+{quote}"))
