"""Which attention a model is loaded with: by the model, the configuration and the GPU.

transformers' SDPA leaves out a soft cap on the attention scores without a word, as does a flash-attn before 2.6. Classes whose
attention it cannot compute at all, such as those with attention sinks, say so themselves (`_supports_sdpa`).
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch

from finetune.errors import UserError
from finetune.models.device import Device
from finetune.runtime.console import say

_SOFT_CAP = re.compile(r"att.*(soft_?cap|logit_?cap)", re.IGNORECASE)
"""The keys of config.json for a soft cap on attention scores, such as Gemma 2's attn_logit_softcapping. Gemma's
final_logit_softcapping is another thing: it is in the head, and every attention goes with it."""
_FLASH_HEAD = 256
"""The largest head dimension of flash-attn 2."""


def attention_for(configured: str, device: Device, config: Any = None) -> str | None:
    """The attention to load a model with; None leaves it to transformers. config: the model's, from transformers.

    `auto` is SDPA on a GPU and eager on a CPU: there eager's backward is matrix products, which two cores with AMX ran 1.4 times
    faster than SDPA's (496 against 360 tokens/s, SmolLM2-135M in NF4, batch 8 x 140, best of 6 steps). For a model that SDPA
    does not compute it is flash-attn where that is installed and computes it, else eager.

    flash-attn computes in 16 bits only: in float32, as small models answer, flash_attention_2 is auto.

    Raises UserError if the configured attention would leave out a part of the model.
    """
    if configured == "flash_attention_2" and device.dtype == torch.float32 and device.place.type == "cuda":
        say("model.attn_implementation: flash_attention_2 computes in 16 bits only; in float32 it is auto")
        configured = "auto"
    cap = soft_cap(config)
    if configured == "auto":
        if device.place.type == "cpu":
            return "eager"
        if cap:
            return "flash_attention_2" if _flash_fits(device, config) else "eager"
        return _sdpa(config)
    if configured == "sdpa" and cap:
        raise _left_out(configured, cap)
    if configured == "sdpa" and _sdpa(config) == "eager":
        raise UserError(
            "model.attn_implementation: this model's attention has parts that sdpa does not compute; use auto",
            code="model.attention",
        )
    if configured == "flash_attention_2" and cap and not flash_has_soft_cap():
        raise _left_out("this version of flash_attention_2", cap)
    return configured


def soft_cap(config: Any) -> str | None:
    """The soft cap on attention scores as `key=value`; None if the model has none."""
    for part in _parts(config):
        for key, value in part.to_dict().items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if _SOFT_CAP.search(key) and number and value > 0:
                return f"{key}={value:g}"
    return None


def flash_has_soft_cap() -> bool:
    """Whether the installed flash-attn can be used and has a soft cap, as from its version 2.6 on."""
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        return False
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    return all(
        "softcap" in inspect.signature(function).parameters for function in (flash_attn_func, flash_attn_varlen_func)
    )


def _flash_fits(device: Device, config: Any) -> bool:
    heads = [getattr(part, "head_dim", None) or 0 for part in _parts(config)]
    return (
        device.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(device.place) >= (8, 0)
        and max(heads, default=0) <= _FLASH_HEAD
        and getattr(_class_of(config), "_supports_flash_attn", False)
        and flash_has_soft_cap()
    )


def _sdpa(config: Any) -> str | None:
    """sdpa, or eager for a class that does not have it; None for a class that is not part of transformers."""
    if config is None:
        return "sdpa"
    found = _class_of(config)
    if found is None:
        return None
    return "sdpa" if getattr(found, "_supports_sdpa", False) else "eager"


def _class_of(config: Any) -> Any:
    """transformers' class for this config, None if it has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) if config is not None else None


def _parts(config: Any) -> list[Any]:
    """The config, and that of its text model where it has several."""
    if config is None:
        return []
    text = config.get_text_config(decoder=True)
    return [config] if text is config else [config, text]


def _left_out(what: str, cap: str) -> UserError:
    return UserError(
        f"model.attn_implementation: {what} leaves out this model's soft cap on attention scores ({cap}); use auto or eager",
        code="model.attention",
    )
