"""llama.cpp's server as a backend, for GGUF files: on a CPU, and on GPUs with a build of xllamacpp for them."""

from __future__ import annotations

import os
import secrets
import threading
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.models.llama_cpp import LlamaServer
from finetune.serve.backends.base import Address, Running
from finetune.serve.backends.tokens import TokenStream, Vocabulary

PARALLEL = 4
"""Answers that are computed at once: on a CPU more of them are not faster in total."""
CONTEXT_TOKENS = 4096
"""Of prompt and answer together; llama.cpp reserves the memory for each of the `PARALLEL` at the start."""


class LlamaCppBackend(TokenStream):
    """See `Backend`. vocabulary: that of the model that the file was made from."""

    name = "llama.cpp"
    parallel = PARALLEL

    def __init__(self, gguf: Path, vocabulary: Vocabulary, context_tokens: int = CONTEXT_TOKENS) -> None:
        self._context = min(context_tokens, vocabulary.positions or context_tokens)
        self._key = secrets.token_hex(24)
        self._gguf = gguf
        super().__init__(
            Vocabulary(vocabulary.tokenizer, vocabulary.ends, self._context), _request, _tokens, health="/health"
        )

    def start(self, folder: Path, hidden: str | None) -> Running:
        return _Running(
            LlamaServer(self._gguf, context_tokens=self._context, parallel=PARALLEL, api_key=self._key), hidden
        )

    async def connect(self, address: Address, key: str | None = None) -> None:
        await super().connect(address, key or self._key)


class _Running:
    """The server while it loads, which takes a thread, and after that: see `Running`."""

    def __init__(self, server: LlamaServer, hidden: str | None) -> None:
        self._server, self._fault = server, ""
        self._loaded = threading.Event()
        self._stopped = False
        if hidden is not None:
            os.environ.pop(hidden, None)  # the server has read it, and this process starts no other program
        threading.Thread(target=self._load, name="llama.cpp loads", daemon=True).start()

    def _load(self) -> None:
        try:
            self._server.__enter__()
            if self._stopped:
                self._server.close()
        except UserError as error:
            self._fault = str(error)
        finally:
            self._loaded.set()

    @property
    def code(self) -> int | None:
        return 1 if self._loaded.is_set() and not self._server.alive else None

    @property
    def address(self) -> Address | None:
        return Address(self._server.url) if self._loaded.is_set() and self._server.url else None

    def last_words(self) -> str:
        return self._fault or f"{self._server.gguf}: llama.cpp's server has ended"

    def stop(self) -> None:
        self._stopped = True
        self._server.close()


def _request(ids: list[int], room: int) -> tuple[str, dict[str, Any]]:
    body = {"prompt": ids, "n_predict": room, "temperature": 0.0, "stream": True, "return_tokens": True}
    return "/completion", body | {"cache_prompt": True}


def _tokens(event: dict[str, Any]) -> list[int]:
    found: list[int] = event["tokens"]
    return found
