"""Loads what is trained: tokenizer, base model (4-bit or not), LoRA adapters.

Nothing here assumes a CPU or a GPU: dtype and attention depend on the compute capability.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from finetune.config.schema import LoraSection, ModelSection, QuantizationSection
from finetune.errors import UserError, first_line
from finetune.models.adapter import (
    WEIGHTS,
    check_base,
    check_folder,
    check_layers,
    check_run,
    check_tensors,
    is_sealed,
    mismatch,
)
from finetune.models.attention import attention_for
from finetune.models.casts import cast_whole
from finetune.models.device import Device
from finetune.models.four_bit_files import four_bit_files, wait_for_originals
from finetune.models.source import identity_of_base, load_with
from finetune.models.target_modules import check_modules
from finetune.runtime.console import say
from finetune.runtime.distributed import is_first_here
from finetune.tokens import added_after

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(section: ModelSection, *, alone: bool = False) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, padded on the left for generation (the trainer's collator pads by itself).

    alone: section.name is a folder with a tokenizer, whether or not a model is beside it.
    """
    from transformers import AutoTokenizer

    tokenizer = load_with(AutoTokenizer.from_pretrained, section, section.name if alone else None)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.name: the tokenizer of {section.name} has no end-of-text token, so answers cannot end",
            code="model.no_end_token",
        )
    if tokenizer.pad_token_id is None:  # padding is masked everywhere, so any token works
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    if end := added_after(tokenizer):
        say(f"model.name: the tokenizer of {section.name} adds {end} after each text; it is left out before the answer")
    result: PreTrainedTokenizerBase = tokenizer
    return result


def load_model_config(section: ModelSection) -> PretrainedConfig:
    """The model's own config. Raises UserError like `load_base`."""
    from transformers import AutoConfig

    config: PretrainedConfig = load_with(AutoConfig.from_pretrained, section)
    return config


def load_base(
    section: ModelSection, quantization: QuantizationSection, device: Device, *, dequantize: bool = False
) -> PreTrainedModel:
    """The base model on `device`: NF4 (or FP4) with double quantisation if configured, else in the compute dtype.

    dequantize: dequantize the weights once. Their values stay those of the 4-bit weights; memory grows fourfold or more.
    Raises UserError if the name is wrong, weights are missing or corrupt, or the hub cannot be reached.
    """
    from transformers import AutoConfig

    attention = attention_for(section.attn_implementation, device, load_with(AutoConfig.from_pretrained, section))
    if device.place.type == "cpu":
        rounding = "bf16" if section.cpu_bf16_matmul else "none"  # a setting of the whole process, so always set
        torch.backends.mkldnn.matmul.fp32_precision = rounding  # type: ignore[attr-defined]
    before = (quantization.load_in_4bit and device.quantized_in) or device.dtype
    arguments = {"dtype": before, "device_map": {"": device.place}, "attn_implementation": attention}
    files = four_bit_files(section, quantization, device)
    model = files.load(section, device, arguments) if files else None
    if model is None:
        settings = _bits_and_bytes(quantization, device) if quantization.load_in_4bit else None
        model = _originals(section, {**arguments, "quantization_config": settings})
        if files and is_first_here():
            files.write(model)
    if dequantize and quantization.load_in_4bit:
        model = model.dequantize(dtype=device.dtype)
    if before != device.dtype:
        cast_whole(model, device.dtype)
    _keep_one_layout(model)
    return model


def _originals(section: ModelSection, arguments: dict[str, Any]) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    wait_for_originals()
    model, loaded = load_with(AutoModelForCausalLM.from_pretrained, section, output_loading_info=True, **arguments)
    if loaded["missing_keys"]:  # transformers would continue with random weights
        first, *more = sorted(loaded["missing_keys"])
        others = f" and {len(more)} others" if more else ""
        raise UserError(
            f"model.name: {section.name} lacks weights: {first}{others}; is the folder complete?",
            code="model.incomplete",
        )
    found: PreTrainedModel = model
    return found


def _keep_one_layout(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on CPUs with AVX512-BF16.

    It repacks them at the first forward pass in eval mode, which is the first validation of a training run, and never undoes
    it. Every later pass then runs a bfloat16 kernel without a backward, so that training continues without the gradient
    through the base layers (bitsandbytes 0.50, nn/modules.py, Linear4bit.forward).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def attach_lora(model: PreTrainedModel, section: LoraSection) -> PeftModel:
    """Adds LoRA adapters to every layer whose path ends in one of `target_modules`.

    Raises UserError if a name matches no layer that can have an adapter.
    """
    from peft import LoraConfig, get_peft_model

    check_modules(model, section)
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout,
        target_modules=list(section.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)  # type: ignore[return-value]


def layers_with_adapter(model: torch.nn.Module, lora: LoraSection) -> dict[str, torch.nn.Module]:
    """The layers that lora.target_modules matches, by path."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)}
    return {
        name: module
        for name, module in layers.items()
        if any(f".{name}".endswith(f".{target}") for target in lora.target_modules)
    }


def require_adapter(folder: Path) -> None:
    """Raises UserError unless the folder has a trained adapter, unchanged since training wrote it; for callers that would first
    load a base model for minutes."""
    check_folder(folder)


def load_adapter(
    model: PreTrainedModel, folder: Path, lora: LoraSection | None = None, section: ModelSection | None = None
) -> PeftModel:
    """A trained adapter on a freshly loaded base model, for inference.

    Raises UserError if it is missing, has changed, does not fit this model to the last tensor, or was trained with other LoRA
    settings (lora) or on another base model (section) than the run's.
    """
    from peft import PeftModel, get_peft_model_state_dict

    settings = check_folder(folder)
    if lora is not None:
        check_run(folder, settings, lora)
        wanted = set(layers_with_adapter(model, lora))
    if section is not None:
        check_base(folder, identity_of_base(section))
    if not is_sealed(folder):
        say(f"{folder}: no manifest in it (from an earlier version), so whether a file has changed cannot be told")
    if not (folder / WEIGHTS).is_file():  # PEFT would look for other files, and on the hub
        raise mismatch(folder, f"{WEIGHTS} is missing")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about missing tensors, which the check below refuses
            loaded = PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, SafetensorError) as error:
        raise mismatch(folder, _reason(error)) from error
    if lora is not None:
        adapted = {name for name, module in loaded.get_base_model().named_modules() if hasattr(module, "lora_A")}
        check_layers(folder, wanted, adapted)
    check_tensors(folder, get_peft_model_state_dict(loaded))
    return loaded


def _reason(error: BaseException) -> str:
    """What is wrong; torch writes a headline above it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 and lines[0].startswith("Error(s) in loading") else first_line(error)


def adapters_to_float32(model: torch.nn.Module) -> None:
    """Cast the adapters back to float32. TRL casts those of a quantised model to bfloat16 when the trainer is built, which loses
    small updates on a CPU and crashes the gradient scaler of float16 training."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def is_four_bit(model: torch.nn.Module) -> bool:
    return any(getattr(parameter, "quant_state", None) is not None for parameter in model.parameters())


@torch.no_grad()
def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """The base model of `model` with its adapter added into the weights, in place. Sums are computed in float32 and rounded once
    to the dtype of the weights, which must have 16 bits or more. PEFT's own merge rounds the adapter first."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        weight = layer.get_base_layer().weight  # type: ignore[union-attr]
        total = weight.data.float()
        for name in layer.active_adapters:
            if name in layer.lora_A or name in layer.lora_embedding_A:
                total += layer.get_delta_weight(name)  # type: ignore[operator]
        weight.data = total.to(weight.dtype)
    merged: PreTrainedModel = model.unload()  # type: ignore[operator]
    return merged


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters; a packed 4-bit weight counts with its dequantized size."""
    total = trainable = 0
    for parameter in model.parameters():
        packed = getattr(parameter, "quant_state", None)
        count = packed.shape.numel() if packed is not None else parameter.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return total, trainable


def _bits_and_bytes(section: QuantizationSection, device: Device) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=section.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=section.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=device.dtype,
    )
