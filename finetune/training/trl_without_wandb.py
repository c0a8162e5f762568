"""TRL's names as we use them, imported without W&B."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["DataCollatorForLanguageModeling", "SFTConfig", "SFTTrainer"]


@contextmanager
def not_importable(package: str) -> Iterator[None]:
    """Inside, `import package` raises ImportError, as where it is not installed; one that is imported already stays so."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


with not_importable("wandb"):  # TRL imports it for its model card alone (we make none): a quarter of a run's start-up
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
