"""Which layers of a model can have LoRA adapters: found from its config.json alone, before anything is written or loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from finetune.config.schema import LoraSection
from finetune.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MOST_NAMED = 20


def check_target_modules(config: PretrainedConfig, lora: LoraSection, *, trust_remote_code: bool) -> None:
    """Raises UserError where `check_modules` would after minutes of loading. config: the model's own, from its config.json."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # a model with code of its own may need its weights for this; loading it checks again
        return
    check_modules(skeleton, lora)


def check_modules(model: PreTrainedModel, lora: LoraSection) -> None:
    """Raises UserError for a name that matches no layer, and for the token embeddings and the output head."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)}
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    usable = {name.rpartition(".")[2] for name, layer in layers.items() if id(layer) not in ends}
    found = {t: [layer for name, layer in layers.items() if f".{name}".endswith(f".{t}")] for t in lora.target_modules}
    unmatched = [target for target, matches in found.items() if not matches]
    heads = [target for target, matches in found.items() if ends & {id(layer) for layer in matches}]
    if unmatched or heads:
        what = (
            f"{', '.join(unmatched)} match nothing in this model" if unmatched else f"{', '.join(heads)} get no adapter"
        )
        raise UserError(
            f"lora.target_modules: {what}; its linear layers are {', '.join(sorted(usable)[:MOST_NAMED])}",
            code="lora.unknown_modules",
        )
