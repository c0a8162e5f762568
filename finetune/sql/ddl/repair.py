"""Rewrites DDL that sqlglot does not read: removes storage options, which no prompt shows, and nothing else.

What is removed is listed here word by word, and the text is left alone where columns could hide in it; so a statement
with an unknown option stays an error.
"""

from collections.abc import Collection, Sequence

from sqlglot.dialects.dialect import Dialect
from sqlglot.tokens import Token, TokenType

from finetune.sql.ddl.script import tokens_of
from finetune.sql.quoting import word_set

_MODIFIERS = word_set(
    """
    DYNAMIC EDITIONABLE EXTERNAL FORCE FOREIGN GLOBAL HYBRID ICEBERG IMMUTABLE INTERACTIVE LIVE LOCAL MULTISET NOFORCE
    NONEDITIONABLE ONLY PRIVATE READ RECURSIVE SECURE SNAPSHOT STREAMING TRANSIENT UNLOGGED VOLATILE WRITE
"""
)
"""Words between CREATE and TABLE or VIEW that do not matter for its columns."""
_OPTIONS = word_set(
    """
    CLUSTERED DISABLE DISTKEY ENABLE HIDDEN INVISIBLE MASKED NONCLUSTERED NORELY NOVALIDATE PERSISTED RELY ROWGUIDCOL SORTKEY
    SPARSE VALIDATE VARYING VIRTUAL VISIBLE
"""
)
"""Words behind a column's name and type, or in a constraint, that do not matter."""
_OPTIONS_OF_KEYS = frozenset(["ASC", "CLUSTERED", "DESC", "NONCLUSTERED"])
_OPTIONS_OF_TWO = word_set("COLUMN_FORMAT COMPRESSION SRID STORAGE")
"""The same, followed by a word or number."""
_OTHER_ITEMS = frozenset([("SUPPLEMENTAL", "LOG"), ("PERIOD", "FOR")])
"""How an item that is neither column nor constraint begins."""
_CONSTRAINT_STARTS = word_set(
    "CHECK CONSTRAINT EXCLUDE FOREIGN FULLTEXT INDEX KEY LIKE PERIOD PRIMARY PROJECTION SPATIAL UNIQUE"
)
_ENDS_OF_VIEWS = word_set("BINDING CASCADED CHECK DATA LOCAL NO ONLY OPTION READ SCHEMA")
"""Words behind the WITH that may end a view: WITH NO DATA, WITH CHECK OPTION, WITH READ ONLY."""
_HIDE_COLUMNS = word_set("AS CLONE COPY FROM INHERITS LIKE OF PARTITIONED SELECT TABLE UNDER")
"""Words behind a list of columns that may add others."""


def readable_create(text: str, dialect: Dialect, types: Collection[str] = ()) -> str | None:
    """CREATE TABLE with its columns alone, or CREATE VIEW with its columns and query alone; None if that is not certain.

    types: the names, in lower case, of types that the columns keep although sqlglot does not know them.
    """
    tokens = tokens_of(text, dialect)
    words = [_word(token, text) for token in tokens]
    kind = next((n for n, word in enumerate(words) if word in ("TABLE", "VIEW")), None)
    if kind is None or words[0] != "CREATE":
        return None
    kept = [word for word in words[:kind] if word not in _MODIFIERS and word != "MATERIALIZED"]
    head = f"{' '.join(kept)} {words[kind]}"
    opening = next((n for n in range(kind, len(tokens)) if tokens[n].token_type == TokenType.L_PAREN), len(tokens))
    query = next((n for n in range(kind, len(words)) if words[n] == "AS" and _at_depth_0(tokens[:n])), None)
    if words[kind] == "VIEW":
        return None if query is None else _view(text, tokens, words, head, kind, min(opening, query), query)
    closing = _matching(tokens, opening)
    if opening == len(tokens):
        return f"{head} {text[tokens[kind].end + 1 :]}"
    if closing is None or _HIDE_COLUMNS.intersection(words[closing + 1 :]) or "LIKE" in words[kind:opening]:
        return None
    name = text[tokens[kind + 1].start : tokens[opening].start]
    return f"{head} {name} {_without_options(text, tokens[opening : closing + 1], types)}"


def readable_alter(text: str, dialect: Dialect) -> str | None:
    """ALTER TABLE without options."""
    tokens = [token for token in tokens_of(text, dialect) if _word(token, text) not in ("NOCHECK",)]
    return _without_options(text, tokens)


def _view(
    text: str, tokens: Sequence[Token], words: Sequence[str], head: str, kind: int, opening: int, query: int
) -> str:
    """The view's name, its list of columns if it has one, and its query without the options that end it."""
    name_end = kind + 2
    while name_end < opening and _continues_name(tokens[name_end - 1], tokens[name_end]):
        name_end += 1
    closing = _matching(tokens, opening) if name_end == opening else None
    columns = text[tokens[opening].start : tokens[closing].end + 1] if closing is not None and closing < query else ""
    end = len(tokens)
    for number in range(len(words) - 1, query, -1):
        if words[number] == "WITH" and _ENDS_OF_VIEWS.issuperset(words[number + 1 :]):
            end = number
            break
    name = text[tokens[kind + 1].start : tokens[name_end - 1].end + 1]
    return f"{head} {name} {columns} AS {text[tokens[query].end + 1 : tokens[end - 1].end + 1]}"


def _continues_name(before: Token, token: Token) -> bool:
    return TokenType.DOT in (before.token_type, token.token_type)


def _without_options(text: str, tokens: Sequence[Token], types: Collection[str] = ()) -> str:
    """The text of the tokens without the options that are listed above."""
    kept: list[str] = []
    number = in_item = depth = 0
    while number < len(tokens):
        token = tokens[number]
        if token.token_type == TokenType.L_PAREN and number and _word(tokens[number - 1], text).strip("[]") == "XML":
            number = (_matching(tokens, number) or number) + 1  # T-SQL: xml (CONTENT dbo.a_schema)
            continue
        depth += {TokenType.L_PAREN: 1, TokenType.R_PAREN: -1}.get(token.token_type, 0)
        in_item = 0 if token.token_type in (TokenType.COMMA, TokenType.L_PAREN) else in_item + 1
        skipped = _length_of_option(text, tokens, number, in_item)
        if not skipped:
            is_type = depth == 1 and in_item == 2 and _is_unknown_type(text, tokens[number - 1 : number + 2])
            kept.append("TEXT" if is_type and token.text.lower() not in types else text[token.start : token.end + 1])
        elif in_item == 1 and kept and kept[-1] == ",":  # a whole item
            kept.pop()
        number += skipped or 1
    return " ".join(kept)


def _length_of_option(text: str, tokens: Sequence[Token], number: int, in_item: int) -> int:
    """How many tokens the option has that begins here; 0 if none does. in_item: 1 for the first token of an item."""
    word, *following = (_word(token, text) for token in tokens[number : number + 3])
    following += ["", ""]
    if in_item == 1:
        return _length_of_item(tokens, number) if (word, following[0]) in _OTHER_ITEMS else 0
    if word == "WITH" and following[0] == "(":
        return (_matching(tokens, number + 1) or len(tokens)) + 1 - number
    if word == "WITH" and following[0] in ("CHECK", "NOCHECK"):
        return 2
    if word == "ON" and following[0].startswith("["):  # a filegroup
        return 2
    if word == "NOT" and following[0] in ("FOR", "VALID"):
        return 3 if following[0] == "FOR" else 2
    if word == "USING" and following[0] == "INDEX":
        length = _length_of_item(tokens, number)  # Oracle's options of storage end the constraint
        return length if "REFERENCES" not in (_word(token, text) for token in tokens[number : number + length]) else 2
    if word.startswith("FOREIGN") and following[0] == "REFERENCES":  # T-SQL; sqlglot's token is FOREIGN KEY
        return 1
    if word in _OPTIONS_OF_TWO and in_item > 2:
        return 2
    return int((word in _OPTIONS and in_item > 2) or word in _OPTIONS_OF_KEYS)


def _is_unknown_type(text: str, tokens: Sequence[Token]) -> bool:
    """Whether the second of the tokens is a type that sqlglot does not know, such as MySQL's POINT; no prompt shows types.

    tokens: a column's name, perhaps, and the next two.
    """
    name, kind, *after = tokens
    is_column = name.token_type == TokenType.IDENTIFIER or (
        name.token_type == TokenType.VAR and _word(name, text) not in _CONSTRAINT_STARTS
    )
    return is_column and kind.token_type == TokenType.VAR and all(token.token_type != TokenType.DOT for token in after)


def _length_of_item(tokens: Sequence[Token], number: int) -> int:
    depth = 0
    for end in range(number, len(tokens)):
        depth += {TokenType.L_PAREN: 1, TokenType.R_PAREN: -1}.get(tokens[end].token_type, 0)
        if depth < 0 or (depth == 0 and tokens[end].token_type == TokenType.COMMA):
            return end - number
    return 0


def _word(token: Token, text: str) -> str:
    return text[token.start : token.end + 1].upper()


def _at_depth_0(tokens: Sequence[Token]) -> bool:
    kinds = [token.token_type for token in tokens]
    return kinds.count(TokenType.L_PAREN) == kinds.count(TokenType.R_PAREN)


def _matching(tokens: Sequence[Token], opening: int) -> int | None:
    """The index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for number in range(opening, len(tokens)):
        depth += {TokenType.L_PAREN: 1, TokenType.R_PAREN: -1}.get(tokens[number].token_type, 0)
        if depth == 0:
            return number
    return None
