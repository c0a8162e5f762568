"""The small operations of the fused training layer in plain torch: the reference, and the fallback without Triton.

All tensors are padding-free, (T tokens, features), with last stride 1; rows may be slices of a wider tensor.
Projections that read the same input form a group of n; their LoRA A matrices (r, K) are stacked to (R, K), R = n*r.
Dropout is PEFT's: each projection i has its own mask over x, and kept values are scaled by 1/(1-p). Masks are never
stored: `stream_key(seed, i)` seeds the generator of projection i, so that forward and backward draw the same one,
provided that x and dx have the same shape and dtype. Call these functions only while autograd is off.
finetune/models/fused/ops_triton.py has the same functions with other masks: one layer must take all of them from one
module.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_WORD = (1 << 64) - 1


def stream_key(seed: int, stream: int) -> int:
    """64 well mixed bits from a seed and a stream number: the finalizer of SplitMix64 (Steele, Lea and Flood 2014).

    Neighbouring seeds and streams are uncorrelated. This matters because CPU generators use only the low 32 bits of a seed.
    """
    word = (seed * 0x9E3779B97F4A7C15 + (stream + 1) * 0xD1342543DE82EF95) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def lora_down(x: Tensor, a: Tensor, r: int, p: float, seed: int) -> Tensor:
    """x (T, K), a (R, K) -> (T, R) in x's dtype: block i is (mask_i * x / (1-p)) @ a_i.T."""
    a = a.to(x.dtype)
    if p == 0.0:
        return x @ a.T
    down = x.new_empty(x.shape[0], a.shape[0])
    for i, block in enumerate(_blocks(a.shape[0], r)):
        masked = _mask(x, p, seed, i).mul_(x)
        torch.mm(masked, a[block].T, out=down[:, block])
    return down.div_(1.0 - p)


def lora_input_grad_(dx: Tensor, g: Tensor, a: Tensor, r: int, p: float, seed: int) -> None:
    """dx (T, K) += sum over i of mask_i / (1-p) * (g_i @ a_i), in place; g (T, R), a (R, K)."""
    g, a = g.to(dx.dtype), a.to(dx.dtype)
    if p == 0.0:
        dx.addmm_(g, a)
        return
    for i, block in enumerate(_blocks(a.shape[0], r)):
        dx.addcmul_(g[:, block] @ a[block], _mask(dx, p, seed, i), value=1.0 / (1.0 - p))


def lora_a_grad(g: Tensor, x: Tensor, r: int, p: float, seed: int) -> Tensor:
    """g (T, R), x (T, K) -> the gradient of the stacked A, (R, K) in float32: block i is g_i.T @ (mask_i * x / (1-p))."""
    g = g.to(x.dtype)
    if p == 0.0:
        return _product_in_float32(g.T, x)
    grad = torch.empty(g.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
    for i, block in enumerate(_blocks(g.shape[1], r)):
        grad[block] = _product_in_float32(g[:, block].T, _mask(x, p, seed, i).mul_(x))
    return grad.div_(1.0 - p)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, heads: int, head_dim: int, inverse: bool = False) -> None:
    """Rotary positions in place, on the first heads*head_dim columns of x (T, C).

    As transformers' apply_rotary_pos_emb: y = x * cos + rotate_half(x) * sin, with cos and sin (T, head_dim) in x's
    dtype. `inverse` applies the transpose of that, which is both its backward and the rotation back.
    """
    pairs = x[:, : heads * head_dim].view(x.shape[0], heads, 2, head_dim // 2)
    first, second = pairs[:, :, 0], pairs[:, :, 1]
    cos_first, cos_second = cos.to(x.dtype).unsqueeze(1).chunk(2, dim=-1)
    sin_first, sin_second = sin.to(x.dtype).unsqueeze(1).chunk(2, dim=-1)
    if inverse:
        sin_first, sin_second = -sin_second, -sin_first
    rotated = (first * cos_first).addcmul_(second, sin_first, value=-1.0)
    second.mul_(cos_second).addcmul_(first, sin_second)
    first.copy_(rotated)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Llama's RMSNorm: x (T, H), weight (H,) -> (T, H) in x's dtype; statistics in float32, x_hat cast before * weight."""
    return (x * _inverse_rms(x, eps)).to(x.dtype).mul_(weight)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
    """dL/dx (T, H) in x's dtype, plus `residual` (T, H), the gradient of the residual branch. The weight is frozen.

    With m = dy * weight and s = 1/rms(x): dx = s * m - s^3 * mean(m * x) * x.
    """
    scale = _inverse_rms(x, eps)
    dx = (dy * weight).float()
    mean = torch.linalg.vecdot(dx, x.float()).unsqueeze(-1) / x.shape[-1]
    dx.mul_(scale).addcmul_(x.float(), scale.pow(3).mul_(mean), value=-1.0)
    if residual is not None:
        dx.add_(residual)
    return dx.to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up (T, 2F), gate first -> silu(gate) * up (T, F)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def swiglu_backward_(gate_up: Tensor, d: Tensor) -> None:
    """gate_up (T, 2F) becomes its own gradient, and d (T, F), the gradient of swiglu(gate_up), becomes swiglu(gate_up)."""
    gate, up = gate_up.chunk(2, dim=-1)
    silu = functional.silu(gate)
    d_up = d * silu
    product = silu.mul_(up)
    torch.ops.aten.silu_backward.grad_input(up.mul_(d), gate, grad_input=gate)
    up.copy_(d_up)
    d.copy_(product)


def _blocks(rows: int, r: int) -> list[slice]:
    return [slice(start, start + r) for start in range(0, rows, r)]


def _mask(x: Tensor, p: float, seed: int, stream: int) -> Tensor:
    """A new tensor like x of ones (kept) and zeros (dropped), determined by x.shape, x.dtype, p, seed and stream."""
    generator = torch.Generator(device=x.device).manual_seed(stream_key(seed, stream) >> 1)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1.0 - p, generator=generator)


def _product_in_float32(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with a float32 result, because a half-precision result could overflow and would be rounded."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) per row, (T, 1) float32."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.pow_(2).div_(x.shape[-1]).add_(eps).rsqrt_()
