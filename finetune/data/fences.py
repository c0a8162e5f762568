"""The code fences of an answer in Markdown, as models write them: unclosed, on one line, one inside the other."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from finetune.sql.syntax import QUERY_WORDS, STATEMENT_WORDS

_LANGUAGES_TEXT = """
    sql sqlite sqlite3 mysql mariadb postgres postgresql pgsql plpgsql psql tsql t-sql mssql sqlserver
    bigquery snowflake spark sparksql spark-sql databricks duckdb oracle plsql hive hiveql presto trino
    redshift clickhouse
"""
LANGUAGES = frozenset(_LANGUAGES_TEXT.split())
"""The names of SQL behind a fence. They are also accepted on the first line inside it."""

_OPENING = re.compile(r"(?P<fence>`{3,}|(?:^|(?<=\n))~{3,})[ \t]*\{?\.?(?P<language>[A-Za-z][\w+#.-]*)?\}?")
_SQL_TAG = re.compile(
    r"(?<!['\"%])<(sql_query|sql|query|final_answer|final|solution|response|output|code)>(.*?)(</\1>|\Z)|\[SQL\]((?:(?!\[SQL\]).)*?)\[/SQL\]",
    re.DOTALL | re.IGNORECASE,
)
_QUOTATION = re.compile(r"^[ \t]*>[ ]?", re.MULTILINE)
_DEPTH = 3


@dataclass(frozen=True)
class Block:
    """text: what is inside. language: as written behind the fence, in lower case. start, end: its place in the answer."""

    text: str
    language: str
    closed: bool
    start: int
    end: int


def blocks_in(text: str, depth: int = _DEPTH) -> list[Block]:
    """The fences in their order; of one that holds others, those inside. Tags such as `<sql>` count as fences."""
    found: list[Block] = []
    position = 0
    while match := _OPENING.search(text, position):
        block, position = _block(text, match)
        inner = blocks_in(block.text, depth - 1) if depth and _OPENING.search(block.text) else []
        found += [replace(item, start=block.start, end=block.end) for item in inner] or [block]
    for match in _SQL_TAG.finditer(text):
        if not any(block.start < match.end() and match.start() < block.end for block in found):
            inside = match[2] if match[1] else match[4]
            closed = match[1] is None or bool(match[3])
            found.append(Block(inside, "sql", closed, match.start(), match.end()))
    return sorted(found, key=lambda block: block.start)


def _block(text: str, opening: re.Match[str]) -> tuple[Block, int]:
    """The block that begins at an opening fence, and the position to search on from."""
    fence, language = opening["fence"], (opening["language"] or "").lower()
    start = opening.end()
    if language in (*QUERY_WORDS, *STATEMENT_WORDS):  # ```SELECT 1```
        start, language = opening.end("fence"), ""
    line_end = text.find("\n", start)
    line_end = len(text) if line_end < 0 else line_end
    rest = text[start:line_end]
    on_one_line = bool(rest.strip()) and (language in LANGUAGES or not language or fence in rest)
    if on_one_line and not re.match(r"\s*[\w-]+\s*=", rest):  # ```sql title=x
        closing = re.compile(re.escape(fence))
    else:
        start = min(line_end + 1, len(text))
        closing = _closing(fence)
    end = closing.search(text, start)
    if end is None:
        return Block(text[start:], language, False, opening.start(), len(text)), len(text)
    nested = end.groupdict().get("nested")
    inside = text[start : end.start()]
    line_start = text.rfind("\n", 0, opening.start()) + 1
    if _QUOTATION.match(text, line_start):
        inside = _QUOTATION.sub("", inside)
    return Block(inside, language, True, opening.start(), end.end()), end.start() if nested else end.end()


def _closing(fence: str) -> re.Pattern[str]:
    """A closing fence, or the opening of the next one: a fence at the start of a line with a language behind it."""
    languages = "|".join(map(re.escape, sorted(LANGUAGES, key=len, reverse=True)))
    run = f"{re.escape(fence[0])}{{{len(fence)},}}"
    return re.compile(
        rf"(?P<nested>^[ \t>]*{run}(?=[ \t]*(?:{languages})\b))|^[ \t>]*{run}|{run}[ \t]*$",
        re.MULTILINE | re.IGNORECASE,
    )
