"""The answer generators by name. To add one, write a module here and add it to GENERATORS: docs/extending.md."""

from __future__ import annotations

from finetune.config.schema import FEW_QUESTIONS, RunConfig
from finetune.errors import UserError
from finetune.evaluation.generators.base import Generator
from finetune.evaluation.generators.hf import HfGenerator
from finetune.evaluation.generators.vllm import VllmGenerator
from finetune.evaluation.generators.vllm_place import missing, require_vllm
from finetune.runtime.console import say

AUTO = "auto"
DEFAULT = "hf"
FAST = "vllm"
GENERATORS: dict[str, Generator] = {DEFAULT: HfGenerator(), FAST: VllmGenerator()}


def generator_for(config: RunConfig, name: str | None = None, *, questions: int | None = None) -> Generator:
    """The generator of this name, else that of evaluation.generator; for `auto`, the fastest that runs on this machine.

    questions: how many will be asked, else evaluation.max_questions: a few are answered before vLLM is loaded. Raises UserError
    for a name that is not registered, and for vllm where it cannot run.
    """
    wanted = name or config.evaluation.generator
    if wanted == AUTO:
        return _fastest(config, config.evaluation.max_questions if questions is None else questions)
    found = generator_named(wanted)
    if wanted == FAST:
        require_vllm(config)
    return found


def generator_named(name: str) -> Generator:
    """Raises UserError for a name that is not registered."""
    if name not in GENERATORS:
        raise UserError(
            f"no answer generator is called {name!r}; known: {', '.join(GENERATORS)}",
            code="evaluation.unknown_generator",
        )
    return GENERATORS[name]


def _fastest(config: RunConfig, questions: int | None) -> Generator:
    if questions is not None and questions < FEW_QUESTIONS:
        return GENERATORS[DEFAULT]
    why = missing(config, auto=True)
    chosen = DEFAULT if why else FAST
    say(f"evaluation.generator=auto: {chosen}" + (f", because {why}" if why else ", which is the fastest on this GPU"))
    return GENERATORS[chosen]
