"""The tokens that end an answer, where no weights are loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from finetune.config.schema import ModelSection
from finetune.models.weight_files import model_folder
from finetune.runtime.files import load_json
from finetune.tokens import stop_ids


def end_tokens(section: ModelSection, tokenizer: Any, model_config: Any) -> list[int]:
    """Those that `stop_ids` finds in the loaded model. model_config: the model's own config. Raises UserError like
    `model_folder`."""
    try:
        generation = SimpleNamespace(**load_json(model_folder(section) / "generation_config.json"))
    except (OSError, ValueError, TypeError):
        generation = None  # then transformers makes it of the model's config
    return stop_ids(tokenizer, SimpleNamespace(generation_config=generation, config=model_config))
