"""The project's own generator as a backend: for machines that have neither vLLM nor llama.cpp. The generator runs in a process of
its own (hf_worker.py), which answers as many questions at once as `evaluation.batch_size` says."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import httpx

from finetune.errors import UserError
from finetune.evaluation.generators.base import Answer
from finetune.runtime.files import parse_json
from finetune.serve.backends.base import Address, BackendError, PromptTooLong, Running
from finetune.serve.backends.tokens import answers_health, client_for
from finetune.serve.process import GuardedProgram, backend_environment
from finetune.serve.target import Target


class HfBackend:
    """See `Backend`."""

    name = "hf"

    def __init__(self, target: Target) -> None:
        self._target = target
        self.parallel = max(1, 2 * target.config.evaluation.batch_size)  # the next batch waits in the worker
        self._client: httpx.AsyncClient | None = None

    def start(self, folder: Path, hidden: str | None) -> Running:
        socket = folder / "hf.sock"
        words = [
            sys.executable,
            "-m",
            "finetune.serve.backends.hf_worker",
            str(self._target.path.resolve()),
            str(socket),
        ]
        return GuardedProgram(words, backend_environment(hidden), socket=socket, log=folder / "backend.log")

    async def connect(self, address: Address) -> None:
        self._client = client_for(address)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def is_ready(self) -> bool:
        assert self._client is not None
        return await answers_health(self._client, "/health")

    async def answer(
        self, prompt: str, dialect: str, max_new_tokens: int, *, partial: bool
    ) -> AsyncGenerator[str | Answer, None]:
        assert self._client is not None
        try:
            question = {"prompt": prompt, "max_new_tokens": max_new_tokens}
            response = await self._client.post("/answer", json=question, timeout=httpx.Timeout(None, connect=10.0))
            value = parse_json(response.content)
            if response.status_code == 422:
                raise UserError(value["error"], code="serve.prompt_refused")
            if response.status_code != 200:
                raise BackendError(str(value["error"]))
            answer = Answer(**value)
        except httpx.HTTPError as error:
            raise BackendError(f"{type(error).__name__}: {error}") from None
        except (ValueError, LookupError, TypeError):
            raise BackendError("it sent something else than an answer") from None
        if answer.problem == "too_long" and not answer.text:
            raise PromptTooLong(answer.prompt_tokens, None)
        yield answer
