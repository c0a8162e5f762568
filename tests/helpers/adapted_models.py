"""Tiny model folders of several families with an adapter that changes their answers, as training would have left it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from benchmarks.random_model import make_tokenizer
from finetune.config.schema import RunConfig
from finetune.models.adapter import BASE, seal_adapter
from finetune.models.device import Device
from finetune.models.load import attach_lora, load_base
from finetune.models.source import identity_of_base
from finetune.runtime.files import write_json

COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "apart": ("MistralConfig", {"tie_word_embeddings": False, "sliding_window": None}),
    "biases": ("Qwen2Config", {"tie_word_embeddings": False}),
    "scaled": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "head_dim": 32,
        },
    ),
}  # fmt: skip
CORPUS = [
    "### sqlite schema\nCREATE TABLE item (id INTEGER, name TEXT, price REAL)\n### Question\n",
    "SELECT name FROM item",
]


def base_folder(folder: Path, family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A model folder of a family; `changes` to its config. Large weights, so that answers differ."""
    kind, settings = FAMILIES[family]
    tokenizer = make_tokenizer(CORPUS, 300)
    config = getattr(transformers, kind)(**{**COMMON, "vocab_size": len(tokenizer), **settings, **changes})
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) / 4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config_of(folder: Path, *, load_in_4bit: bool) -> RunConfig:
    config = RunConfig()
    config.model.name = str(folder)
    config.model.torch_dtype = "float32"
    config.quantization.load_in_4bit = load_in_4bit
    config.lora.r, config.lora.lora_alpha, config.lora.lora_dropout = 4, 8, 0.0
    return config


def adapter_folder(folder: Path, config: RunConfig, *, scale: float = 0.2) -> Path:
    """A sealed adapter with both matrices different from zero."""
    torch.manual_seed(2)
    model = attach_lora(
        load_base(config.model, config.quantization, Device(torch.device("cpu"), torch.float32)), config.lora
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    model.save_pretrained(str(folder))
    write_json(folder / BASE, identity_of_base(config.model))
    seal_adapter(folder)
    return folder
