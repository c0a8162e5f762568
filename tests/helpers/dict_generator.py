"""A toy answer generator: it loads no weights, and looks its answers up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.config.schema import RunConfig
from finetune.evaluation.generators.base import Answer, Done, Sampling


class DictModel:
    dtype_name = "words"

    def __init__(self, base: Mapping[str, str], tuned: Mapping[str, str]) -> None:
        self._base, self._tuned = base, tuned

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
        words = [known.get(prompt, "").split()[:max_new_tokens] for prompt in prompts]
        return [Answer(" ".join(answer), len(answer)) for answer in words]


class DictGenerator:
    """base, tuned: answers by prompt. adapters: the folders that it was given to load, None where there was none."""

    name = "dict"
    version = "1"

    def __init__(self, base: Mapping[str, str], tuned: Mapping[str, str] | None = None) -> None:
        self._base, self._tuned = base, tuned or {}
        self.adapters: list[Path | None] = []

    def settings(self, config: RunConfig) -> dict[str, Any]:
        return {}

    def load(self, config: RunConfig, adapter: Path | None) -> DictModel:
        self.adapters.append(adapter)
        return DictModel(self._base, self._tuned)
