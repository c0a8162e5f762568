"""Measures real training steps of the Hugging Face layers (training.kernels=hf) on a GPU: memory, compared with
finetune/estimate/memory_hf.py, and speed.

    python -m benchmarks.step_memory /tmp/mistral --dtype bfloat16

MODEL is a folder made by benchmarks.random_model (random weights suffice for memory and speed). Prints one JSON object per
line: for every cell the measured memory and the error of the estimate, then the speed at text-to-SQL lengths (log-normal,
median 223 and 95th percentile 853 tokens: the lengths behind ../shared/reference/h100_anchors.json). Every cell runs in its
own process, because a trained model leaves 262 MB allocated, whatever is deleted.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from finetune.config.schema import LoraSection, ModelSection, QuantizationSection, RunConfig, TrainingSection
from finetune.data.tokenize import Examples
from finetune.estimate import memory_hf
from finetune.example import Example
from finetune.machine.hardware import GIB
from finetune.models.architectures import shape_of
from finetune.models.device import Device, choose_device
from finetune.models.load import attach_lora, load_base, load_tokenizer
from finetune.training.arguments import trainer_arguments
from finetune.training.callbacks import Throughput
from finetune.training.step.plan import plan_step
from finetune.training.trainer import Hooks, build_trainer

ANSWER_TOKENS = 37
CELLS = [(1, 512, False), (2, 1024, False), (4, 512, True), (4, 1024, True), (4, 2048, True), (7, 2048, True)]
"""Micro-batch size, tokens, gradient checkpointing."""
EPOCH = 240  # examples: 15 optimizer steps of 4 x 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument(
        "--cell", type=int, help="index in CELLS of the only cell to run; one past the last is the speed"
    )
    arguments = parser.parse_args()
    if arguments.cell is None:
        for number in range(len(CELLS) + 1):
            subprocess.run(
                [sys.executable, "-m", "benchmarks.step_memory", *sys.argv[1:], "--cell", str(number)], check=True
            )
        return
    device = choose_device(arguments.dtype)
    section = ModelSection(name=str(arguments.model), torch_dtype=arguments.dtype)
    tokenizer = load_tokenizer(section)
    base = load_base(section, QuantizationSection(), device)
    base.config.use_cache = False
    lora = LoraSection()
    model = attach_lora(base, lora)
    if arguments.cell < len(CELLS):
        row = measure(model, tokenizer, device, lora, *CELLS[arguments.cell])
    else:
        row = measure_speed(model, tokenizer, device)
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": arguments.dtype}
    print(json.dumps(machine | row), flush=True)


def measure(
    model: Any, tokenizer: Any, device: Device, lora: LoraSection, rows: int, tokens: int, checkpointing: bool
) -> dict[str, Any]:
    """Two optimizer steps of two micro-batches each; rows are one token shorter than `tokens`, so that there is padding."""
    torch.cuda.reset_peak_memory_stats()
    result: dict[str, Any] = {"rows": rows, "tokens": tokens, "checkpointing": checkpointing}
    try:
        train(
            model, tokenizer, device, [tokens - 1] * (rows * 4), rows=rows, accumulation=2, checkpointing=checkpointing
        )
    except torch.OutOfMemoryError:
        return result | {"out_of_memory": True}
    shape = shape_of(str(model.config._name_or_path))
    assert shape is not None
    load = memory_hf.Workload(
        rows,
        tokens,
        dtype=device.dtype_name,
        checkpointing=checkpointing,
        lora_r=lora.r,
        lora_dropout=lora.lora_dropout,
    )
    estimated = memory_hf.estimate(shape, load)
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return result | {
        "peak_gib": round(peak / GIB, 3),
        "peak_estimate_off": round(estimated.peak / peak - 1, 4),
        "reserved_gib": round(reserved / GIB, 3),
        "reserved_estimate_off": round(estimated.reserved / reserved - 1, 4),
    }


def measure_speed(model: Any, tokenizer: Any, device: Device) -> dict[str, Any]:
    """One epoch of 4 x 4 with checkpointing at text-to-SQL lengths; the first step does not count."""
    draw = random.Random(0)
    lengths = [min(2048, max(ANSWER_TOKENS + 8, round(draw.lognormvariate(5.409, 0.814)))) for _ in range(EPOCH)]
    speed = train(model, tokenizer, device, lengths, rows=4, accumulation=4, checkpointing=True)
    return {
        "mean_tokens": round(sum(lengths) / len(lengths), 1),
        "tokens_per_second": round(speed.per_second() or 0, 1),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
    }


def train(
    model: Any, tokenizer: Any, device: Device, lengths: list[int], *, rows: int, accumulation: int, checkpointing: bool
) -> Throughput:
    """One epoch over random texts of the given lengths, through our trainer."""
    texts = [torch.randint(10, len(tokenizer), (length,)).tolist() for length in lengths]
    examples = Examples.of(Example(text, len(text) - ANSWER_TOKENS) for text in texts)
    section = TrainingSection(
        num_train_epochs=1,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
        kernels="hf",
    )
    config = RunConfig(model=ModelSection(name=str(model.config._name_or_path)), training=section)
    plan = plan_step(config, model, device, lengths)
    throughput = Throughput()
    with tempfile.TemporaryDirectory() as folder:
        training = trainer_arguments(
            section,
            device,
            plan,
            checkpoints=Path(folder),
            run_name="memory",
            validates=False,
        )
        build_trainer(training, model, tokenizer, examples, None, section, device, plan, Hooks(throughput)).train()
    return throughput


if __name__ == "__main__":
    main()
