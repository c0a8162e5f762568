"""The answer generators by name. To add one, write a module here and add it to GENERATORS: docs/extending.md."""

from __future__ import annotations

from finetune.config.schema import RunConfig
from finetune.errors import UserError
from finetune.evaluation.generators.base import Generator
from finetune.evaluation.generators.hf import HfGenerator

AUTO = "auto"
DEFAULT = "hf"
GENERATORS: dict[str, Generator] = {DEFAULT: HfGenerator()}


def generator_for(config: RunConfig, name: str | None = None) -> Generator:
    """The generator of this name, else that of evaluation.generator; for `auto`, the fastest that runs on this machine."""
    wanted = name or config.evaluation.generator
    return generator_named(DEFAULT if wanted == AUTO else wanted)


def generator_named(name: str) -> Generator:
    """Raises UserError for a name that is not registered."""
    if name not in GENERATORS:
        raise UserError(
            f"no answer generator is called {name!r}; known: {', '.join(GENERATORS)}",
            code="evaluation.unknown_generator",
        )
    return GENERATORS[name]
