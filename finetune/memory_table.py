"""The memory table that `finetune plan --memory` prints: what a training step needs, part by part, and on which GPUs it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from finetune.config import RunConfig
from finetune.errors import UserError
from finetune.gpus import GPUS, Gpu
from finetune.memory import (
    CONTEXT_GIB,
    GIB,
    GRID_PEAK_ERROR,
    PEAK_ERROR,
    RESERVED_ERROR,
    MemoryEstimate,
    ModelShape,
    Workload,
    estimate,
    fits,
    largest_rows,
    shape_of,
    workload_of,
)


def memory_table(config: RunConfig, gpus: list[str]) -> str:
    """Aligned plain text: the parts of a step's peak (GiB) with checkpointing on and off, then each GPU's verdict.

    Everything in it is estimated for the longest batch that the config allows. gpus: names of finetune.gpus.GPUS. Raises
    UserError for another name, and for a model whose shape is not known.
    """
    if not gpus:
        raise UserError(f"plan.gpus: name at least one GPU; known: {', '.join(GPUS)}")
    if unknown := [name for name in gpus if name not in GPUS]:
        raise UserError(f"plan.gpus: unknown {', '.join(unknown)}; known: {', '.join(GPUS)}")
    shape = known_shape(config.model.name)
    wanted = config.model.torch_dtype
    dtypes = {name: GPUS[name].dtype if wanted == "auto" else wanted for name in dict.fromkeys(gpus)}
    loads = {dtype: workload_of(config, dtype) for dtype in dict.fromkeys(dtypes.values())}
    return "\n".join(
        [
            _heading(config, shape),
            "",
            *_parts(config, {dtype: _on_and_off(shape, load) for dtype, load in loads.items()}),
            "",
            *_verdicts(shape, [(GPUS[name], loads[dtype]) for name, dtype in dtypes.items()]),
            "",
            *_footnotes(config),
        ]
    )


def known_shape(model_name: str) -> ModelShape:
    """The model's shape; UserError with what to do where it is not known."""
    shape = shape_of(model_name)
    if shape is None:
        raise UserError(
            f"model.name: the shape of {model_name} is not known, so its memory cannot be estimated; download its config.json "
            "into a folder and name that folder (Llama, Mistral and Qwen2 models)"
        )
    return shape


def _heading(config: RunConfig, shape: ModelShape) -> str:
    rows, tokens, lora = config.training.per_device_train_batch_size, config.model.max_seq_length, config.lora
    adapters = shape.lora_parameters(lora.r, tuple(lora.target_modules))
    return (
        f"GPU memory at the peak of a training step, in GiB, all estimated: {shape.name} ({shape.parameters / 1e9:.2f}e9\n"
        f"parameters), micro-batch of {rows} x {tokens} tokens, LoRA r {lora.r} ({adapters / 1e6:.1f}e6 parameters), "
        f"dropout {lora.lora_dropout:g}."
    )


def _on_and_off(shape: ModelShape, load: Workload) -> list[MemoryEstimate]:
    return [estimate(shape, replace(load, checkpointing=on)) for on in (True, False)]


def _parts(config: RunConfig, columns: dict[str, list[MemoryEstimate]]) -> list[str]:
    """One row per part, a column per dtype and checkpointing on or off."""
    kind = config.quantization.bnb_4bit_quant_type if config.quantization.load_in_4bit else "not quantised"
    labels = {
        "base": f"base model, {kind}",
        "adapters": "adapters, float32",
        "gradients": "gradients, float32",
        "optimizer": f"optimizer, {config.training.optim}",
        "activations": "activations",
        "logits": "logits",
        "workspace": "workspace",
        "reserve": "reserve of the allocator",
    }
    estimates = [needed for pair in columns.values() for needed in pair]
    table = [["compute dtype", *(text for dtype in columns for text in (dtype, ""))]]
    table.append(["gradient checkpointing", *["on", "off"] * len(columns)])
    table += [[label, *(_gib(needed.parts[part]) for needed in estimates)] for part, label in labels.items()]
    table.append(["CUDA context", *[f"{CONTEXT_GIB:.2f}"] * len(estimates)])
    table.append(["sum", *(_gib(needed.reserved + CONTEXT_GIB * GIB) for needed in estimates)])
    return _aligned(table)


def _verdicts(shape: ModelShape, machines: Sequence[tuple[Gpu, Workload]]) -> list[str]:
    """One row per GPU: whether the config as it stands fits, and the largest micro-batch with checkpointing on and off."""
    table = [["GPU", "dtype", "needed", "of GiB", "fits", "largest batch: on", "off"]]
    for gpu, load in machines:
        needed = estimate(shape, load)
        verdict = "yes" if fits(needed, gpu.memory_gib) else "no"
        largest = [largest_rows(shape, replace(load, checkpointing=on), gpu.memory_gib) for on in (True, False)]
        if load.dtype == "bfloat16" and gpu.dtype != "bfloat16":
            verdict, largest = "no bfloat16", [0, 0]
        total = _gib(needed.reserved + CONTEXT_GIB * GIB)
        rows = [str(n) if n else "none" for n in largest]
        table.append([gpu.name, load.dtype, total, f"{gpu.memory_gib:.1f}", verdict, *rows])
    return _aligned(table)


def _footnotes(config: RunConfig) -> list[str]:
    checkpointing = "on" if config.training.gradient_checkpointing else "off"
    tokens = config.model.max_seq_length
    ours, grid, reserved = f"{PEAK_ERROR:.0%}", f"{GRID_PEAK_ERROR:.1%}", f"{RESERVED_ERROR:.0%}"
    return [
        f"fits: as the config has it (checkpointing {checkpointing}). largest batch: rows of {tokens} tokens that fit.",
        "All figures are estimated, from the model's shape. They were checked against two measurements, each on one H100",
        "80GB (torch 2.11, Mistral-7B in NF4): ten cells of our own trainer (2026-11-22), and the 46 of a grid with bfloat16",
        f"adapters and no dropout. The peak is within {ours} in ours and {grid} in the grid, and with the reserve within",
        f"{reserved} in all. No other GPU was measured. Batches of varying length make torch hold up to 1.5 times the peak,",
        "which it gives back when it runs out.",
    ]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _aligned(table: list[list[str]]) -> list[str]:
    """Rows of text under each other: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for first, *rest in table:
        cells = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines
