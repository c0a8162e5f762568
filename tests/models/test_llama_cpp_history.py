"""An answer of llama.cpp depends on its prompt alone, not on what the server was asked before or at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import ModelSection
from finetune.evaluation.generators.llama_cpp import LlamaCppModel
from finetune.models.llama_cpp import PARALLEL, LlamaServer
from finetune.models.load import load_tokenizer
from finetune.serve.backends.llama_cpp import _request

pytest.importorskip("xllamacpp", reason="the extra `export` is not installed")

TABLES = "".join(f"CREATE TABLE item_{n} (id INTEGER, name TEXT, price REAL)\n" for n in range(9))
PROMPTS = [
    f"### sqlite schema\n{TABLES}### Question\nWhich item has number {n}{' or more' * n}?\n### SQL\n" for n in range(4)
]
HISTORY = (0, 0, 1, 0, 2, 3, 0)
"""Prompt 0 on a fresh server, again, and after others that begin like it."""


@pytest.fixture
def fresh(tiny_gguf: Path) -> Iterator[LlamaServer]:
    with LlamaServer(tiny_gguf, context_tokens=2048, parallel=PARALLEL) as server:
        yield server


def numbers(server: LlamaServer, prompt: str) -> tuple[Any, ...]:
    """Tokens and their log probabilities, in which a difference of rounding shows long before it changes a text."""
    path, body = _request(server.tokenize(prompt), 6)
    found = server.request(path, body | {"stream": False, "n_probs": 1, "ignore_eos": True})
    return (*found["tokens"], *(token["logprob"] for token in found["completion_probabilities"]))


def test_an_answer_does_not_depend_on_what_was_asked_before(fresh: LlamaServer) -> None:
    answers = [(number, numbers(fresh, PROMPTS[number])) for number in HISTORY]
    assert len({answer for number, answer in answers if number == 0}) == 1
    assert len(set(answers)) == len(PROMPTS)


def test_an_answer_does_not_depend_on_what_is_asked_at_the_same_time(fresh: LlamaServer) -> None:
    alone = [numbers(fresh, prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(lambda prompt: numbers(fresh, prompt), PROMPTS)) == alone


def test_an_evaluation_asks_in_the_same_way(tiny_model: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    stream = LlamaServer.stream

    def recorded(server: LlamaServer, path: str, body: dict[str, Any]) -> Any:
        asked.append(body)
        return stream(server, path, body)

    monkeypatch.setattr(LlamaServer, "stream", recorded)
    tokenizer = load_tokenizer(ModelSection(name=str(tiny_model)))
    with LlamaCppModel(tiny_gguf, tokenizer, [2], limit=2048) as served:
        found = [
            served.answers([PROMPTS[n]], tuned=False, batch_size=8, max_new_tokens=6, progress=False) for n in HISTORY
        ]
        served.answers(PROMPTS, tuned=False, batch_size=8, max_new_tokens=6, progress=False)
        assert served._room[1] == PARALLEL == 1
    assert {body["cache_prompt"] for body in asked} == {False}
    assert len({answers[0].text for n, answers in zip(HISTORY, found, strict=True) if n == 0}) == 1
