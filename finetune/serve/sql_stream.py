"""Which part of an answer's SQL can be sent while the answer still grows.

What is sent cannot be taken back, so only the beginning of a query is sent, up to where a further token could change how it is
read: it is a beginning of the SQL that data/answers.py takes out of the whole answer, except where the answer turns out not to be
SQL (`changed` is then true, and the stream ends with an error).
"""

from __future__ import annotations

import re

from finetune.sql.lexer import pieces
from finetune.sql.text import on_one_line

_BEGINS = re.compile(r"\s*(?:SELECT|WITH)\s", re.IGNORECASE)
_MAY_END = frozenset(";；。&`#[]$\\|~")
"""Signs that may end the SQL of an answer, or stand for something else in it."""
_TRIMMED = " .*_|<>\\"
"""What data/direct_sql.py may cut off at the end."""


class SqlStream:
    """Follows one answer."""

    def __init__(self, dialect: str) -> None:
        self.sent = ""
        self._dialect = dialect

    def feed(self, text: str) -> str:
        """text: the answer so far. Returns what can be sent now, after what was sent before; mostly one word."""
        prefix = _steady(text, self._dialect)
        if len(prefix) <= len(self.sent) or not prefix.startswith(self.sent):
            return ""
        new, self.sent = prefix[len(self.sent) :], prefix
        return new

    def rest(self, sql: str) -> str | None:
        """What of the SQL of the whole answer has not been sent; None if something else was sent."""
        return sql[len(self.sent) :] if sql.startswith(self.sent) else None


def _steady(text: str, dialect: str) -> str:
    if not _BEGINS.match(text):
        return ""
    end = 0
    for piece in pieces(text, dialect=dialect):
        after = piece.start + len(piece.text)
        if after == len(text) or not piece.closed or piece.kind in ("comment", "hint"):
            break
        if piece.kind == "space" and ("\n" in piece.text or "\r" in piece.text):
            if end:
                break
        elif (piece.kind in ("sign", "name") and piece.text[0] in _MAY_END) or (
            piece.text in (".", "<", "-", "/") and not _is_operator(text, after)
        ):
            break
        end = after
    raw = text[:end].strip()
    line = on_one_line(raw, dialect=dialect)
    if dialect != "sqlite" and line != raw:  # there the whole may stay as it is, if its parts do
        return ""
    return line.rstrip(_TRIMMED)


def _is_operator(text: str, after: int) -> bool:
    """Whether a dot, `<`, minus or slash before this offset is part of an expression: not the end of a sentence, a tag, or the
    beginning of a comment."""
    before, following = text[after - 1], text[after]
    if before == ".":
        return not following.isspace()
    if before == "<":
        return following in " =>" or following.isdigit()
    return following not in "-*"
