"""SQL as text: functions that also work on queries that do not parse, and that leave quoted text unchanged.

What is quoted is decided by the dialect's own rules: see finetune/sql/lexer.py.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

from finetune.sql.dialects import dialect_name
from finetune.sql.lexer import Piece, pieces

_NOT_PLAIN = re.compile(r"distinct|;|--|/\*|\#|//", re.IGNORECASE)
"""The word, the end of a statement, or the beginning of a comment in any dialect."""
_NOT_ON_ONE_LINE = re.compile(r"--|/\*|  |[^\S ]|\( | [,);]|,(?! )")
"""What `on_one_line` changes in SQLite's text, wherever it stands."""
_CREATE_WORDS = {"or", "replace", "alter", "temp", "temporary"}


def double_quotes_as_names(sql: str) -> str:
    """The SQLite query with every "name" rewritten as `name`, which SQLite never reads as a string literal.

    SQLite reads a double-quoted name that matches nothing as text (https://sqlite.org/quirks.html,
    "Double-quoted string literals are accepted"), so that a misspelt column is a constant instead of an error.
    """

    if '"' not in sql:
        return sql

    def rewritten(piece: Piece) -> str:
        if piece.kind != "name" or not piece.closed or piece.text[0] != '"':
            return piece.text
        name = piece.text[1:-1].replace('""', '"').replace("`", "``")
        return f"`{name}`"

    return "".join(map(rewritten, pieces(sql)))


def without_distinct(sql: str, *, dialect: str = "sqlite") -> str:
    """The first statement without its DISTINCT keywords, as the test-suite evaluator runs it by default."""
    if not _NOT_PLAIN.search(sql):  # most queries: one statement without the word, nothing to take apart
        return sql.strip()
    first = next(iter(statements(sql, dialect=dialect)), "")
    return "".join(piece.text for piece in pieces(first, dialect=dialect) if piece.word != "distinct")


def has_order_by(sql: str, *, dialect: str = "sqlite") -> bool:
    """Whether ORDER BY occurs in the query outside parentheses, quotes and comments."""
    depth, words = 0, [""]
    for piece in pieces(sql, dialect=dialect):
        depth += (piece.text == "(") - (piece.text == ")")
        if piece.is_code and depth == 0:
            words.append(piece.word)
    return ("order", "by") in pairwise(words)


def is_select(sql: str, *, dialect: str = "sqlite") -> bool:
    """Whether the text begins like a query: with SELECT, WITH or VALUES."""
    code = (piece for piece in pieces(sql, dialect=dialect) if piece.is_code)
    return next((piece.word for piece in code if piece.text != "("), "") in ("select", "with", "values")


def statements(sql: str, *, dialect: str = "sqlite") -> list[str]:
    """The statements of a script, each with its semicolon; a trigger's body is not split."""
    found = []
    for statement in _statements(pieces(sql, dialect=dialect)):
        code = [piece for piece in statement if piece.is_code]
        if code and (len(code) > 1 or code[0].text != ";"):
            found.append("".join(piece.text for piece in statement).strip())
    return found


def _statements(script: Iterable[Piece]) -> Iterator[list[Piece]]:
    """The pieces of each statement. A trigger ends with `; END;`, as in SQLite's sqlite3_complete()."""
    statement: list[Piece] = []
    words: list[str] = []
    """The words and signs of the statement up to its kind, then its last two."""
    is_trigger: bool | None = None
    for piece in script:
        statement.append(piece)
        if not piece.is_code:
            continue
        if piece.text == ";" and (not is_trigger or words[-2:] == [";", "end"]):
            yield statement
            statement, words, is_trigger = [], [], None
            continue
        words.append(piece.word or piece.text)
        if is_trigger is None:
            is_trigger = _is_trigger(words)
        else:
            del words[:-2]
    if statement:
        yield statement


def _is_trigger(words: list[str]) -> bool | None:
    """Whether a statement with these first words creates a trigger; None if the next word decides."""
    kind = [word for word in words if word not in ("explain", "query", "plan")]
    if not kind:
        return None
    if kind[0] != "create":
        return False
    rest = [word for word in kind[1:] if word not in _CREATE_WORDS]
    return rest[0] == "trigger" if rest else None


def on_one_line(sql: str, *, dialect: str = "sqlite") -> str:
    """The text without comments, with single spaces, and no space just inside parentheses or before a comma.

    Text that would be read differently afterwards, and text in which a quote is not closed, is returned as it is. A line
    break stays between two texts in quotes, which PostgreSQL joins only then.
    """
    dialect = dialect_name(dialect)
    if dialect == "sqlite" and not _NOT_ON_ONE_LINE.search(sql):
        return sql.strip()
    before = list(pieces(sql, dialect=dialect))
    joined = _joined(before, keep_breaks=dialect != "sqlite")
    if dialect == "sqlite":
        return joined
    if before and not before[-1].closed:
        return sql.strip()
    return joined if _code(pieces(joined, dialect=dialect)) == _code(before) else sql.strip()


def _joined(split: Iterable[Piece], keep_breaks: bool) -> str:
    parts: list[str] = []
    after_text, has_break = False, False
    for piece in split:
        if not piece.is_code:
            has_break = has_break or "\n" in piece.text or "\r" in piece.text
            if parts and parts[-1] not in ("(", " "):
                parts.append(" ")
            continue
        if piece.text in (",", ")", ";") and parts and parts[-1] == " ":
            parts.pop()
        elif keep_breaks and piece.kind == "text" and after_text and has_break:
            parts[-1] = "\n"
        parts.append(piece.text)
        if piece.text == ",":
            parts.append(" ")
        after_text, has_break = piece.kind == "text", False
    return "".join(parts).strip()


def _code(split: Iterable[Piece]) -> list[str]:
    return [piece.text for piece in split if piece.is_code]


def shortened(statement: str, *, dialect: str = "sqlite") -> str:
    """The statement on one line, cut to 120 characters, for messages."""
    line = on_one_line(statement, dialect=dialect)
    return line if len(line) <= 120 else line[:117] + "..."
