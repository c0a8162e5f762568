"""What a backend is: a process that computes answers, and how the server asks it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
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
class Address:
    """Where a backend listens. url: of its server. socket: a Unix socket instead of the host and port in it."""

    url: str
    socket: Path | None = None


class Running(Protocol):
    """A backend's program, from its start on."""

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        ...

    @property
    def address(self) -> Address | None:
        """None until it is known."""
        ...

    def last_words(self) -> str:
        """What it printed last that says why it ended, in one line; "" for nothing."""
        ...

    def stop(self) -> None:
        """End it with all that it has started. It ends, too, when this process does, however that ends."""
        ...


class Backend(Protocol):
    """Made before its program is started, and asked once that is ready."""

    @property
    def name(self) -> str: ...

    @property
    def parallel(self) -> int:
        """Questions that it is given at once; further ones wait in the server."""
        ...

    def start(self, folder: Path, hidden: str | None) -> Running:
        """Start the program. folder: private, for sockets, the log and small files. hidden: a variable of the environment that it
        must not see, because it holds the server's key."""
        ...

    async def connect(self, address: Address) -> None:
        """Called once before the first question."""
        ...

    async def is_ready(self) -> bool:
        """Whether it answers. False also while it loads."""
        ...

    def answer(
        self, prompt: str, dialect: str, max_new_tokens: int, *, partial: bool
    ) -> AsyncGenerator[str | Answer, None]:
        """The whole answer at the end. partial: before it the text so far, as it grows, where the backend can tell.

        Raises PromptTooLong, BackendError, and UserError for a prompt that has no tokens. Closing the iterator ends the work.
        """
        ...

    async def close(self) -> None: ...
