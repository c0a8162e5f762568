"""What an answer generator is to `evaluate` and `generate`: it loads the model of a config, with a run's adapter, and turns
prompts into answers. finetune/evaluation/generators/registry.py lists the generators."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from finetune.config.schema import RunConfig


class Answer(NamedTuple):
    """The text of an answer, and the number of its tokens without the end-of-text token."""

    text: str
    new_tokens: int


class LoadedModel(Protocol):
    """A base model in memory, with the adapter that it was loaded with, if any."""

    @property
    def dtype_name(self) -> str:
        """Of the computation, for example bfloat16."""
        ...

    def answers(
        self,
        prompts: Sequence[str],
        *,
        tuned: bool,
        batch_size: int,
        max_new_tokens: int,
        description: str = "generate",
        progress: bool = True,
    ) -> list[Answer]:
        """The greedy answer to every prompt, in the prompts' order, of at most `max_new_tokens` tokens.

        tuned: with the adapter, or as the base model. batch_size: prompts at once. UserError where memory is too small.
        """
        ...


class Generator(Protocol):
    """How a model is loaded and asked."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str:
        """Of the software that computes the answers: another one may answer otherwise."""
        ...

    def load(self, config: RunConfig, adapter: Path | None) -> LoadedModel:
        """The config's model, with the adapter in this folder. UserError for weights or an adapter that do not load."""
        ...
