"""Answers of a GGUF file, through llama.cpp's server: token ids go in, so that prompts are the same to the id, and an answer ends
where those of every other generator end (stopping.py).

It is no generator of a run: a run has no GGUF file. `finetune export` scores its files with it.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from finetune.evaluation.generators.asked import Asked, asked_of
from finetune.evaluation.generators.base import Answer, Done, Sampling
from finetune.evaluation.generators.stopping import EndOfAnswers
from finetune.models.llama_cpp import PACKAGE, LlamaServer, version
from finetune.tokens import encode_prompts

PARALLEL = 8
"""Answers computed at once, at most."""
_STEP = 256
"""Tokens to which the context of a slot is rounded up."""


class LlamaCppModel:
    """A GGUF file in llama.cpp, as a context manager: see `LoadedModel`.

    tokenizer, ends: of the model that the file was made from; ends are the tokens that end an answer. limit: the model's
    positions, None for no limit. gpu_layers, threads: as in `LlamaServer`.
    """

    dtype_name = "gguf"
    load_seconds = 0.0

    def __init__(
        self,
        gguf: Path,
        tokenizer: Any,
        ends: Collection[int],
        *,
        limit: int | None = None,
        gpu_layers: int | None = None,
        threads: int | None = None,
    ) -> None:
        self._gguf, self._tokenizer, self._limit = gguf, tokenizer, limit
        self._ends = EndOfAnswers(tokenizer, ends)
        self._gpu_layers, self._threads = gpu_layers, threads
        self._lock = threading.Lock()
        self._server: LlamaServer | None = None
        self._room = (0, 0)  # tokens of a slot, slots

    def __enter__(self) -> LlamaCppModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    @staticmethod
    def facts() -> dict[str, str]:
        """Name and version for a record of the answers."""
        return {"name": "llama_cpp", "version": f"{PACKAGE} {version()}"}

    def server(self, context_tokens: int, parallel: int = 1) -> LlamaServer:
        """The running server, with slots of at least `context_tokens`; started again where it has less room."""
        if self._server is None or self._room[0] < context_tokens or self._room[1] < parallel:
            self.close()
            size = -(-context_tokens // _STEP) * _STEP
            server = LlamaServer(
                self._gguf,
                context_tokens=size,
                parallel=parallel,
                gpu_layers=self._gpu_layers,
                threads=self._threads,
            )
            self._server, self._room = server.__enter__(), (size, parallel)
        return self._server

    def answers(
        self,
        prompts: Sequence[str],
        *,
        tuned: bool,
        batch_size: int,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        done: Done | None = None,
        description: str = "generate",
        progress: bool = True,
    ) -> list[Answer]:
        """As `LoadedModel.answers`. tuned: the file holds one model, so it says nothing here."""
        encoded = encode_prompts(self._tokenizer, prompts)
        asked, found = asked_of(
            prompts, encoded, positions=self._limit, max_new_tokens=max_new_tokens, sampling=sampling
        )
        if not asked:
            return found
        asked.sort(key=lambda one: one.ids)  # schemas together
        parallel = min(PARALLEL, batch_size, len(asked))
        server = self.server(max(one.total for one in asked), parallel)
        temperature = sampling.temperature if sampling else 0.0
        with ThreadPoolExecutor(parallel) as pool, tqdm(
            total=len(asked), desc=description, unit="question", disable=not progress
        ) as bar:  # fmt: skip

            def ask(one: Asked) -> None:
                answer = found[one.number] = self._one(server, one, temperature)
                with self._lock:
                    bar.update()
                    if done:
                        done(one.number, answer)

            waiting = [pool.submit(ask, one) for one in asked]
            try:
                for future in waiting:
                    future.result()
            except BaseException:
                for future in waiting:
                    future.cancel()
                raise
        return found

    def _one(self, server: LlamaServer, one: Asked, temperature: float) -> Answer:
        body = {
            "prompt": one.ids,
            "n_predict": one.room,
            "temperature": temperature,
            "seed": one.seed,
            "return_tokens": True,
            "cache_prompt": True,
            **({"top_k": 0, "top_p": 1.0, "min_p": 0.0} if temperature else {}),
        }
        growing = self._ends.answer(one.dialect)
        events = server.stream("/completion", body)
        try:
            for event in events:
                with self._lock:  # one tokenizer for all threads
                    if any(growing.add(int(token)) for token in event["tokens"]) or event["stop"]:
                        break
        finally:
            events.close()
        return one.answer(growing.text, len(growing.ids))
