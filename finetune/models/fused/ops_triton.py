# mypy: disable-error-code="import-not-found, no-untyped-def, no-untyped-call, untyped-decorator"
"""The small operations of the fused training layer as Triton kernels, for CUDA with compute capability 8.0 or newer.

Same functions, arguments and results as finetune/models/fused/ops_torch.py, which is the reference; only the dropout
masks differ. The three LoRA operations move x (or dx) through memory once, whatever the number n of projections that
share it (for n > 3 once per three). No atomics: the same call gives the same bytes. If sums are split, the parts are
float32 and are added in a fixed order. Triton launches on the current CUDA device, which must be that of the tensors.

Dropout masks come from a hash of (seed, row, column) per element; three projections take 10 of its 32 bits each. The
keep probability is therefore a multiple of 1/1024 (p = 0.05 becomes 51/1024 = 0.0498), and kept values are scaled by
its exact inverse. p = 0 compiles to kernels without any of it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune.models.fused import triton_kernels as kernels
from finetune.models.fused.ops_torch import stream_key

SHARED = 3
"""Projections per pass over x: one 32-bit hash holds three 10-bit masks."""
LEVELS = 1024
"""Dropout probabilities are multiples of 1/LEVELS."""


class Blocks(NamedTuple):
    """How a kernel divides its work: tile of rows (tokens) x columns (features), warps and pipeline stages per program."""

    rows: int
    columns: int
    warps: int
    stages: int
    programs: int
    """Long sums are split until about this many programs run: about three for each of an H100's 132 multiprocessors."""


DOWN = Blocks(rows=64, columns=64, warps=4, stages=4, programs=320)
INPUT_GRAD = Blocks(rows=64, columns=64, warps=4, stages=1, programs=0)
A_GRAD = Blocks(rows=64, columns=64, warps=4, stages=4, programs=384)
A_GRAD_ROWS = 512
"""lora_a_grad sums at least this many rows into one part, so that its float32 parts take less than 2R/512 of x's bytes."""


def lora_down(x: Tensor, a: Tensor, r: int, p: float, seed: int) -> Tensor:
    """x (T, K), a (R, K) -> (T, R) in x's dtype: block i is (mask_i * x / (1-p)) @ a_i.T, summed in float32."""
    (tokens, width), rank = x.shape, a.shape[0]
    down = torch.empty(tokens, rank, dtype=x.dtype, device=x.device)
    row_blocks = _ceil_div(tokens, DOWN.rows)
    parts = min(_ceil_div(DOWN.programs, row_blocks), max(1, width // 512))
    steps = _ceil_div(_ceil_div(width, parts), DOWN.columns)
    parts = _ceil_div(width, steps * DOWN.columns)
    sums = down if parts == 1 else torch.empty(parts, tokens, rank, dtype=torch.float32, device=x.device)
    for first, count, low, high in _passes(rank, r, seed):
        kernels.lora_down_kernel[(row_blocks, parts)](
            x, a, sums, tokens, width, steps, first, low, high, x.stride(0), a.stride(0), rank, r,
            **_constants(DOWN, x.element_size(), count, r, p), WHOLE=width % (steps * DOWN.columns) == 0,
        )  # fmt: skip
    if parts > 1:
        _sum_parts(sums, down)
    return down


def lora_input_grad_(dx: Tensor, g: Tensor, a: Tensor, r: int, p: float, seed: int) -> None:
    """dx (T, K) += sum over i of mask_i / (1-p) * (g_i @ a_i), in place; g (T, R), a (R, K)."""
    tokens, width = dx.shape
    grid = (_ceil_div(width, INPUT_GRAD.columns), _ceil_div(tokens, INPUT_GRAD.rows))
    for first, count, low, high in _passes(a.shape[0], r, seed):
        kernels.lora_input_grad_kernel[grid](
            dx, g, a, tokens, width, first, low, high, dx.stride(0), g.stride(0), a.stride(0), r,
            **_constants(INPUT_GRAD, dx.element_size(), count, r, p), WHOLE=width % INPUT_GRAD.columns == 0,
        )  # fmt: skip


def lora_a_grad(g: Tensor, x: Tensor, r: int, p: float, seed: int) -> Tensor:
    """g (T, R), x (T, K) -> the gradient of the stacked A, (R, K) in float32: block i is g_i.T @ (mask_i * x / (1-p))."""
    (tokens, width), rank = x.shape, g.shape[1]
    grad = torch.empty(rank, width, dtype=torch.float32, device=x.device)
    column_blocks = _ceil_div(width, A_GRAD.columns)
    parts = max(1, min(A_GRAD.programs // column_blocks, tokens // A_GRAD_ROWS))
    steps = _ceil_div(_ceil_div(tokens, parts), A_GRAD.rows)
    parts = _ceil_div(tokens, steps * A_GRAD.rows)
    sums = grad if parts == 1 else torch.empty(parts, rank, width, dtype=torch.float32, device=x.device)
    for first, count, low, high in _passes(rank, r, seed):
        kernels.lora_a_grad_kernel[(column_blocks, parts)](
            g, x, sums, tokens, width, steps, first, low, high, g.stride(0), x.stride(0), rank, r,
            **_constants(A_GRAD, x.element_size(), count, r, p), WHOLE=width % A_GRAD.columns == 0,
        )  # fmt: skip
    if parts > 1:
        _sum_parts(sums, grad)
    return grad


def rope_(x: Tensor, cos: Tensor, sin: Tensor, heads: int, head_dim: int, inverse: bool = False) -> None:
    """Rotary positions in place, on the first heads*head_dim columns of x (T, C); float32 inside, rounded once.

    As transformers' apply_rotary_pos_emb: y = x * cos + rotate_half(x) * sin, with cos and sin (T, head_dim).
    `inverse` applies the transpose of that, which is both its backward and the rotation back.
    """
    half = head_dim // 2
    kernels.rope_kernel[(x.shape[0],)](
        x, cos, sin, x.stride(0), cos.stride(0), sin.stride(0), HEADS=heads, HALF=half, INVERSE=inverse,
        HEADS_BLOCK=min(16, _power_of_2(heads)), HALF_BLOCK=_power_of_2(half), num_warps=4,
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Llama's RMSNorm: x (T, H), weight (H,) -> (T, H) in x's dtype; statistics in float32, x_hat cast before * weight."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = _power_of_2(x.shape[1])
    kernels.rms_norm_kernel[(x.shape[0],)](
        x, weight, y, eps, x.shape[1], x.stride(0), y.stride(0), BLOCK=block, num_warps=max(1, min(16, block // 512))
    )
    return y


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
    """dL/dx (T, H) in x's dtype, plus `residual` (T, H), the gradient of the residual branch. The weight is frozen.

    With m = dy * weight and s = 1/rms(x): dx = s * m - s^3 * mean(m * x) * x. s is recomputed from the row of x, which has to be
    read anyway.
    """
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rest = dx if residual is None else residual
    block = _power_of_2(x.shape[1])
    kernels.rms_norm_backward_kernel[(x.shape[0],)](
        dy, x, weight, rest, dx, eps, x.shape[1], dy.stride(0), x.stride(0), rest.stride(0), dx.stride(0),
        RESIDUAL=residual is not None, BLOCK=block, num_warps=max(1, min(16, block // 512)),
    )  # fmt: skip
    return dx


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up (T, 2F), gate first -> silu(gate) * up (T, F)."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    product = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    kernels.swiglu_kernel[(tokens, _ceil_div(width, 1024))](gate_up, product, width, BLOCK=1024, num_warps=4)
    return product


def swiglu_backward_(gate_up: Tensor, d: Tensor) -> None:
    """gate_up (T, 2F) becomes its own gradient, and d (T, F), the gradient of swiglu(gate_up), becomes swiglu(gate_up)."""
    tokens, width = d.shape
    kernels.swiglu_backward_kernel[(tokens, _ceil_div(width, 1024))](gate_up, d, width, BLOCK=1024, num_warps=4)


def _passes(rank: int, r: int, seed: int) -> list[tuple[int, int, int, int]]:
    """(first projection, number of projections, low key, high key) of each pass; each key is 32 bits of the hash's seed."""
    passes = []
    for first in range(0, rank // r, SHARED):
        key = stream_key(seed, first)
        low, high = ((word & 0xFFFFFFFF) - 0x80000000 for word in (key, key >> 32))  # signed: one kernel for all seeds
        passes.append((first, min(SHARED, rank // r - first), low, high))
    return passes


@cache
def _constants(blocks: Blocks, item: int, count: int, r: int, p: float) -> dict[str, Any]:
    """Compile-time arguments. Large ranks and float32 get more warps and fewer stages, to fit registers and shared memory."""
    rank = max(16, _power_of_2(r))  # 16 is the minimum of the tensor cores
    large = rank * count * item > 128
    return {
        "N": count,
        "DROP": 0 if p == 0.0 else min(LEVELS - 1, max(1, round(p * LEVELS))),
        "ROWS": blocks.rows,
        "COLUMNS": blocks.columns,
        "RANK": rank,
        "num_warps": blocks.warps * 2 if large else blocks.warps,
        "num_stages": min(2, blocks.stages) if large else blocks.stages,
    }


def _ceil_div(whole: int, size: int) -> int:
    """Division rounded up. Triton's own cdiv is made for kernels; called from the host it took 8 us (seen in a profile)."""
    return -(-whole // size)


def _power_of_2(size: int) -> int:
    """The smallest power of 2 that is not less than size."""
    return 1 << (size - 1).bit_length()


def _sum_parts(parts: Tensor, total: Tensor) -> None:
    size = total.numel()
    kernels.sum_parts_kernel[(_ceil_div(size, 1024),)](parts, total, size, parts.shape[0], BLOCK=1024, num_warps=4)
