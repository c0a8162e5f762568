"""How many tokens a model has positions for: a longer text gives an error or nonsense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.config.schema import ModelSection

_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")


def positions(model: Any) -> int | None:
    """The number of positions of a loaded model, or of its config; None for a model without a limit."""
    config = getattr(model, "config", model)
    text = getattr(config, "get_text_config", None)
    config = text() if callable(text) else config
    found = [value for name in _NAMES if isinstance(value := getattr(config, name, None), int) and value > 0]
    return found[0] if found else None


def configured_positions(section: ModelSection) -> int | None:
    """The same from the model's config.json alone. Raises UserError if it cannot be loaded."""
    from transformers import AutoConfig

    from finetune.models.source import load_with

    folder = section.name if Path(section.name).is_dir() else None  # which needs no weights for this
    return positions(load_with(AutoConfig.from_pretrained, section, folder))
