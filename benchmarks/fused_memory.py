"""Measures the peak memory of fused training steps on a GPU and compares it with finetune/estimate/memory_fused.py.

    python -m benchmarks.fused_memory MODELFOLDER [--dtype bfloat16]

MODELFOLDER is made by benchmarks.random_model. A cell is a number of tokens per micro-batch (texts of 300, 37 of them answer), a
number of layers without activation checkpointing and a number with dequantized weights; it runs two optimizer steps of two
micro-batches each, with paged 8-bit AdamW on the flat adapters. Prints a JSON object for every cell: measured and estimated peak
and reserved memory (GiB).
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import torch

from finetune.config.schema import LoraSection, ModelSection, QuantizationSection
from finetune.estimate.memory_fused import FusedLoad, fused_estimate
from finetune.estimate.memory_hf import Workload
from finetune.example import Example
from finetune.machine.hardware import GIB
from finetune.models.architectures import shape_of
from finetune.models.device import choose_device
from finetune.models.fused import ops_torch
from finetune.models.fused.model import FusedModel, pack
from finetune.models.load import adapters_to_float32, attach_lora, load_base
from finetune.training.step.optimizer import FlatAdapters

TEXT, ANSWER = 300, 37
CELLS = (
    (600, 32, 0), (1500, 32, 32), (3000, 32, 0), (3000, 0, 0), (6000, 32, 32), (6000, 16, 0),
    (9000, 0, 0), (9000, 32, 0), (12000, 8, 16), (12000, 0, 32), (15000, 32, 0), (18000, 0, 0),
)  # fmt: skip
"""Tokens, layers without activation checkpointing, layers with dequantized weights."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--old-gpu", action="store_true", help="torch's operations and the memory-efficient attention")
    arguments = parser.parse_args()
    device = choose_device(arguments.dtype)
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    base = load_base(
        ModelSection(name=str(arguments.model), torch_dtype=arguments.dtype), QuantizationSection(), device
    )
    base.config.use_cache = False
    lora = LoraSection()
    model = attach_lora(base, lora)
    model.train()
    adapters_to_float32(model)
    shape = shape_of(str(arguments.model))
    assert shape is not None
    for tokens, uncheckpointed, dequantized in CELLS:
        load = Workload(1, TEXT, dtype=device.dtype_name, lora_r=lora.r, lora_dropout=lora.lora_dropout)
        row: dict[str, Any] = {
            "tokens": tokens,
            "uncheckpointed_layers": uncheckpointed,
            "dequantized_layers": dequantized,
            "dtype": arguments.dtype,
        }
        try:
            row |= measured(model, tokens, uncheckpointed, dequantized, old_gpu=arguments.old_gpu)
        except torch.OutOfMemoryError:
            row["out_of_memory"] = True
        asked = FusedLoad(
            load,
            tokens,
            uncheckpointed,
            dequantized,
            ampere=not arguments.old_gpu,
            texts=tokens // TEXT,
            labelled=ANSWER / TEXT,
        )
        estimated = fused_estimate(shape, asked)
        row |= {
            "estimated_peak": round(estimated.peak / GIB, 3),
            "estimated_reserved": round(estimated.reserved / GIB, 3),
        }
        print(json.dumps(row), flush=True)


def measured(model: Any, tokens: int, uncheckpointed: int, dequantized: int, *, old_gpu: bool) -> dict[str, float]:
    from bitsandbytes.optim import PagedAdamW8bit

    gc.collect()
    torch.cuda.empty_cache()
    options: dict[str, Any] = {"ops": ops_torch, "backend": "efficient"} if old_gpu else {}
    fused = FusedModel(model, model.get_base_model().dtype, dequantized_layers=dequantized, **options)
    flat = FlatAdapters([parameter for parameter in model.parameters() if parameter.requires_grad])
    optimizer = PagedAdamW8bit([flat.parameter], lr=1e-5)
    ids = torch.randint(10, 30000, (tokens // TEXT, TEXT)).tolist()
    targets = [Example(row, TEXT - ANSWER).targets for row in ids]
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        fused.refresh()
        flat.begin()
        for _ in range(2):
            fused.loss(pack(ids, targets, fused.device), uncheckpointed_layers=uncheckpointed).backward()
        torch.nn.utils.clip_grad_norm_([flat.parameter], 1.0)
        optimizer.step()
    torch.cuda.synchronize()
    return {
        "peak": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "reserved": round(torch.cuda.max_memory_reserved() / GIB, 3),
    }


if __name__ == "__main__":
    main()
