"""Causal attention over packed sequences without padding; no token sees another sequence.

Forward and backward are called explicitly (finetune/models/fused/layer.py keeps the tensors in between), so these are plain
functions. Three backends, by hardware: FlashAttention-2 inside torch (compute capability >= 8.0), torch's memory-efficient
kernel (older GPUs in float16), and torch's SDPA on one sequence after the other (everywhere, CPU included).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["flash", "efficient", "loop"]
CAUSAL = 1
"""custom_mask_type of the memory-efficient kernel: position i sees positions up to i of its own sequence."""


@dataclass(frozen=True)
class Segments:
    """Where each sequence of a packed batch begins and ends. bounds: n + 1 offsets in tokens, int32, on the model's device."""

    bounds: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Segments:
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(bounds.to(device, non_blocking=True), tuple(lengths))

    @property
    def longest(self) -> int:
        return max(self.lengths)


@dataclass(frozen=True)
class Attended:
    """out: (tokens, heads, head_dim). rest: what the backward pass also needs, the kernel's log-sum-exp and random state."""

    out: Tensor
    rest: tuple[Tensor, ...]


def backend_for(device: torch.device, dtype: torch.dtype) -> Backend:
    """The fastest backend of this device for this dtype. FlashAttention-2 needs Ampere; neither kernel suits float32."""
    if device.type != "cuda" or dtype == torch.float32:
        return "loop"
    return "flash" if torch.cuda.get_device_capability(device) >= (8, 0) else "efficient"


def forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments, backend: Backend) -> Attended:
    """q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim), any row stride; scores scaled by head_dim ** -0.5."""
    bounds, longest, scale = segments.bounds, segments.longest, q.shape[-1] ** -0.5
    if backend == "flash":
        out, lse, seed, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, bounds, bounds, longest, longest, 0.0, True, False, scale=scale
        )
        return Attended(out, (lse, seed, unused))
    if backend == "efficient":
        keys, values = (_repeated(x, q.shape[1])[None] for x in (k, v))
        out, lse, seed, offset, *_ = torch.ops.aten._efficient_attention_forward(
            q[None], keys, values, None, bounds, bounds, longest, longest, 0.0, CAUSAL, True, scale=scale
        )
        return Attended(out[0], (lse, seed, offset))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for begin, end in _spans(segments):
        out[begin:end] = _one(q[begin:end], k[begin:end], v[begin:end])
    return Attended(out, ())


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended, segments: Segments, backend: Backend
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their shapes; d_out like attended.out."""
    bounds, longest, scale = segments.bounds, segments.longest, q.shape[-1] ** -0.5
    if backend == "flash":
        lse, seed, unused = attended.rest
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            d_out, q, k, v, attended.out, lse, bounds, bounds, longest, longest, 0.0, True, seed, unused, scale=scale
        )
        return dq, dk, dv
    if backend == "efficient":
        lse, seed, offset = attended.rest
        keys, values = (_repeated(x, q.shape[1])[None] for x in (k, v))
        dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
            d_out[None], q[None], keys, values, None, attended.out[None], bounds, bounds, longest, longest, lse, 0.0, seed,
            offset, CAUSAL, False, scale=scale,
        )  # fmt: skip
        return dq[0], _summed(dk[0], k.shape[1]), _summed(dv[0], k.shape[1])
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for begin, end in _spans(segments):
        inputs = [x[begin:end].detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            out = _one(*inputs)
        for whole, part in zip(gradients, torch.autograd.grad(out, inputs, d_out[begin:end]), strict=True):
            whole[begin:end] = part
    return gradients


def _one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one sequence; SDPA takes (heads, tokens, head_dim)."""
    result: Tensor = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], is_causal=True,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return result[0].transpose(0, 1)


def _spans(segments: Segments) -> list[tuple[int, int]]:
    return list(pairwise([0, *accumulate(segments.lengths)]))


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Keys or values, copied for every query head: query head h reads key head h // (heads / kv_heads)."""
    tokens, own, width = x.shape
    return x[:, :, None].expand(tokens, own, heads // own, width).reshape(tokens, heads, width)


def _summed(gradient: Tensor, own: int) -> Tensor:
    """The gradient of `_repeated`."""
    tokens, heads, width = gradient.shape
    return gradient.view(tokens, own, heads // own, width).sum(2)
