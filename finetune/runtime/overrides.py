"""KEY=VALUE overrides as one text: the variable OVERRIDES of a task."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from finetune.errors import UserError, shown


def split_overrides(text: str) -> list[str]:
    """As a shell splits words, so that a value with spaces stands in quotes. Raises UserError for a quote that is not closed, and
    for a word that is no KEY=VALUE, such as the second one of a value whose quotes are missing."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise _bad(f"{shown(text)}: {error}") from None
    for word in words:
        if "=" not in word:
            raise _bad(f"{shown(word)}: not KEY=VALUE")
    return words


def _bad(what: str) -> UserError:
    return UserError(
        f"OVERRIDES: {what}; expected KEY=VALUE words, with quotes around one that holds spaces",
        code="config.bad_overrides",
    )


def joined_overrides(words: Sequence[str]) -> str:
    """The inverse."""
    return shlex.join(words)
