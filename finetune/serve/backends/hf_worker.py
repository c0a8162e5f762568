"""`python -m finetune.serve.backends.hf_worker TARGET SOCKET`: the project's own generator behind a Unix socket.

POST /answer {"prompt", "max_new_tokens"} gives an Answer as JSON. Prompts that wait are answered together.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from finetune.errors import UserError, first_line
from finetune.evaluation.generators.base import Answer, LoadedModel
from finetune.serve.disconnect import unless_gone
from finetune.serve.target import open_target

GATHER_SECONDS = 0.01
"""How long the first prompt of a batch waits for others."""


@dataclass
class _Waiting:
    prompt: str
    max_new_tokens: int
    told: Callable[[Answer | Exception], None]
    given_up: bool = False


class Batches:
    """Answers prompts in a thread of its own, as many at once as there are, up to `size`."""

    def __init__(self, model: LoadedModel, size: int) -> None:
        self._model, self._size = model, size
        self._waiting: queue.SimpleQueue[_Waiting] = queue.SimpleQueue()
        self.failed: str | None = None
        threading.Thread(target=self._work, daemon=True).start()

    async def answer(self, prompt: str, max_new_tokens: int) -> Answer:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()

        def tell(result: Answer | Exception) -> None:
            loop.call_soon_threadsafe(_settle, future, result)

        item = _Waiting(prompt, max_new_tokens, tell)
        self._waiting.put(item)
        try:
            return await future
        finally:
            item.given_up = True

    def _work(self) -> None:
        while True:
            items = [self._waiting.get()]
            until = time.monotonic() + GATHER_SECONDS
            while len(items) < self._size and (left := until - time.monotonic()) > 0:
                try:
                    items.append(self._waiting.get(timeout=left))
                except queue.Empty:
                    break
            items = [item for item in items if not item.given_up]
            for length in sorted({item.max_new_tokens for item in items}):
                self._generate([item for item in items if item.max_new_tokens == length], length)

    def _generate(self, items: list[_Waiting], max_new_tokens: int) -> None:
        try:
            given = self._model.answers(
                [item.prompt for item in items],
                tuned=True,
                batch_size=self._size,
                max_new_tokens=max_new_tokens,
                done=lambda place, answer: items[place].told(answer),
                progress=False,
            )
            for item, answer in zip(items, given, strict=True):  # `done` is not told of prompts that are too long
                item.told(answer)
        except UserError as error:
            if len(items) == 1:
                items[0].told(error)
            else:  # one of the prompts has no tokens: the others have an answer
                for item in items:
                    self._generate([item], max_new_tokens)
        except Exception as error:  # whatever the model does, the clients are told and the next batch is tried
            for item in items:
                item.told(error)


def _settle(future: asyncio.Future[Answer], result: Answer | Exception) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


def application(batches: Batches) -> Starlette:
    async def health(_: Request) -> JSONResponse:
        return JSONResponse({"status": "ready"})

    async def answer(request: Request) -> JSONResponse:
        values: dict[str, Any] = await request.json()
        try:
            given = await unless_gone(request, batches.answer(values["prompt"], int(values["max_new_tokens"])))
        except UserError as error:
            return JSONResponse({"error": str(error)}, 422)
        except Exception as error:
            return JSONResponse({"error": f"{type(error).__name__}: {first_line(error)}"}, 500)
        return JSONResponse(given._asdict())

    return Starlette(routes=[Route("/health", health), Route("/answer", answer, methods=["POST"])])


def main(path: str, socket: str) -> None:
    target = open_target(Path(path), verify=False)
    with target.loaded(generator="hf") as model:
        batches = Batches(model, max(1, target.config.evaluation.batch_size))
        uvicorn.run(application(batches), uds=socket, log_level="error", access_log=False, lifespan="off")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(f"finetune: {error}")
