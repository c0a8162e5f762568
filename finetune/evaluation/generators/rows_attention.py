"""Attention for answers in progress: one new token of each row against the keys and values of its row, which are not copied for
the query heads that share them (grouped-query attention).

On a CPU it is two batched matrix products, with the keys on the left of the first: torch's SDPA takes 1.3 to 2 times as long for
so few queries, and so do MKL's products with the queries on the left (SmolLM2-135M, 48 rows, 160 columns, two cores without AMX).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "finetune_rows"


def rows_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, Tensor | None]:
    """query: (rows, heads, tokens, head dimension); key, value: (rows, key heads, columns, head dimension)."""
    rows, heads, tokens, width = query.shape
    shared = heads // key.shape[1]
    on_cpu = query.device.type == "cpu" and query.dtype == torch.float32
    plain = tokens > 1 or (shared == 1 and not on_cpu) or settings.get("position_bias") is not None
    if plain or attention_mask is None or settings.get("dropout"):
        found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **settings
        )
        return found
    query = query.reshape(rows, key.shape[1], shared, width)  # the query heads of a key head, as if they were tokens
    if on_cpu:
        output = _products(query, key, value, attention_mask, settings.get("scaling") or width**-0.5)
    else:
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask.expand(rows, 1, shared, -1), scale=settings.get("scaling")
        )
    return output.reshape(rows, 1, heads, value.shape[-1]), None


def _products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """mask: (rows, 1, 1, columns), True where attention sees a column."""
    query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    scores = torch.bmm(key, (query * scale).transpose(1, 2)).transpose(1, 2)
    scores = scores.view(len(mask), -1, *scores.shape[1:])
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.bmm(weights.flatten(0, 1), value)


AttentionInterface.register(NAME, rows_attention)


@contextmanager
def using(model: Any, name: str) -> Iterator[None]:
    """Within the block the model's attention is the one of this name."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = {key: getattr(config, "_attn_implementation", None) for key, config in configs.items()}
    try:
        for config in configs.values():
            if getattr(config, "_attn_implementation", None):
                config._attn_implementation = name
        yield
    finally:
        for key, config in configs.items():
            if before[key]:
                config._attn_implementation = before[key]
