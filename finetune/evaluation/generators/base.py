"""The interface of an answer generator for `evaluate` and `generate`: it loads a config's model with a run's adapter and turns
prompts into answers. finetune/evaluation/generators/registry.py lists the generators."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from finetune.config.schema import RunConfig

Problem = Literal["too_long", "out_of_memory"]
"""Why there is no whole answer: the prompt, or prompt and answer, exceed the model's positions; or the prompt does not fit into
memory, even alone. It is the question's verdict."""


class Answer(NamedTuple):
    """The text of an answer, and the number of its tokens without the end-of-text token. prompt_tokens: None if unknown."""

    text: str
    new_tokens: int
    problem: Problem | None = None
    prompt_tokens: int | None = None


class LoadedModel(Protocol):
    """A base model in memory, with the adapter it was loaded with, if any."""

    @property
    def dtype_name(self) -> str:
        """The dtype of the computation, for example bfloat16."""
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

        tuned: whether to use the adapter. batch_size: prompts per batch. A prompt that is too long is an answer with a problem.
        """
        ...


class Generator(Protocol):
    """Loads models and generates answers with them."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str:
        """The version of the software that computes the answers; another version may answer differently."""
        ...

    def load(self, config: RunConfig, adapter: Path | None) -> LoadedModel:
        """The config's model with the adapter of this folder. Raises UserError for weights or an adapter that do not load."""
        ...
