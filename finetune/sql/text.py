"""SQL as text: functions that also work on queries that do not parse, and that leave quoted text unchanged."""

import re
import sqlite3
from itertools import pairwise

_TOKEN = re.compile(
    r"""(?P<text>'(?:[^']|'')*')
      | (?P<name>"(?:[^"]|"")*")
      | (?P<other_name>`(?:[^`]|``)*`|\[[^\]]*\])
      | (?P<comment>--[^\n]*|/\*.*?(?:\*/|\Z))
      | (?P<space>\s+)
      | (?P<word>\w+)
      | (?P<sign>.)""",
    re.VERBOSE | re.DOTALL,
)


def double_quotes_as_names(sql: str) -> str:
    """The query with every "name" rewritten as `name`, which SQLite never reads as a string literal.

    SQLite reads a double-quoted name that matches nothing as text (https://sqlite.org/quirks.html,
    "Double-quoted string literals are accepted"), so that a misspelt column is a constant instead of an error.
    """

    def rewrite(match: re.Match[str]) -> str:
        if match["name"] is None:
            return match[0]
        name = match["name"][1:-1].replace('""', '"').replace("`", "``")
        return f"`{name}`"

    return _TOKEN.sub(rewrite, sql)


def without_distinct(sql: str) -> str:
    """The first statement without its DISTINCT keywords, as the test-suite evaluator runs it by default."""
    first = next(iter(statements(sql)), "")
    return _TOKEN.sub(lambda match: "" if (match["word"] or "").lower() == "distinct" else match[0], first)


def has_order_by(sql: str) -> bool:
    """Whether ORDER BY occurs anywhere in the query outside quotes and comments."""
    words = [
        (match["word"] or "").lower() for match in _TOKEN.finditer(sql) if not (match["space"] or match["comment"])
    ]
    return ("order", "by") in pairwise(words)


def statements(sql: str) -> list[str]:
    """The statements of a script, each with its semicolon; a trigger's body is not split."""
    found, current = [], ""
    for match in _TOKEN.finditer(sql):
        current += match[0]
        if match[0] == ";" and sqlite3.complete_statement(current.replace("\0", " ")):
            found.append(current.strip())
            current = ""
    return [statement for statement in [*found, current.strip()] if on_one_line(statement) not in ("", ";")]


def on_one_line(sql: str) -> str:
    """The text without comments, with single spaces, and no space just inside parentheses or before a comma."""
    parts: list[str] = []
    for match in _TOKEN.finditer(sql):
        if match["space"] or match["comment"]:
            if parts and parts[-1] not in ("(", " "):
                parts.append(" ")
            continue
        if match[0] in (",", ")", ";") and parts and parts[-1] == " ":
            parts.pop()
        parts.append(match[0])
        if match[0] == ",":
            parts.append(" ")
    return "".join(parts).strip()


def shortened(statement: str) -> str:
    """The statement on one line, cut to 120 characters, for messages."""
    line = on_one_line(statement)
    return line if len(line) <= 120 else line[:117] + "..."
