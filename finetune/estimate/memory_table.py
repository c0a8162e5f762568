"""The memory table that `finetune plan --memory` prints: what a training step needs, part by part, and on which GPUs it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from finetune.config.load import examples_per_step, gpus_that_agree
from finetune.config.schema import RunConfig
from finetune.errors import UserError
from finetune.estimate.fit import MARGIN, Fitted, fit_on, usual_step_tokens
from finetune.estimate.memory_hf import (
    CONTEXT_GIB,
    GRID_PEAK_ERROR,
    PEAK_ERROR,
    RESERVED_ERROR,
    Workload,
    estimate,
    largest_micro_batch,
    workload_of,
)
from finetune.machine.gpus import GPUS, MACHINES, GpuSpec
from finetune.machine.hardware import GIB, dtype_for
from finetune.models.architectures import FAMILIES, ModelShape, shape_of
from finetune.runtime.table import aligned

PARTS = ("base", "adapters", "gradients", "optimizer", "activations", "logits", "workspace", "reserve")


def memory_table(config: RunConfig, gpus: list[str]) -> str:
    """Aligned plain text: what the run chooses on each GPU, and the parts of its step's peak there (GiB).

    On the Hugging Face backend (training.kernels) the parts are those of each dtype with checkpointing on and off, and the GPUs'
    verdicts come after. Everything is estimated for the longest batch that the config allows. gpus: names of
    finetune.machine.gpus.MACHINES; several GPUs of a kind are one column. Raises UserError for another name, and for a model
    whose shape is not known.
    """
    shape, fitted = _fitted(config, gpus)
    examples = examples_per_step(config.training, _together(config, gpus))
    blocks = _hf(config, shape, fitted) if config.training.kernels == "hf" else _fused(config, shape, fitted, examples)
    return "\n\n".join(["\n".join(block) for block in [_heading(config, shape), *blocks]])


def _fitted(config: RunConfig, gpus: list[str]) -> tuple[ModelShape, dict[str, Fitted]]:
    if not gpus:
        raise UserError(f"plan.gpus: name at least one GPU; known: {', '.join(GPUS)}", code="plan.no_gpu")
    together = _together(config, gpus)
    gpus = list(dict.fromkeys(MACHINES[name].gpu.name if name in MACHINES else name for name in gpus))
    if unknown := [name for name in gpus if name not in GPUS]:
        raise UserError(f"plan.gpus: unknown {', '.join(unknown)}; known: {', '.join(GPUS)}", code="cloud.unknown_gpu")
    shape = known_shape(config.model.name)
    usual = usual_step_tokens(examples_per_step(config.training, together), config.plan.mean_tokens)
    return shape, {name: fit_on(config, shape, GPUS[name], usual_step=usual, gpus=together) for name in gpus}


def _together(config: RunConfig, gpus: list[str]) -> int:
    """GPUs of the smallest of these machines on which a run begins. Raises UserError like `examples_per_step`."""
    return gpus_that_agree(config.training, (MACHINES[name].count if name in MACHINES else 1 for name in gpus))


def memory_json(config: RunConfig, gpus: list[str]) -> dict[str, Any]:
    """The same as numbers, all estimated. parts_gib: of a step's peak, as the config has it; None where nothing is known."""
    shape, fitted = _fitted(config, gpus)
    return {
        "basis": "estimated, from the model's shape",
        "model": shape.name,
        "parameters": shape.parameters,
        "text_tokens": config.model.max_seq_length,
        "rows": [
            {
                "gpu": name,
                "dtype": _dtype(config, GPUS[name]),
                "needed_gib": round(found.needed_gib, 2),
                "memory_gib": found.memory_gib,
                "fits": _verdict(config, GPUS[name], found.fits) == "yes",
                "micro_batch_tokens": found.limits.tokens if found.limits else None,
                "micro_batch_examples": found.micro_batch_size,
                "layers_not_recomputed": found.limits.uncheckpointed_layers if found.limits else None,
                "layers_dequantized": found.limits.dequantized_layers if found.limits else None,
                "parts_gib": {part: round(found.needed.parts[part] / GIB, 3) for part in PARTS}
                | {"cuda_context": CONTEXT_GIB},
            }
            for name, found in fitted.items()
        ],
    }


def known_shape(model_name: str) -> ModelShape:
    """The model's shape; UserError with a remedy if it is not known."""
    shape = shape_of(model_name)
    if shape is None:
        *names, last = (family.name for family in FAMILIES.values())
        raise UserError(
            f"model.name: the shape of {model_name} is not known, so its memory cannot be estimated; download its config.json "
            f"into a folder and name that folder ({', '.join(names)} and {last} models)",
            code="model.unknown_shape",
        )
    return shape


def _heading(config: RunConfig, shape: ModelShape) -> list[str]:
    tokens, lora = config.model.max_seq_length, config.lora
    adapters = shape.lora_parameters(lora.r, tuple(lora.target_modules))
    return [
        f"GPU memory at the peak of a training step, in GiB, all estimated: {shape.name} ({shape.parameters / 1e9:.2f}e9",
        f"parameters), texts of up to {tokens} tokens, LoRA r {lora.r} ({adapters / 1e6:.1f}e6 parameters), "
        f"dropout {lora.lora_dropout:g}.",
    ]


# ---- the fused backend


def _fused(config: RunConfig, shape: ModelShape, fitted: dict[str, Fitted], examples: int) -> list[list[str]]:
    """examples: in an optimizer step."""
    return [_choices(config, shape, fitted), _fused_parts(config, fitted), _fused_footnotes(examples)]


def _choices(config: RunConfig, shape: ModelShape, fitted: dict[str, Fitted]) -> list[str]:
    """One row per GPU: what the run will do there."""
    table = [["GPU", "dtype", "tokens a micro-batch", "activations kept", "dequantized", "needed", "of GiB", "fits"]]
    for name, found in fitted.items():
        limits, gpu = found.limits, GPUS[name]
        assert limits is not None
        layers = [f"{limits.uncheckpointed_layers} of {shape.layers}", f"{limits.dequantized_layers} of {shape.layers}"]
        verdict = _verdict(config, gpu, found.fits)
        needed = f"{found.needed_gib:.2f}"
        table.append(
            [name, _dtype(config, gpu), f"{limits.tokens:,}", *layers, needed, f"{found.memory_gib:.1f}", verdict]
        )
    return aligned(table, "lr")


def _fused_parts(config: RunConfig, fitted: dict[str, Fitted]) -> list[str]:
    """One row per part, a column per GPU."""
    labels = _labels(config) | {"adapters": "adapters, with copies"}
    if config.quantization.load_in_4bit:
        labels["base"] += ", with dequantized weights"
    table = [["", *fitted]]
    table += [[labels[part], *(_gib(found.needed.parts[part]) for found in fitted.values())] for part in PARTS]
    table.append(["CUDA context", *[f"{CONTEXT_GIB:.2f}"] * len(fitted)])
    table.append(["sum", *(_gib(found.needed.reserved + CONTEXT_GIB * GIB) for found in fitted.values())])
    return aligned(table, "lr")


def _fused_footnotes(batch_size: int) -> list[str]:
    return [
        "activations kept: layers that keep them for the backward pass; the others recompute them (checkpointing).",
        "dequantized: layers that keep their 4-bit weights dequantized; the others dequantize them at every use. A run chooses",
        f"both, and the tokens of a micro-batch, by the GPU's memory, so that an optimizer step of {batch_size} examples needs",
        f"few micro-batches. It leaves {MARGIN:.0%} free (included in `needed` where nothing fits) and uses its own longest",
        "text, not model.max_seq_length. All figures are estimated, from the model's shape and the layers' code, and were",
        "checked against four steps on one H100 80GB (2026-11-22). No other GPU was measured.",
    ]


# ---- the Hugging Face backend


def _hf(config: RunConfig, shape: ModelShape, fitted: dict[str, Fitted]) -> list[list[str]]:
    dtypes = {name: _dtype(config, GPUS[name]) for name in fitted}
    loads = {
        name: replace(workload_of(config, dtypes[name]), micro_batch_size=found.micro_batch_size or 1)
        for name, found in fitted.items()
    }
    columns = {(loads[name].micro_batch_size, dtype): loads[name] for name, dtype in dtypes.items()}
    return [
        _hf_parts(config, shape, list(columns.values())),
        _hf_verdicts(config, shape, fitted, loads),
        _hf_footnotes(config),
    ]


def _hf_parts(config: RunConfig, shape: ModelShape, loads: Sequence[Workload]) -> list[str]:
    """One row per part, two columns per dtype and size: checkpointing on and off."""
    needed = [estimate(shape, replace(load, checkpointing=on)) for load in loads for on in (True, False)]
    table = [["compute dtype", *(text for load in loads for text in (load.dtype, ""))]]
    table.append(
        ["rows x tokens", *(text for load in loads for text in (f"{load.micro_batch_size} x {load.tokens}", ""))]
    )
    table.append(["gradient checkpointing", *["on", "off"] * len(loads)])
    table += [[_labels(config)[part], *(_gib(one.parts[part]) for one in needed)] for part in PARTS]
    table.append(["CUDA context", *[f"{CONTEXT_GIB:.2f}"] * len(needed)])
    table.append(["sum", *(_gib(one.reserved + CONTEXT_GIB * GIB) for one in needed)])
    return aligned(table, "lr")


def _hf_verdicts(
    config: RunConfig, shape: ModelShape, fitted: dict[str, Fitted], loads: dict[str, Workload]
) -> list[str]:
    """One row per GPU: whether the config fits, and the largest micro-batch with checkpointing on and off."""
    table = [["GPU", "dtype", "rows", "needed", "of GiB", "fits", "largest batch: on", "off"]]
    for name, found in fitted.items():
        load, gpu = loads[name], GPUS[name]
        verdict = _verdict(config, gpu, found.fits)
        largest = [
            largest_micro_batch(shape, replace(load, checkpointing=on), found.memory_gib) for on in (True, False)
        ]
        largest = largest if verdict != NO_BFLOAT16 else [0, 0]
        sizes = [str(found.micro_batch_size), f"{found.needed_gib:.2f}", f"{found.memory_gib:.1f}"]
        table.append([name, load.dtype, *sizes, verdict, *(str(n) if n else "none" for n in largest)])
    return aligned(table, "lr")


def _hf_footnotes(config: RunConfig) -> list[str]:
    checkpointing = "off" if config.training.gradient_checkpointing is False else "on"
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


# ---- both

NO_BFLOAT16 = "no bfloat16"


def _verdict(config: RunConfig, gpu: GpuSpec, fitting: bool) -> str:
    if _dtype(config, gpu) == "bfloat16" and gpu.dtype != "bfloat16":
        return NO_BFLOAT16
    return "yes" if fitting else "no"


def _dtype(config: RunConfig, gpu: GpuSpec) -> str:
    return dtype_for(gpu.compute_capability, config.model.torch_dtype)


def _labels(config: RunConfig) -> dict[str, str]:
    kind = config.quantization.bnb_4bit_quant_type if config.quantization.load_in_4bit else "not quantised"
    return {
        "base": f"base model, {kind}",
        "adapters": "adapters, float32",
        "gradients": "gradients, float32",
        "optimizer": f"optimizer, {config.training.optim}",
        "activations": "activations",
        "logits": "logits",
        "workspace": "workspace",
        "reserve": "reserve of the allocator",
    }


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
