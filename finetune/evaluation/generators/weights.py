"""How the hf generator holds the weights: 4-bit ones as they are or dequantized once, the adapter merged into them or apart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from finetune.config.schema import ModelSection, RunConfig
from finetune.errors import UserError
from finetune.models.device import Device
from finetune.models.load import load_model_config

USABLE = 0.9
"""Of a GPU's memory: the rest is for what CUDA and fragmentation take."""
WORKING_BYTES = 2 * 2**30
"""For activations and graphs of the decoding steps."""
HALF_WAY_BYTES = 0.2
"""A parameter, while layers are dequantized one after the other: the 4-bit weights that are left, and gaps between tensors."""


@dataclass(frozen=True)
class Weights:
    """dequantize: 4-bit weights, once, when they are loaded. merged: the adapter, when the tuned model is first asked."""

    dequantize: bool
    merged: bool


def weights_for(config: RunConfig, device: Device) -> Weights:
    """What `auto` in evaluation.dequantize and evaluation.adapter means on this machine; the same at every call.

    Raises UserError if the adapter is to be merged into weights that stay in 4 bits.
    """
    wanted, adapter = config.evaluation.dequantize, config.evaluation.adapter
    four_bits = config.quantization.load_in_4bit
    if not four_bits:
        dequantize = False
    elif wanted != "auto":
        dequantize = bool(wanted)
    else:
        dequantize = adapter == "merged" or _fits(config, device)
    if adapter == "merged" and four_bits and not dequantize:
        raise UserError(
            "evaluation.adapter: merged needs weights of 16 bits or more, and those of this run are held in 4 bits; set "
            "evaluation.dequantize to true or auto, or evaluation.adapter to auto or apart",
            code="evaluation.four_bit_merge",
        )
    return Weights(dequantize, adapter == "merged" or (adapter == "auto" and (dequantize or not four_bits)))


def dtype_settings(device: Device) -> dict[str, str]:
    """The dtypes that answers depend on, for `Generator.settings`: quantized_in only where it is another one."""
    found = {"dtype": device.dtype_name}
    if device.quantized_in is not None:
        found["quantized_in"] = str(device.quantized_in).removeprefix("torch.")
    return found


def _fits(config: RunConfig, device: Device) -> bool:
    """Whether weights in the compute dtype and the cache fit into the GPU's memory: an estimate, since nothing is loaded yet."""
    if device.place.type != "cuda":
        return False
    memory = torch.cuda.get_device_properties(device.place).total_memory
    parameters, column_bytes = _sizes(config.model.name, config.model.revision, config.model.trust_remote_code)
    texts = config.evaluation.batch_size * (config.model.max_seq_length + config.evaluation.max_new_tokens)
    needed = parameters * (device.dtype.itemsize + HALF_WAY_BYTES) + texts * column_bytes * device.dtype.itemsize
    return needed + WORKING_BYTES <= USABLE * memory


@lru_cache(maxsize=4)
def _sizes(name: str, revision: str | None, trust_remote_code: bool) -> tuple[int, int]:
    """(parameters of the model, numbers that the cache holds for one token)."""
    from transformers import AutoModelForCausalLM

    model_config: Any = load_model_config(
        ModelSection(name=name, revision=revision, trust_remote_code=trust_remote_code)
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)
    text = model_config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return sum(parameter.numel() for parameter in model.parameters()), 2 * text.num_hidden_layers * heads * width
