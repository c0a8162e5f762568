"""Types that DDL creates: the values of each enum (PostgreSQL, DuckDB), and what each domain stands for."""

import re
from collections.abc import Sequence
from dataclasses import replace

from sqlglot.dialects.dialect import Dialect
from sqlglot.tokens import Token, TokenType

from finetune.sql.ddl.script import tokens_of
from finetune.sql.tables import Column, Table, ends_alike

Path = tuple[str, ...]
_ARRAY = re.compile(r"ARRAY<(.*)>")
_PARTS = re.compile(r'"((?:[^"]|"")*)"|([^."]+)')


class Types:
    """The types after the statements applied so far. A statement that says nothing of an enum or a domain changes nothing."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._values: dict[Path, tuple[str, ...]] = {}
        self._bases: dict[Path, Path] = {}

    @property
    def names(self) -> frozenset[str]:
        """The names of all enums and domains in lower case, without what stands before them."""
        return frozenset(path[-1] for path in (*self._values, *self._bases))

    def apply(self, text: str) -> None:
        """Apply CREATE TYPE, CREATE DOMAIN or ALTER TYPE. Raises ParseError where the text ends inside a quote."""
        tokens = tokens_of(text, self._dialect)
        words = ["" if token.token_type == TokenType.STRING else token.text.upper() for token in tokens]
        path, end = _path(tokens, 2)
        rest = words[end:]
        texts = [token.text for token in tokens[end:] if token.token_type == TokenType.STRING]
        if words[:2] == ["CREATE", "TYPE"] and rest[:2] == ["AS", "ENUM"] and "SELECT" not in rest:
            self._values[path] = tuple(texts)
        elif words[:2] == ["CREATE", "DOMAIN"]:
            self._bases[path] = _path(tokens, end + (rest[:1] == ["AS"]))[0]
        elif words[:2] == ["ALTER", "TYPE"] and texts:
            self._alter(path, rest, texts)

    def _alter(self, path: Path, rest: Sequence[str], texts: Sequence[str]) -> None:
        known = next((name for name in self._values if ends_alike(name, path)), None)
        if known is None:
            return
        values = list(self._values[known])
        if rest[:2] == ["RENAME", "VALUE"]:
            values = [texts[-1] if value == texts[0] else value for value in values]
        elif rest[:2] == ["ADD", "VALUE"] and texts[0] not in values:
            near = values.index(texts[1]) + ("AFTER" in rest) if texts[1:] and texts[1] in values else len(values)
            values.insert(near, texts[0])
        self._values[known] = tuple(values)

    def applied(self, table: Table) -> Table:
        """The table with the values of those of its columns whose type is an enum."""
        if not self._values:
            return table
        return replace(table, columns=tuple(map(self._with_values, table.columns)))

    def _with_values(self, column: Column) -> Column:
        kind, is_array = column.type, False
        while array := _ARRAY.fullmatch(kind):
            kind, is_array = array[1], True
        path = tuple((quoted.replace('""', '"') or plain).lower() for quoted, plain in _PARTS.findall(kind))
        values = self._values_of(path)
        return replace(column, values=values, is_array=is_array) if values else column

    def _values_of(self, path: Path) -> tuple[str, ...]:
        seen: set[Path] = set()
        while path and path not in seen:
            seen.add(path)
            for name, values in self._values.items():
                if ends_alike(name, path):
                    return values
            path = next((base for name, base in self._bases.items() if ends_alike(name, path)), ())
        return ()


def _path(tokens: Sequence[Token], start: int) -> tuple[Path, int]:
    """The name that begins at a token, in lower case, and the index behind it."""
    end = start
    while end + 2 < len(tokens) and tokens[end + 1].token_type == TokenType.DOT:
        end += 2
    return tuple(token.text.lower() for token in tokens[start : end + 1 : 2]), end + 1
