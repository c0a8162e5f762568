"""llama.cpp's server as a backend, for GGUF files: on a CPU, and on GPUs with a build of xllamacpp for them."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.errors import UserError, first_line
from finetune.models.llama_cpp import LlamaServer
from finetune.serve.backends.base import Address, Running
from finetune.serve.backends.tokens import TokenStream, Vocabulary

PARALLEL = 4
"""Answers that are computed at once: on a CPU more of them are not faster in total."""
STOP_SECONDS = 5.0
CONTEXT_TOKENS = 4096
"""Of prompt and answer together; llama.cpp reserves the memory for each of the `PARALLEL` at the start."""


class LlamaCppBackend(TokenStream):
    """See `Backend`. gguf: gives the file, which may have to be written first. vocabulary: that of the model that it is made
    from."""

    name = "llama.cpp"
    parallel = PARALLEL

    def __init__(self, gguf: Callable[[], Path], vocabulary: Vocabulary, context_tokens: int = CONTEXT_TOKENS) -> None:
        self._context = min(context_tokens, vocabulary.positions or context_tokens)
        self._key = secrets.token_hex(24)
        self._gguf = gguf
        super().__init__(
            Vocabulary(vocabulary.tokenizer, vocabulary.ends, self._context), _request, _tokens, health="/health"
        )

    def start(self, folder: Path, hidden: str | None) -> Running:
        if hidden is not None:
            os.environ.pop(hidden, None)  # the server has read it, and LlamaServer hands its environment on
        return _Running(
            lambda: LlamaServer(self._gguf(), context_tokens=self._context, parallel=PARALLEL, api_key=self._key)
        )

    async def connect(self, address: Address, key: str | None = None) -> None:
        await super().connect(address, key or self._key)


class _Running:
    """The server while it loads, which takes a thread, and after that: see `Running`."""

    def __init__(self, make: Callable[[], LlamaServer]) -> None:
        self._make = make
        self._server: LlamaServer | None = None
        self._fault = ""
        self._loaded, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._load, name="llama.cpp loads", daemon=True)
        self._thread.start()

    def _load(self) -> None:
        try:
            server = self._make()
            if not self._stopped.is_set():
                self._server = server
                server.__enter__()
            if self._stopped.is_set():
                server.close()
        except UserError as error:
            self._fault = str(error)
        except Exception as error:  # where a file is written first; the thread must not end silently
            self._fault = f"{type(error).__name__}: {first_line(error)}"
        finally:
            self._loaded.set()

    @property
    def code(self) -> int | None:
        if not self._loaded.is_set() or (self._server is not None and self._server.alive):
            return None
        return 1

    @property
    def address(self) -> Address | None:
        server = self._server
        return Address(server.url) if server is not None and self._loaded.is_set() and server.url else None

    def last_words(self) -> str:
        return self._fault or "llama.cpp's server has ended"

    def stop(self) -> None:
        self._stopped.set()
        if self._server is not None:
            self._server.close()
        self._thread.join(STOP_SECONDS)


def _request(ids: list[int], room: int) -> tuple[str, dict[str, Any]]:
    body = {"prompt": ids, "n_predict": room, "temperature": 0.0, "stream": True, "return_tokens": True}
    return "/completion", body | {"cache_prompt": True}


def _tokens(event: dict[str, Any]) -> list[int]:
    found: list[int] = event["tokens"]
    return found
