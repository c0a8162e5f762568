"""A toy answer generator: it loads no weights, and looks its answers up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.config.schema import RunConfig
from finetune.evaluation.generators.base import Answer, Done, Sampling

Sampled = Callable[[str, int], str]
"""The answer to a prompt with a seed."""


class DictModel:
    """asked: what it has answered so far: prompt, and temperature and seed or None. stop_before: the number of answers after
    which it raises `error`."""

    dtype_name = "words"

    def __init__(
        self,
        base: Mapping[str, str],
        tuned: Mapping[str, str],
        sampled: Sampled | None = None,
        stop_before: int | None = None,
        error: type[BaseException] = KeyboardInterrupt,
    ) -> None:
        self._base, self._tuned, self._sampled = base, tuned, sampled
        self._stop, self._error = stop_before, error
        self.asked: list[tuple[str, tuple[float, int] | None]] = []

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
        known = self._tuned if tuned else self._base
        answers: list[Answer] = []
        for place, prompt in enumerate(prompts):
            drawn = (sampling.temperature, sampling.seeds[place]) if sampling else None
            if len(self.asked) == self._stop:
                raise self._error
            self.asked.append((prompt, drawn))
            text = known.get(prompt, "") if drawn is None else self._draw(prompt, drawn[1])
            words = text.split(" ")[:max_new_tokens] if text else []
            answers.append(Answer(" ".join(words), len(words)))
            if done:
                done(place, answers[-1])
        return answers

    def _draw(self, prompt: str, seed: int) -> str:
        assert self._sampled, "sampled answers were not expected"
        return self._sampled(prompt, seed)


class DictGenerator:
    """base, tuned: answers by prompt. adapters: the folders that it was given to load, None where there was none. Further
    arguments: of DictModel. model: the one that was loaded last."""

    name = "dict"
    version = "1"

    def __init__(self, base: Mapping[str, str], tuned: Mapping[str, str] | None = None, **settings: Any) -> None:
        self._base, self._tuned, self._settings = base, tuned or {}, settings
        self.adapters: list[Path | None] = []
        self.model = DictModel({}, {})

    def settings(self, config: RunConfig) -> dict[str, Any]:
        return {}

    def load(self, config: RunConfig, adapter: Path | None) -> DictModel:
        self.adapters.append(adapter)
        self.model = DictModel(self._base, self._tuned, **self._settings)
        return self.model
