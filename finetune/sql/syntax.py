"""Whether a text reads as SQL, by its dialect's own parser: this decides between the candidates in a model's answer.

Nothing is executed, and no name is resolved: a query may name tables that do not exist.
"""

import re
import sqlite3
import threading
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from finetune.sql.dialects import dialect_name
from finetune.sql.lexer import Piece, pieces, too_long

Reading = Literal["query", "statement", "open", "none"]
"""query: one complete SELECT, WITH or VALUES. statement: one complete statement of another kind. open: the beginning of a
statement, which more text may complete. none: no SQL, whatever follows."""

QUERY_WORDS = ("select", "with", "values")
STATEMENT_WORDS = (
    "explain",
    "pragma",
    "insert",
    "update",
    "delete",
    "replace",
    "create",
    "drop",
    "alter",
    "merge",
    "use",
    "set",
)

MAX_PARSED_CHARACTERS = 50_000
"""A longer text is not given to sqlglot, which takes 0.2 s for 50,000 characters, and more where it has to guess."""

_PROSE_TEXT = """
    the these those this that which you we our your here
"""
_PROSE = frozenset(_PROSE_TEXT.split())
"""Words that prose cannot do without and that hardly any schema has as a name: `Select names from the list` parses."""
_NO_NAMES_TEXT = """
    all and as asc between by case cast collate current_date current_time current_timestamp date desc distinct
    else end escape except exists false glob group having in intersect interval is isnull like limit not
    notnull null offset on or order over partition recursive select then time timestamp true union using
    values when where with
"""
_NO_NAMES = frozenset(_NO_NAMES_TEXT.split())
_OPEN_WORDS_TEXT = """
    all and as between by case cross distinct else except exists from full group having ilike in inner
    intersect into is join left like limit minus natural not offset on or order over partition recursive
    returning right select set then union using values when where with
"""
_OPEN_WORDS = frozenset(_OPEN_WORDS_TEXT.split())
_MAIN = frozenset(("select", "values", "insert", "update", "delete", "merge", "replace", "table", "from"))


@lru_cache(maxsize=256)
def reading(sql: str, dialect: str = "sqlite") -> Reading:
    """How one text, without a closing semicolon, reads in a dialect. Raises UserError for an unknown one."""
    if too_long(sql):
        return "none"
    code = [piece for piece in pieces(sql, dialect=dialect) if piece.is_code]
    words = [piece.word for piece in code]
    first = next((piece.word for piece in code if piece.text != "("), "")
    if first not in (*QUERY_WORDS, *STATEMENT_WORDS) or not _PROSE.isdisjoint(words):
        return "none"
    found = _parsed(sql, code, words, dialect_name(dialect))
    if found == "query" and first not in QUERY_WORDS:
        return "statement"
    return "open" if found == "query" and _has_names_without_from(code, words) else found


def _has_names_without_from(code: list[Piece], words: list[str]) -> bool:
    """Whether there are columns, but no table that they could come from: `Select all names`. Such a query never runs."""
    if "from" in words or "table" in words or words[:1] == ["values"]:
        return False
    return any(
        word and not word[0].isdigit() and word not in _NO_NAMES and before != "as" and after not in ("(", "'")
        for (before, word), after in zip(pairwise(["", *words]), [*(p.text[0] for p in code[1:]), ""], strict=True)
    )


def _parsed(sql: str, code: list[Piece], words: list[str], dialect: str) -> Reading:
    """As `reading`, but every complete statement is a query."""
    if dialect == "sqlite" and code[0].text != "(":  # (SELECT ...) UNION SELECT ... is no SQLite, but a query
        return _by_sqlite(sql)
    if len(sql) > MAX_PARSED_CHARACTERS:
        return "none"
    if words[0] == "explain":
        return reading(sql[code[0].start + len("explain") :], dialect)
    return _by_sqlglot(sql, code, words, dialect)


def _by_sqlite(sql: str) -> Reading:
    """SQLite's own parser. An authorizer denies everything, so that it stops before it resolves a name or compiles anything."""
    explain = "" if re.match(r"\s*explain\b", sql, re.IGNORECASE) else "EXPLAIN "
    try:
        _parser().execute(explain + sql).close()
    except (sqlite3.Warning, sqlite3.ProgrammingError, ValueError):  # two statements, NUL, half of a surrogate pair
        return "none"
    except sqlite3.Error as error:
        message = str(error)
        if message == "incomplete input" or re.match(r"unrecognized token: \"['\"`\[]", message):
            return "open"
        return "none" if message.startswith("unrecognized token") or message.endswith("syntax error") else "query"
    return "query"


_connections = threading.local()


def _parser() -> sqlite3.Connection:
    """An empty database that allows nothing, so that no text can change it; one for each thread, as SQLite asks for."""
    connection: sqlite3.Connection | None = getattr(_connections, "parser", None)
    if connection is None:
        connection = _connections.parser = sqlite3.connect(":memory:", isolation_level=None, cached_statements=0)
        connection.set_authorizer(lambda *_: sqlite3.SQLITE_DENY)
    return connection


def _by_sqlglot(sql: str, code: list[Piece], words: list[str], dialect: str) -> Reading:
    from sqlglot import exp  # slow to import, and rarely needed for SQLite's queries
    from sqlglot.errors import ParseError

    from finetune.sql.parsing import parse_statements

    try:
        trees = [tree for tree in parse_statements(sql, dialect) if tree is not None]
    except ParseError:
        return "open" if _is_open(code, words) else "none"
    return "query" if len(trees) == 1 and not isinstance(trees[0], exp.Command | exp.Condition) else "none"


def _is_open(code: list[Piece], words: list[str]) -> bool:
    """Whether a text that does not parse ends where SQL has to go on: inside parentheses or quotes, in a CTE without its main
    query, after a comma, an operator or a word such as UNION."""
    depth, outside = 0, set()
    for piece in code:
        depth += (piece.text == "(") - (piece.text == ")")
        if depth == 0:
            outside.add(piece.word)
    last = code[-1]
    return (
        depth > 0
        or not last.closed
        or last.word in _OPEN_WORDS
        or (last.kind == "sign" and last.text in ",+-*/=<>|%")
        or (words[0] == "with" and _MAIN.isdisjoint(outside))
        or words.count("case") > words.count("end")
    )
