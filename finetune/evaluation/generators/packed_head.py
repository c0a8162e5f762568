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
    """Within the block a model on a CPU uses the packed weights of its head, if it has such a head."""
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    packed = _packed(head)
    if packed is None:
        yield
        return

    def forward(x: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, head.bias, "none", [], "")
        return found

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def _packed(head: Any) -> Tensor | None:
    if type(head) is not torch.nn.Linear or "forward" in vars(head):
        return None
    weight = head.weight.detach()
    exact = not (_multiplies_in_bfloat16() or weight.dtype != torch.float32)
    if weight.device.type != "cpu" or not exact or weight.numel() * 4 > MOST_BYTES:
        return None
    if not torch.backends.mkldnn.is_available():
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
