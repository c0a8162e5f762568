"""torch's FlashAttention-2 kernel under the names that Unsloth imports from the package flash_attn.

For machines without that package, which is distributed as source only and takes an hour to compile. The kernel is the same; the
package's other features (soft-capped scores, caches, ALiBi) are not provided, hence a version below 2.6.3, from which on Unsloth
would use them. The shim has its own path entry, so that only benchmarks/throughput_unsloth.py finds it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__version__ = "2.6.2"

NO_WINDOW = (-1, -1)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
) -> Tensor:  # fmt: skip
    """q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim), cu_seqlens (sequences + 1) int32; returns like q."""
    return _attend(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        int(max_seqlen_q),
        int(max_seqlen_k),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
    )


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
) -> Tensor:  # fmt: skip
    """q (rows, tokens, heads, head_dim), k and v with kv_heads; returns like q."""
    return _attend(q, k, v, None, None, q.shape[1], k.shape[1], dropout_p, softmax_scale, causal, window_size)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bounds_q: Tensor | None, bounds_k: Tensor | None, longest_q: int, longest_k: int,
    dropout: float, scale: float | None, causal: bool, window: tuple[int, int],
) -> Tensor:  # fmt: skip
    """torch provides the kernel's gradient. A window side below 0 means unlimited, which torch expresses as None."""
    left, right = (None if side < 0 else side for side in window)
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, bounds_q, bounds_k, longest_q, longest_k, dropout, causal, False, scale=scale,
        window_size_left=left, window_size_right=0 if causal and left is not None else right,
    )[0]  # fmt: skip
    return out
