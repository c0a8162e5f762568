"""Tiny models of architectures that differ in their attention or their head, with weights large enough to show it."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

COMMON = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128,
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "soft caps and windows (Gemma 2)": (
        "Gemma2Config", {"head_dim": 16, "query_pre_attn_scalar": 64, "sliding_window": 8}
    ),
    "a soft cap (VaultGemma)": ("VaultGemmaConfig", {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "a soft cap of the head alone (Gemma 3)": (
        "Gemma3TextConfig", {"head_dim": 16, "sliding_window": 8, "final_logit_softcapping": 5.0}
    ),
    "another soft cap of the head (NanoChat)": ("NanoChatConfig", {}),
    "four multipliers (Granite)": (
        "GraniteConfig",
        {"logits_scaling": 8.0, "attention_multiplier": 0.2, "embedding_multiplier": 12.0, "residual_multiplier": 0.2},
    ),
    "scaled logits (Cohere)": ("CohereConfig", {}),
    "attention sinks (gpt-oss)": ("GptOssConfig", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "ALiBi (Bloom)": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "no SDPA (GPT-J)": ("GPTJConfig", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
    "biases (Phi)": ("PhiConfig", {}),
    "tied weights (Gemma)": ("GemmaConfig", {"head_dim": 16}),
    "windows (Mistral)": ("MistralConfig", {"sliding_window": 8}),
    "Llama": ("LlamaConfig", {}),
}  # fmt: skip


def tiny_config(name: str, **changes: Any) -> Any:
    kind, settings = ARCHITECTURES[name]
    return getattr(transformers, kind)(**{**COMMON, **settings, **changes})


def tiny_model_of(config: Any, attention: str | None) -> Any:
    """In eval mode, float32. The same weights whatever the attention."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return model
