"""A model family for tests: Llama under another model_type and class."""

from __future__ import annotations

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


class ToyLlamaConfig(LlamaConfig):
    model_type = "toyllama"


class ToyLlamaForCausalLM(LlamaForCausalLM):
    config_class = ToyLlamaConfig


AutoModelForCausalLM.register(ToyLlamaConfig, ToyLlamaForCausalLM, exist_ok=True)
