"""Casts of a loaded model that only answers, to the dtype that it computes in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cast_whole(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast what is not in 4 bits, which `model.to` refuses to do in a model with 4-bit weights."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def adapters_to_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast the adapters of a model that only answers to the dtype it computes in: PEFT otherwise casts the activations of every
    layer to theirs and back."""
    for module in model.modules():
        for name in ("lora_A", "lora_B"):
            if isinstance(layers := getattr(module, name, None), torch.nn.ModuleDict):
                layers.to(dtype)
