"""The backends by name, and which of them fits target and machine. To add one: docs/extending.md."""

from __future__ import annotations

import importlib.util

from finetune.errors import UserError
from finetune.evaluation.generators.vllm_place import missing
from finetune.machine.hardware import torch_build
from finetune.models.architectures import FAMILIES
from finetune.models.llama_cpp import PACKAGE
from finetune.models.llama_cpp import version as require_llama_cpp
from finetune.models.load import load_model_config
from finetune.runtime.console import say
from finetune.runtime.installed import install_command
from finetune.serve.backends.base import Backend
from finetune.serve.backends.hf import HfBackend
from finetune.serve.backends.llama_cpp import LlamaCppBackend
from finetune.serve.backends.vllm import VllmBackend
from finetune.serve.target import Target

AUTO, VLLM, LLAMA, HF = "auto", "vllm", "llama.cpp", "hf"
NAMES = (AUTO, VLLM, LLAMA, HF)


def backend_for(name: str, target: Target) -> Backend:
    """The backend of this name; for `auto` vLLM on a GPU, llama.cpp for a GGUF file and on a CPU, hf where these are missing.

    Raises UserError if the backend cannot serve this target on this machine.
    """
    chosen = _chosen(target) if name == AUTO else name
    if target.gguf is not None and chosen != LLAMA:
        raise UserError(
            f"--backend {chosen}: {target.path} is a GGUF file, which llama.cpp serves", code="serve.wrong_backend"
        )
    if chosen == HF:
        return HfBackend(target)
    if chosen == VLLM:
        if why := missing(target.config):
            raise UserError(f"--backend vllm: {why}; --backend auto does without vLLM", code="serve.no_vllm")
        return VllmBackend(target, target.vocabulary())
    require_llama_cpp()
    return LlamaCppBackend(target.gguf_file, target.vocabulary())


def _chosen(target: Target) -> str:
    """Says why it is not the fastest one."""
    if target.gguf is not None:
        return LLAMA
    build = torch_build()
    if build is not None and build.gpu is not None:
        why = missing(target.config, auto=True)
        if why:
            say(f"--backend auto: hf, because {why}")
        return HF if why else VLLM
    if importlib.util.find_spec(PACKAGE) is None:
        say(
            f"--backend auto: hf, because the package {PACKAGE} (llama.cpp) is not installed; {install_command('export')}"
        )
        return HF
    kind = str(getattr(load_model_config(target.config.model), "model_type", ""))
    if target.run is None or kind not in FAMILIES:
        why = f"models of type {kind}" if target.run is not None else "exports of this kind"
        say(f"--backend auto: hf, because no GGUF file is made of {why}")
        return HF
    return LLAMA
