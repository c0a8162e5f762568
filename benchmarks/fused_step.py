"""Measures where the time of a fused training step goes: variants interleaved on one GPU, and a profile of each.

    python -m benchmarks.fused_step MODELFOLDER --out DIR [--variants NAME ...] [--rounds 3]

MODELFOLDER is made by benchmarks.random_model. A step is 16 examples of text-to-SQL lengths in one micro-batch: forward,
backward, clipping, 8-bit AdamW. Prints a JSON object for every variant: tokens/s (median over steps and its quartiles), peak
memory, the host's time to launch a step, and the GPU's busy time; writes the kernels sorted by time to DIR.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from finetune.config.schema import LoraSection, ModelSection, QuantizationSection
from finetune.example import Example
from finetune.machine.hardware import GIB
from finetune.models.device import choose_device
from finetune.models.fused import ops_torch
from finetune.models.fused.model import FusedModel, ops_for, pack
from finetune.models.load import adapters_to_float32, attach_lora, load_base, load_tokenizer
from finetune.training.step.optimizer import FlatAdapters

ANSWER_TOKENS = 37
VARIANTS: dict[str, dict[str, Any]] = {
    "cached": {"dequantized": 32, "uncheckpointed": 32, "dropout": 0.0},
    "cached_drop": {"dequantized": 32, "uncheckpointed": 32, "dropout": 0.05},
    "plain": {"dequantized": 0, "uncheckpointed": 32, "dropout": 0.0},
    "plain_drop": {"dequantized": 0, "uncheckpointed": 32, "dropout": 0.05},
    "again": {"dequantized": 0, "uncheckpointed": 0, "dropout": 0.0},
    "again_drop": {"dequantized": 0, "uncheckpointed": 0, "dropout": 0.05},
    "again_cached_drop": {"dequantized": 32, "uncheckpointed": 0, "dropout": 0.05},
    "torch_ops": {"dequantized": 32, "uncheckpointed": 32, "dropout": 0.0, "torch_ops": True},
    "torch_ops_drop": {"dequantized": 32, "uncheckpointed": 32, "dropout": 0.05, "torch_ops": True},
    "efficient": {"dequantized": 32, "uncheckpointed": 32, "dropout": 0.0, "backend": "efficient"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    device = choose_device(arguments.dtype)
    section = ModelSection(name=str(arguments.model), torch_dtype=arguments.dtype)
    tokenizer = load_tokenizer(section)
    base = load_base(section, QuantizationSection(), device)
    base.config.use_cache = False
    model = attach_lora(base, LoraSection())
    model.train()
    adapters_to_float32(model)
    steps = texts(arguments.steps, len(tokenizer))
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": arguments.dtype,
                      "tokens_per_step": [sum(map(len, step[0])) for step in steps]}), flush=True)  # fmt: skip
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")  # before the step allocates anything
    results: dict[str, dict[str, Any]] = {name: {"rates": [], "host": []} for name in arguments.variants}
    for number in range(arguments.rounds):
        for name in arguments.variants:
            try:
                one_round(
                    model, VARIANTS[name], steps, results[name], profile=number == 0, out=arguments.out / f"{name}.txt"
                )
            except Exception as error:  # the other variants go on
                results[name]["error"] = f"{type(error).__name__}: {str(error)[:300]}"
                traceback.print_exc()
            gc.collect()
            torch.cuda.empty_cache()
    for name, result in results.items():
        rates, host = result.pop("rates"), result.pop("host")
        if len(rates) > 1:
            low, _, high = statistics.quantiles(rates, n=4)
            result |= {"tok_s": round(statistics.median(rates)), "quartiles": [round(low), round(high)],
                       "host_ms": round(1000 * statistics.median(host), 1)}  # fmt: skip
        print(json.dumps({"variant": name} | result), flush=True)


def texts(count: int, vocabulary: int) -> list[tuple[list[list[int]], list[list[int]]]]:
    """Steps of 16 random texts with log-normal lengths (median 223, 95th percentile 853 tokens), 37 answer tokens each."""
    draw = random.Random(0)
    result = []
    for _ in range(count):
        lengths = [min(2048, max(ANSWER_TOKENS + 8, round(draw.lognormvariate(5.409, 0.814)))) for _ in range(16)]
        ids = [[draw.randrange(10, vocabulary) for _ in range(length)] for length in lengths]
        result.append((ids, [Example(row, len(row) - ANSWER_TOKENS).targets for row in ids]))
    return result


def one_round(
    model: Any, variant: dict[str, Any], steps: Any, result: dict[str, Any], *, profile: bool, out: Path
) -> None:
    from bitsandbytes.optim import PagedAdamW8bit

    fused = FusedModel(
        model, model.get_base_model().dtype, dequantized_layers=variant["dequantized"], backend=variant.get("backend"),
        ops=ops_torch if variant.get("torch_ops") else ops_for(torch.device("cuda")),
    )  # fmt: skip
    fused.dropout = variant["dropout"]
    result["ops"], result["backend"] = fused.ops.__name__.rpartition(".")[2], fused.backend
    flat = FlatAdapters([parameter for parameter in model.parameters() if parameter.requires_grad])
    optimizer = PagedAdamW8bit([flat.parameter], lr=1e-5)
    torch.cuda.reset_peak_memory_stats()

    def step(ids: Any, targets: Any) -> tuple[float, torch.Tensor]:
        began = time.perf_counter()
        fused.refresh()
        flat.begin()
        loss = fused.loss(pack(ids, targets, fused.device), uncheckpointed_layers=variant["uncheckpointed"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_([flat.parameter], 1.0)
        optimizer.step()
        return time.perf_counter() - began, loss.detach()

    for ids, targets in steps[:2]:
        step(ids, targets)
    torch.cuda.synchronize()
    for ids, targets in steps:
        began = time.perf_counter()
        host, loss = step(ids, targets)
        torch.cuda.synchronize()
        result["rates"].append(sum(map(len, ids)) / (time.perf_counter() - began))
        result["host"].append(host)
    result["loss"] = round(float(loss), 4)
    result["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
    result["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 3)
    if profile:
        busy(step, steps[0], result, out)


def busy(step: Any, texts: Any, result: dict[str, Any], out: Path) -> None:
    """GPU time of one step by kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step(*texts)
        torch.cuda.synchronize()
    rows = sorted(recorded.key_averages(), key=lambda row: -row.self_device_time_total)
    lines = [
        f"{row.self_device_time_total / 1000:9.2f} ms {row.count:6d} x  {row.key[:110]}"
        for row in rows
        if row.self_device_time_total
    ]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    result["gpu_ms"] = round(sum(row.self_device_time_total for row in rows) / 1000, 1)
    result["kernels"] = sum(row.count for row in rows)
    result["profiled_tokens"] = sum(map(len, texts[0]))


if __name__ == "__main__":
    main()
