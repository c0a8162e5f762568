"""Names as SQLite writes them, and lists of words."""

import re


def word_set(words: str) -> frozenset[str]:
    return frozenset(words.split())


RESERVED = word_set(
    """
    add all alter and as autoincrement between case cast check collate commit constraint create current_date current_time
    current_timestamp default deferrable delete distinct drop else escape except exists foreign from group having in index
    insert intersect into is isnull join limit not nothing notnull null on or order primary raise references returning select
    set table then to transaction union unique update using values when where
"""
)
"""Words that SQLite does not accept as an unquoted table or column name: its keywords, each one tried (3.40)."""


def quoted(name: str) -> str:
    """The name as written in SQL: in double quotes if it is not a plain word or is reserved."""
    if re.fullmatch(r"[^\W\d]\w*", name) and name.lower() not in RESERVED:
        return name
    return '"' + name.replace('"', '""') + '"'
