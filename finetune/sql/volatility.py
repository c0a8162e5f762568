"""Whether the text of a query uses the clock or random numbers, by the functions of its dialect.

Not recognised: what a view or a function of the user does; a text that only its column's type makes a time (`day = 'today'`).
"""

import re
from collections.abc import Sequence

import sqlglot
from sqlglot.errors import SqlglotError
from sqlglot.tokens import Token

_CLOCK_WORDS = {"current_timestamp", "current_date", "current_time", "localtimestamp", "sysdate", "systimestamp"}
_CLOCK_WORDS_OF = {
    "postgres": {"localtime"},
    "mysql": {"localtime", "utc_date", "utc_time", "utc_timestamp"},
    "snowflake": {"localtime"},
    "duckdb": {"localtime", "current_localtime", "current_localtimestamp"},
    "trino": {"localtime"},
}
"""Words that are the clock also without parentheses, of all dialects and of some."""
_CLOCK_CALLS = {
    *("now", "getdate", "getutcdate", "sysdatetime", "sysutcdatetime", "curdate", "curtime", "utc_timestamp", "utc_date"),
    *("utc_time", "clock_timestamp", "statement_timestamp", "transaction_timestamp", "timeofday", "current_datetime"),
    *("localtime", "today", "sysdatetimeoffset", *_CLOCK_WORDS),
}  # fmt: skip
_CLOCK_CALLS_OF = {
    "duckdb": {"get_current_time", "get_current_timestamp", "current_localtime", "current_localtimestamp"},
    "clickhouse": {"now64", "nowinblock", "yesterday", "utctimestamp"},
}
_ARGUMENTS = {"unix_timestamp": 0}
_ARGUMENTS_OF = {"postgres": {"age": 1}, "duckdb": {"age": 1}}
"""Functions that are the clock only with this number of arguments: PostgreSQL's age(x) is today's date minus x
(https://www.postgresql.org/docs/current/functions-datetime.html), MySQL's UNIX_TIMESTAMP(x) is of x alone."""
_RANDOM_CALLS = {
    *("random", "randomblob", "rand", "randn", "newid", "uuid", "uuid_string", "gen_random_uuid", "generate_uuid"),
    *("randstr", "uniform", "random_normal", "uuid_generate_v4", "uuidv4", "uuidv7", "sys_guid"),
}  # fmt: skip
_DATE_CALLS = {"date", "time", "datetime", "julianday", "strftime", "unixepoch", "timediff"}
"""SQLite's date functions, for which the text 'now' is the clock, 'localtime' the machine's time zone, and no time is 'now'
(https://sqlite.org/lang_datefunc.html)."""
_TIMES_AS_TEXT = {"now", "today", "tomorrow", "yesterday"}
"""Texts that PostgreSQL and DuckDB read as the clock where they become a time."""
_TIME_TYPES = {"date", "time", "timestamp", "timestamptz", "timetz"}

_STEMS = (
    "date",
    "time",
    "now",
    "rand",
    "uuid",
    "newid",
    "julian",
    "unixepoch",
    "today",
    "uniform",
    "age",
    "guid",
    "day",
    "tomorrow",
)
"""Each of these functions has one of them in its name."""
_CALLS = {*_CLOCK_CALLS, *_RANDOM_CALLS, *_DATE_CALLS, *_ARGUMENTS}.union(
    *_CLOCK_CALLS_OF.values(), *_ARGUMENTS_OF.values()
)
_WORDS = _CLOCK_WORDS.union(*_CLOCK_WORDS_OF.values(), (f"'{text}" for text in _TIMES_AS_TEXT))
_FUNCTION = re.compile(rf"(?:{'|'.join(sorted(_CALLS))})\s*\(|{'|'.join(sorted(_WORDS))}|--|/\*|\#|//").search
"""One of them as it has to be written, or the beginning of a comment, which may stand before the parenthesis."""


def volatility(sql: str, dialect: str = "sqlite") -> str | None:
    """ "random" or "clock" if the text of the query uses such a function, else None. What a view does is not in the text."""
    if not _may_be_volatile(sql):
        return None
    try:
        tokens = sqlglot.tokenize(sql, read=dialect)
    except (SqlglotError, ValueError):
        return None
    if not tokens:
        return None
    words = [token.text.lower() for token in tokens]
    quoted = [token.token_type.name in ("STRING", "IDENTIFIER") for token in tokens]
    calls = {
        word for word, after, text in zip(words, [*words[1:], ""], quoted, strict=True) if after == "(" and not text
    }
    if calls & _RANDOM_CALLS:
        return "random"
    plain = {word for word, text in zip(words, quoted, strict=True) if not text}
    if calls & (_CLOCK_CALLS | _CLOCK_CALLS_OF.get(dialect, set())):
        return "clock"
    if plain & (_CLOCK_WORDS | _CLOCK_WORDS_OF.get(dialect, set())) or _has_as_many_arguments(words, quoted, dialect):
        return "clock"
    if dialect in ("postgres", "duckdb") and _has_time_as_text(tokens, words):
        return "clock"
    if dialect == "sqlite" and calls & _DATE_CALLS:
        texts = {word for word, text in zip(words, quoted, strict=True) if text}
        if texts & {"now", "localtime", "utc"} or _asks_for_now(words):
            return "clock"
    return None


def _may_be_volatile(sql: str) -> bool:
    """Whether it is worth to look closer: most queries use no such function, and a tokenizer takes a hundred times as long."""
    text = sql.lower()
    return any(stem in text for stem in _STEMS) and _FUNCTION(text) is not None


def _has_as_many_arguments(words: Sequence[str], quoted: Sequence[bool], dialect: str) -> bool:
    """Whether a function is called with the number of arguments that makes it the clock."""
    wanted = _ARGUMENTS | _ARGUMENTS_OF.get(dialect, {})
    return any(
        word in wanted and not text and words[start + 1] == "(" and _arguments(words, start + 1) == wanted[word]
        for start, (word, text) in enumerate(zip(words[:-1], quoted, strict=False))
    )


def _arguments(words: Sequence[str], opening: int) -> int | None:
    """The number of arguments of a call; None where it is no call, but the columns of a WITH table."""
    depth = commas = 0
    for place in range(opening, len(words)):
        depth += (words[place] == "(") - (words[place] == ")")
        commas += words[place] == "," and depth == 1
        if depth == 0:
            after = words[place + 1 : place + 3]
            is_with = after[:1] == ["as"] and after[1:] in (["("], ["materialized"], ["not"])
            return None if is_with else 0 if place == opening + 1 else commas + 1
    return None


def _has_time_as_text(tokens: Sequence[Token], words: Sequence[str]) -> bool:
    """Whether a text such as 'today' is cast to a time: date 'today', 'now'::timestamp, CAST('now' AS date)."""
    for place, token in enumerate(tokens):
        if token.token_type.name != "STRING" or words[place] not in _TIMES_AS_TEXT:
            continue
        cast, kind = words[place + 1 : place + 2], words[place + 2 : place + 3]
        is_cast = cast == ["::"] or (
            cast == ["as"] and words[max(0, place - 2) : place] in (["cast", "("], ["try_cast", "("])
        )
        if (place and words[place - 1] in _TIME_TYPES) or (is_cast and not _TIME_TYPES.isdisjoint(kind)):
            return True
    return False


def _asks_for_now(words: Sequence[str]) -> bool:
    """Whether a date function of SQLite is called without a time: date(), strftime('%Y')."""
    for start, word in enumerate(words[:-2]):
        if word not in _DATE_CALLS or words[start + 1] != "(":
            continue
        if words[start + 2] == ")" or (word == "strftime" and words[start + 3 : start + 4] == [")"]):
            return True
    return False
