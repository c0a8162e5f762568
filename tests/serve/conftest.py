"""An endpoint in this process, whose backend says what a test tells it to."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn

from finetune.config.schema import RunConfig
from finetune.data.limits import limits_of
from finetune.data.prompts import PromptTemplate
from finetune.evaluation.generators.base import Answer
from finetune.serve.answering import Answering
from finetune.serve.app import application
from finetune.serve.backends.base import Address, Running
from finetune.serve.databases import databases_of
from finetune.serve.load import Queue
from finetune.serve.rows import Rows
from finetune.serve.run import _web
from finetune.serve.service import Service
from finetune.serve.target import Target
from tests.helpers.data_examples import make_database


@dataclass
class Scripted:
    """A backend that answers every prompt with `says`, a text or a function of the prompt that gives a text or an Answer. It
    comes in parts of `part` characters where `streams`, each after `seconds`. fails: raised in place of the answer."""

    says: str | Callable[[str], str | Answer] = "SELECT COUNT(*) FROM item"
    name: str = "scripted"
    parallel: int = 4
    streams: bool = True
    part: int = 3
    seconds: float = 0.0
    fails: Exception | None = None
    prompts: list[str] = field(default_factory=list)
    most: list[int] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    abandoned: int = 0

    def start(self, folder: Path, hidden: str | None) -> Running:
        raise NotImplementedError

    async def connect(self, address: Address) -> None:
        raise NotImplementedError

    async def is_ready(self) -> bool:
        return True

    async def close(self) -> None:
        pass

    async def answer(
        self, prompt: str, dialect: str, max_new_tokens: int, *, partial: bool
    ) -> AsyncGenerator[str | Answer, None]:
        self.prompts.append(prompt)
        self.most.append(max_new_tokens)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        done = False
        try:
            if self.fails is not None:
                raise self.fails
            said = self.says if isinstance(self.says, str) else self.says(prompt)
            answer = said if isinstance(said, Answer) else Answer(said, len(said) // 3, None, len(prompt) // 3)
            for end in range(self.part, len(answer.text), self.part) if partial and self.streams else ():
                await asyncio.sleep(self.seconds)
                yield answer.text[:end]
            await asyncio.sleep(self.seconds)
            done = True
            yield answer
        finally:
            self.at_once -= 1
            self.abandoned += not done


@dataclass
class Served:
    url: str
    service: Service
    backend: Scripted
    log: list[str]

    def client(self, key: str = "none", **more: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **more)

    def sql(
        self, question: str = "How many items are there?", *, client: openai.OpenAI | None = None, **extra: Any
    ) -> str:
        messages: Any = [{"role": "user", "content": question}]
        reply = (client or self.client()).chat.completions.create(
            model="tiny", messages=messages, extra_body={"database": "shop", **extra}
        )
        return str(reply.choices[0].message.content)


Serve = Callable[..., Served]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    return make_database(tmp_path / "databases", items=40)


@pytest.fixture
def serve(shop: Path) -> Iterator[Serve]:
    """serve(backend, execute=True, key=..., waiting=..., databases=[...], template=...): an endpoint of the model `tiny`."""
    ended: list[Callable[[], None]] = []

    def start(
        backend: Scripted | None = None,
        *,
        execute: bool = False,
        key: str | None = None,
        waiting: int = 128,
        databases: list[str] | None = None,
        template: PromptTemplate | None = None,
        **evaluation: Any,
    ) -> Served:
        config = RunConfig()
        for name, value in {"max_new_tokens": 64, **evaluation}.items():
            setattr(config.evaluation, name, value)
        backend = backend or Scripted()
        target = Target("tiny", shop.parent, config, template or PromptTemplate(dialects=("sqlite",)), None)
        rows = Rows(limits_of(config.evaluation), config.evaluation.timeout_seconds) if execute else None
        known = databases_of([f"shop={shop}"] if databases is None else databases)
        log: list[str] = []
        listener = socket.create_server(("127.0.0.1", 0))
        made: list[Service] = []
        ready = threading.Event()
        servers: list[uvicorn.Server] = []

        async def run() -> None:
            service = Service(
                Answering(target, known, backend, rows), Queue(backend.parallel, waiting), key, log.append, "ready"
            )
            made.append(service)
            servers.append(_web(application(service)))
            ready.set()
            await servers[0].serve(sockets=[listener])
            await service.answering.schemas.close()

        thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
        thread.start()
        ready.wait(30)

        def end() -> None:
            servers[0].should_exit = True
            thread.join(30)
            if rows is not None:
                rows.close()
            assert not thread.is_alive()

        ended.append(end)
        return Served(f"http://127.0.0.1:{listener.getsockname()[1]}", made[0], backend, log)

    yield start
    for end in ended:
        end()
