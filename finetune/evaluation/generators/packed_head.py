"""The output head on a CPU, with its weights in the order that oneDNN reads them in.

A step multiplies a few rows with the head's tens of thousands of columns. MKL, which torch uses for float32, packs the weights
anew each time; packed once, the product takes half the time (SmolLM2-135M's head, 50 rows, one core: 48 instead of 22 GFLOP/s).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MOST_BYTES = 2**30
"""A larger head is not packed, which copies it."""
_ROWS = 64
"""For which the order is chosen; others take it, too."""


@contextmanager
def packed_head(causal: Any) -> Iterator[None]:
    """Within the block a model on a CPU uses the packed weights of its head, if it has such a head. Its input is made contiguous:
    of the last tokens of several prompts it is not, and torch would then copy the whole head once for each prompt."""
    head: Any = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    if not _is_plain(head):
        yield
        return
    packed = _packed(head.weight.detach())

    def forward(x: Tensor) -> Tensor:
        if packed is None:
            return torch.nn.functional.linear(x.contiguous(), head.weight, head.bias)
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, head.bias, "none", [], "")
        return found

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def _is_plain(head: Any) -> bool:
    return type(head) is torch.nn.Linear and "forward" not in vars(head) and head.weight.device.type == "cpu"


def _packed(weight: Tensor) -> Tensor | None:
    exact = not (_multiplies_in_bfloat16() or weight.dtype != torch.float32)
    if not exact or weight.numel() * 4 > MOST_BYTES:
        return None
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        return packed
    except (RuntimeError, AttributeError):  # a build of torch without it
        return None


def _multiplies_in_bfloat16() -> bool:
    """Whether model.cpu_bf16_matmul is on and the processor has the instructions, for which torch orders weights otherwise."""
    if torch.backends.mkldnn.matmul.fp32_precision != "bf16":  # type: ignore[attr-defined]
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
