"""The interface of an answer generator for `evaluate` and `generate`: it loads a config's model with a run's adapter and turns
prompts into answers. finetune/evaluation/generators/registry.py lists the generators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from finetune.config.schema import RunConfig

Problem = Literal["too_long", "out_of_memory", "failed"]
"""Why there is no whole answer: the prompt, or prompt and answer, exceed the model's positions; the prompt does not fit into
memory, even alone; or the generator refused this prompt, whatever the others got. It is the question's verdict."""


class Answer(NamedTuple):
    """The text of an answer, and the number of its tokens without the end-of-text token. prompt_tokens: None if unknown."""

    text: str
    new_tokens: int
    problem: Problem | None = None
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn at random. seeds: one for each prompt, so that an answer depends on its prompt and seed alone."""

    temperature: float
    seeds: Sequence[int]


Done = Callable[[int, Answer], None]
"""Called with the number of a prompt and its answer as soon as it is there, in any order."""


class LoadedModel(Protocol):
    """A base model in memory, with the adapter it was loaded with, if any."""

    @property
    def dtype_name(self) -> str:
        """The dtype of the computation, for example bfloat16."""
        ...

    @property
    def load_seconds(self) -> float:
        """Seconds that loading has taken so far, also what was loaded within `answers`: not part of the time of an answer."""
        ...

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
        """The answer to every prompt, in the prompts' order, of at most `max_new_tokens` tokens; greedy without `sampling`.

        tuned: whether to use the adapter. batch_size: prompts answered at once; a generator that schedules by itself takes it as
        a hint. done: told of each answer as it comes. A prompt that is too long is an answer with a problem.
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

    def settings(self, config: RunConfig) -> dict[str, Any]:
        """What the answers depend on besides model, adapter and prompts, on this machine: dtype, device, how the adapter is
        applied. Part of the key of kept answers, and of eval.json."""
        ...

    def load(self, config: RunConfig, adapter: Path | None) -> LoadedModel:
        """The config's model with the adapter of this folder. Raises UserError for weights or an adapter that do not load."""
        ...
