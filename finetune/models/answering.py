"""Where a model answers, and in which dtype: one place for everything that generates."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from finetune.config.schema import ModelSection, RunConfig
from finetune.errors import UserError
from finetune.machine.hardware import dtype_for
from finetune.models.answer_dtype import answer_dtype
from finetune.models.architectures import shape_of
from finetune.models.device import Device, capability_here, choose_device
from finetune.models.load import load_model_config


def answering_device(config: RunConfig) -> Device:
    """Where a config's model answers, and in which dtype. Its 4-bit weights are those of training, which quantises what it has
    cast to the dtype of model.torch_dtype.

    Raises UserError like `choose_device`, for an evaluation.dtype that this machine does not compute in, and if the parameters
    have to be counted and the model's config cannot be loaded.
    """
    capability = capability_here()
    _require_computed(config.evaluation.dtype, capability)
    name, trained = dtype_of_answers(config, capability), dtype_for(capability, config.model.torch_dtype)
    device = choose_device(name)
    if name == trained or not config.quantization.load_in_4bit:
        return device
    return replace(device, quantized_in=getattr(torch, trained))


def dtype_of_answers(config: RunConfig, capability: tuple[int, int] | None) -> str:
    """`answer_dtype` for the model of a config, whose parameters are counted where they decide, without loading it. Raises
    UserError if its config cannot be loaded."""
    model = config.model
    if config.evaluation.dtype != "auto" or dtype_for(capability, model.torch_dtype) == "float32":
        return answer_dtype(config, capability, None)
    shape = shape_of(model.name)
    parameters = shape.parameters if shape else _parameters(model.name, model.revision, model.trust_remote_code)
    return answer_dtype(config, capability, parameters)


def _require_computed(asked: str, capability: tuple[int, int] | None) -> None:
    if asked == "float16" and capability is None:
        raise UserError(
            "evaluation.dtype: float16 needs a GPU, and there is none here; use auto or float32",
            code="evaluation.bad_dtype",
        )
    if asked == "bfloat16" and capability is not None and capability < (8, 0):
        raise UserError(
            f"evaluation.dtype: bfloat16 needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}; use auto, "
            "float16 or float32",
            code="evaluation.bad_dtype",
        )


@lru_cache(maxsize=4)
def _parameters(name: str, revision: str | None, trust_remote_code: bool) -> int | None:
    """Of a model whose shape is not known; None for one that cannot be built, which loading it explains."""
    from transformers import AutoModelForCausalLM

    found = load_model_config(ModelSection(name=name, revision=revision, trust_remote_code=trust_remote_code))
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(found, trust_remote_code=trust_remote_code)
    except (AttributeError, ImportError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None
    return sum(int(parameter.numel()) for parameter in model.parameters())
