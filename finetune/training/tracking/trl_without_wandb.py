"""The names we use from TRL, imported without loading W&B."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["DataCollatorForLanguageModeling", "SFTConfig", "SFTTrainer"]


@contextmanager
def not_importable(package: str) -> Iterator[None]:
    """Inside the context, `import package` raises ImportError, as if it were not installed, unless it is already imported."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


with not_importable(
    "wandb"
):  # TRL needs it only for model cards, which we do not write; it is a quarter of a run's start-up time
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
