"""In which dtype a model answers: what `evaluation.dtype` comes to on a GPU or a CPU. Without torch, so that a laptop can plan.

Greedy decoding takes the likeliest token. Two programs that add the same numbers in another order differ where rounding decides
which of two that is, in 16 bits far more often than in float32.
"""

from __future__ import annotations

from finetune.config.schema import RunConfig
from finetune.machine.hardware import dtype_for

FLOAT32_BELOW = 1_000_000_000
"""Parameters from which `auto` no longer answers in float32. Below, exactness costs next to nothing: SmolLM2-135M on 493 Spider
questions (one H200, vLLM 0.24) had the same verdict with hf and vLLM for all in float32 and for 96.8% in bfloat16, and vLLM made
12,258 tokens/s in float32 and 19,706 in bfloat16, about a second either way beside 85 s of loading. A larger model waits for its
weights and matrix products, which in float32 take twice as long and more (estimated)."""


def answer_dtype(config: RunConfig, capability: tuple[int, int] | None, parameters: int | None) -> str:
    """The dtype in which a config's model answers on a GPU of this compute capability; None is a CPU. parameters: of the model;
    None if unknown, which counts as large."""
    asked = config.evaluation.dtype
    if asked != "auto":
        return asked
    small = parameters is not None and parameters < FLOAT32_BELOW
    return "float32" if small else dtype_for(capability, config.model.torch_dtype)
