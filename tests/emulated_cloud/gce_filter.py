"""Google's list filters, the subset that SkyPilot uses: (labels.a = b) AND (labels.c = d) AND ((status = X) OR (status =
Y))."""

from __future__ import annotations

import re
from typing import Any

TOKEN = re.compile(r"\s*(\(|\)|AND\b|OR\b|[\w.\-]+\s*(?:!=|=|:)\s*(?:\"[^\"]*\"|[^\s()]*))")


def matches(item: dict[str, Any], expression: str) -> bool:
    """Whether an item passes the filter. Raises ValueError for unknown syntax, so that nothing passes by mistake."""
    tokens = tokenise(expression)
    if not tokens:
        return True
    result, rest = either(item, tokens)
    if rest:
        raise ValueError(f"filter: {expression!r}: not understood from {rest[0]!r}")
    return result


def tokenise(expression: str) -> list[str]:
    tokens, at, text = [], 0, expression.strip()
    while at < len(text):
        found = TOKEN.match(text, at)
        if not found:
            raise ValueError(f"filter: {expression!r}: not understood at {text[at:]!r}")
        tokens.append(found.group(1))
        at = found.end()
    return tokens


def either(item: dict[str, Any], tokens: list[str]) -> tuple[bool, list[str]]:
    result, rest = both(item, tokens)
    while rest and rest[0] == "OR":
        further, rest = both(item, rest[1:])
        result = result or further
    return result, rest


def both(item: dict[str, Any], tokens: list[str]) -> tuple[bool, list[str]]:
    result, rest = one(item, tokens)
    while rest and rest[0] not in ("OR", ")"):
        further, rest = one(item, rest[1:] if rest[0] == "AND" else rest)
        result = result and further
    return result, rest


def one(item: dict[str, Any], tokens: list[str]) -> tuple[bool, list[str]]:
    if not tokens:
        raise ValueError("filter: unexpected end")
    if tokens[0] == "(":
        result, rest = either(item, tokens[1:])
        if not rest or rest[0] != ")":
            raise ValueError("filter: a bracket is not closed")
        return result, rest[1:]
    name, operator, wanted = re.split(r"\s*(!=|=|:)\s*", tokens[0], maxsplit=1)
    value: Any = item
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    equal = value is not None and str(value) == wanted.strip('"')
    return (not equal if operator == "!=" else equal), tokens[1:]
