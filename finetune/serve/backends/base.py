"""What a backend is: a process that computes answers, and how the server asks it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from finetune.evaluation.generators.base import Answer


class BackendError(Exception):
    """The backend cannot be reached, or gives no answer. One line."""


class PromptTooLong(Exception):
    """tokens: of the prompt; limit: of prompt and answer together, None if unknown."""

    def __init__(self, tokens: int | None, limit: int | None) -> None:
        super().__init__(tokens, limit)
        self.tokens, self.limit = tokens, limit


@dataclass(frozen=True)
class Command:
    """A program to start. words: with its arguments. environment: variables besides those of the server; without keys of the
    user. found_at: where it can be reached: a Unix socket in the server's private folder, or a file into which the program writes
    its address once it has one."""

    words: Sequence[str]
    socket: Path | None = None
    address_file: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)


class Backend(Protocol):
    """Made before the program is started, and used once it is there."""

    @property
    def name(self) -> str: ...

    @property
    def parallel(self) -> int:
        """Questions that it is given at once; further ones wait in the server."""
        ...

    def command(self, folder: Path) -> Command:
        """folder: private, for sockets and small files."""
        ...

    async def connect(self, url: str, socket: Path | None) -> None:
        """Called once before the first question."""
        ...

    async def is_ready(self) -> bool:
        """Whether it answers. False also while it loads."""
        ...

    def answer(self, prompt: str, dialect: str, max_new_tokens: int, *, partial: bool) -> AsyncIterator[str | Answer]:
        """The whole answer at the end. partial: before it the text so far, as it grows, where the backend can tell.

        Raises PromptTooLong, BackendError, and UserError for a prompt that has no tokens. Closing the iterator ends the work.
        """
        ...

    async def close(self) -> None: ...
