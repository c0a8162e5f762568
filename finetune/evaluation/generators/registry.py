"""The answer generators by name. To add one, write a module here and add it to GENERATORS: docs/extending.md."""

from __future__ import annotations

from finetune.errors import UserError
from finetune.evaluation.generators.base import Generator
from finetune.evaluation.generators.hf import HfGenerator

DEFAULT = "hf"
GENERATORS: dict[str, Generator] = {DEFAULT: HfGenerator()}


def generator_named(name: str) -> Generator:
    """Raises UserError for a name that is not registered."""
    if name not in GENERATORS:
        raise UserError(
            f"no answer generator is called {name!r}; known: {', '.join(GENERATORS)}",
            code="evaluation.unknown_generator",
        )
    return GENERATORS[name]
