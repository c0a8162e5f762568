"""KEY=VALUE overrides as one text: the variable OVERRIDES of a task."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from finetune.errors import UserError, shown


def split_overrides(text: str) -> list[str]:
    """As a shell splits words, so that a value with spaces stands in quotes. Raises UserError for a quote that is not closed."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(
            f"OVERRIDES: {shown(text)}: {error}; expected KEY=VALUE words, with quotes around one that holds spaces",
            code="config.bad_overrides",
        ) from None


def joined_overrides(words: Sequence[str]) -> str:
    """The inverse."""
    return shlex.join(words)
