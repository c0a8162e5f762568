"""Where the time of a decoding step goes on a GPU: kernels, processor and GPU time, for each way of holding the weights.

    python -m benchmarks.profile_generation                  (Mistral-7B's shape, random weights, in less than a minute)
    python -m benchmarks.profile_generation --layers 8 --batch 64

plain: a forward pass as transformers' `generate` makes it. ours: evaluation/generators/decoding.py, with the prompts' passes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.random_model import SHAPES
from finetune.evaluation.generators.asked import Asked
from finetune.evaluation.generators.decoding import Decoder
from finetune.models.casts import adapters_to_dtype
from finetune.models.load import merge_adapter

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 5
HEADING = f"{'weights':34}{'kernels':>9}{'CPU ms':>9}{'GPU ms':>9}{'plain ms':>10}{'ours ms':>9}{'tokens/s':>10}"


class NoEnd:
    """A tokenizer whose texts never end."""

    eos_token_id, pad_token_id = -1, 0

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return ""


def random_model(layers: int) -> Any:
    config = SHAPES["mistral-7b"]()
    config.num_hidden_layers = layers
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()


def to_nf4(model: Any) -> Any:
    """Quantise the decoder's linear layers as load_base does."""
    import bitsandbytes

    for parent in list(model.model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, torch.nn.Linear):
                small = bitsandbytes.nn.Linear4bit(
                    layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                small.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
                setattr(parent, name, small.cuda())
    model.is_loaded_in_4bit = True  # PEFT looks here
    return model


def with_adapter(model: Any) -> Any:
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=MODULES, task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    return adapted.eval()


def plain_step(model: Any, batch: int, prompt: int) -> Callable[[], None]:
    cache = DynamicCache(config=model.config)
    ids = torch.randint(5, 1000, (batch, prompt), device="cuda")
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    last = ids[:, -1:]

    def step() -> None:
        with torch.inference_mode():
            mask = torch.ones(batch, cache.get_seq_length() + 1, dtype=torch.long, device="cuda")
            model(input_ids=last, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return step


def measure(name: str, model: Any, batch: int, prompt: int, new: int) -> None:
    step = plain_step(model, batch, prompt)
    step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    plain = (time.perf_counter() - began) / STEPS
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    on_gpu = [event for event in profile.events() if event.device_type == torch.profiler.DeviceType.CUDA]
    kernels, gpu = len(on_gpu) / STEPS, sum(event.device_time_total for event in on_gpu) / STEPS / 1000
    cpu = sum(event.self_cpu_time_total for event in profile.key_averages()) / STEPS / 1000
    seconds = min(_decode(model, batch, prompt, new) for _ in range(2))
    print(f"{name:34}{kernels:9.0f}{cpu:9.1f}{gpu:9.1f}{1000 * plain:10.1f}{1000 * seconds / new:9.1f}"
          f"{batch * new / seconds:10.0f}", flush=True)  # fmt: skip


def _decode(model: Any, batch: int, prompt: int, new: int) -> float:
    asked = [Asked(n, [(7 * n + k) % 1000 + 5 for k in range(prompt)], new, "sqlite") for n in range(batch)]
    torch.cuda.synchronize()
    began = time.perf_counter()
    Decoder(model, NoEnd(), batch, None, lambda *_: None).answer(asked)  # type: ignore[arg-type]
    torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description="Profile decoding steps on a GPU.")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=187, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parsed = parser.parse_args()
    sizes = parsed.batch, parsed.prompt, parsed.new
    print(
        f"{torch.cuda.get_device_name()}, {parsed.layers} layers, {sizes[0]} rows; measured",
        HEADING,
        sep="\n",
        flush=True,
    )
    model = with_adapter(random_model(parsed.layers))
    measure("bf16, adapter in float32", model, *sizes)
    adapters_to_dtype(model, torch.bfloat16)
    measure("bf16, adapter in bf16", model, *sizes)
    model = merge_adapter(model)
    measure("bf16, merged", model, *sizes)
    model = to_nf4(model)
    torch.cuda.empty_cache()
    measure("NF4 alone", model, *sizes)
    model = with_adapter(model)
    measure("NF4, adapter in float32", model, *sizes)
    adapters_to_dtype(model, torch.bfloat16)
    measure("NF4, adapter in bf16", model, *sizes)


if __name__ == "__main__":
    main()
