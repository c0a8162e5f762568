"""Backends that are given token ids and return token ids, as they come: vLLM and llama.cpp.

What stands before an answer and where it ends is decided here, by the same code as in `finetune evaluate`: prompts are encoded by
finetune/tokens.py, and generators/stopping.py ends an answer. When it has ended, the connection is closed, which stops the
backend.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import httpx

from finetune.data.answers import answer_is_complete
from finetune.evaluation.generators.base import Answer
from finetune.evaluation.generators.stopping import EndOfAnswers
from finetune.runtime.files import parse_json
from finetune.serve.backends.base import Address, BackendError, PromptTooLong
from finetune.tokens import encode_prompts

CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 300.0
"""A backend that sends nothing for so long hangs: the longest wait is for other prompts before the first token."""
LONGEST_LINE = 1 << 20


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer, and the tokens that end an answer. positions: tokens that prompt and answer may have together; None: no
    limit."""

    tokenizer: Any
    ends: list[int]
    positions: int | None

    def encoded(self, prompt: str, max_new_tokens: int) -> tuple[list[int], int]:
        """The ids of a prompt, and the room for new tokens. Raises PromptTooLong, and UserError for a text without tokens."""
        [ids] = encode_prompts(self.tokenizer, [prompt])
        room = max_new_tokens if self.positions is None else min(max_new_tokens, self.positions - len(ids))
        if room <= 0:
            raise PromptTooLong(len(ids), self.positions)
        return ids, room


Request = Callable[[list[int], int], tuple[str, dict[str, Any]]]
"""(prompt ids, most new tokens) -> path and body of a request to the backend."""
Tokens = Callable[[dict[str, Any]], list[int]]
"""One event of the backend's stream -> its new tokens. Raises LookupError, TypeError or BackendError for another event."""


class TokenStream:
    """One backend, once it runs."""

    def __init__(self, vocabulary: Vocabulary, request: Request, tokens: Tokens, health: str = "/health") -> None:
        self.vocabulary = vocabulary
        self._common = EndOfAnswers(vocabulary.tokenizer, vocabulary.ends)
        self._request, self._tokens, self._health = request, tokens, health
        self._client: httpx.AsyncClient | None = None

    async def connect(self, address: Address, key: str | None = None) -> None:
        self._client = client_for(address, key)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def is_ready(self) -> bool:
        assert self._client is not None
        return await answers_health(self._client, self._health)

    async def answer(
        self, prompt: str, dialect: str, max_new_tokens: int, *, partial: bool
    ) -> AsyncGenerator[str | Answer, None]:
        ids, room = self.vocabulary.encoded(prompt, max_new_tokens)
        growing = self._common.answer(dialect)
        path, body = self._request(ids, room)
        stream = self._stream(path, body)
        try:
            async for event in stream:
                for token in self._tokens_of(event):
                    if len(growing.ids) < room and growing.add(token):
                        break
                if growing.complete:
                    break
                if partial:
                    yield growing.text
        finally:
            await stream.aclose()
        text, count = growing.text, len(growing.ids)
        cut = room < max_new_tokens and count >= room and not answer_is_complete(text, dialect)
        yield Answer(text, count, "too_long" if cut else None, len(ids))

    def _tokens_of(self, event: dict[str, Any]) -> list[int]:
        if isinstance(event.get("error"), dict | str):
            error = event["error"]
            told = error.get("message") if isinstance(error, dict) else error
            raise BackendError(f"it reports: {told}")
        try:
            return [int(token) for token in self._tokens(event)]
        except (LookupError, TypeError, ValueError):
            raise BackendError("it sent something else than tokens") from None

    async def _stream(self, path: str, body: dict[str, Any]) -> Any:
        """The events of a stream of server-sent events, up to its end. Raises BackendError."""
        assert self._client is not None
        try:
            async with self._client.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    text = (await response.aread())[:2000].decode("utf-8", "replace")
                    raise BackendError(f"it answers with status {response.status_code}: {text.strip()[:200]}")
                async for line in response.aiter_lines():
                    if len(line) > LONGEST_LINE:
                        raise BackendError("it sent a line of more than a megabyte")
                    if not line.startswith("data:"):
                        continue
                    if line[5:].strip() == "[DONE]":
                        return
                    event = parse_json(line[5:])
                    if not isinstance(event, dict):
                        raise BackendError("it sent something else than tokens")
                    yield event
        except httpx.HTTPError as error:
            raise BackendError(f"{type(error).__name__}: {error}") from None
        except ValueError:
            raise BackendError("it sent something else than JSON") from None


def client_for(address: Address, key: str | None = None) -> httpx.AsyncClient:
    """A client of a backend on this machine, whatever proxies the environment names."""
    uds = str(address.socket) if address.socket else None
    transport = httpx.AsyncHTTPTransport(uds=uds, limits=httpx.Limits(max_connections=None))
    timeout = httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(
        base_url=address.url, transport=transport, timeout=timeout, headers=headers, trust_env=False
    )


async def answers_health(client: httpx.AsyncClient, path: str) -> bool:
    try:
        return (await client.get(path, timeout=5.0)).status_code == 200
    except (httpx.HTTPError, json.JSONDecodeError):
        return False
