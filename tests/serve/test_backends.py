"""What the backends of `finetune serve` refuse."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from finetune.config.schema import RunConfig
from finetune.data.prompts import PromptTemplate
from finetune.serve.backends.hf import HfBackend
from finetune.serve.target import Target
from tests.helpers.errors import raises


def target(path: Path) -> Target:
    return Target(name="model", path=path, config=RunConfig(), template=PromptTemplate(), adapter=None)


def test_llama_cpp_needs_a_gguf_file_or_a_run_to_make_one(tmp_path: Path) -> None:
    with raises("serve.wrong_backend", match="is no GGUF file"):
        target(tmp_path).gguf_file()


def test_a_prompt_that_the_generator_refuses_is_the_clients_mistake(tmp_path: Path) -> None:
    """Such as one with a control token that the tokenizer cannot write as text."""

    class Refusing:
        async def post(self, *_: Any, **__: Any) -> Any:
            return SimpleNamespace(status_code=422, content=b'{"error": "cannot write \\u0001"}')

    async def ask() -> None:
        backend = HfBackend(target(tmp_path))
        backend._client = Refusing()  # type: ignore[assignment]
        async for _ in backend.answer("prompt", "sqlite", 8, partial=False):
            raise AssertionError("an answer")

    with raises("serve.prompt_refused", match="cannot write"):
        asyncio.run(ask())
