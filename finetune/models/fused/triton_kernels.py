# mypy: disable-error-code="import-not-found, no-untyped-def, no-untyped-call, untyped-decorator"
"""The Triton kernels of finetune/models/fused/ops_triton.py, which documents what each computes and how it is launched."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _hash(row, column, width, low, high):
    """32 random bits for each element of a (row, column) tile: uint32, wraps.

    Two rounds of multiply and xor-shift as in MurmurHash3's finalizer, with its constants, after a Weyl step of the golden
    ratio per row and per column. Half of the key is added to the counter, half is mixed in after the first xor-shift.
    Measured over 8 million elements: with one round fewer, neighbours correlate at 20 standard deviations; with two, at none.
    """
    start = (row.to(tl.uint32) * width.to(tl.uint32) + low.to(tl.uint32)) * 0x9E3779B1
    bits = start[:, None] + (column.to(tl.uint32) * 0x9E3779B1)[None, :]
    bits = (bits ^ (bits >> 16) ^ high.to(tl.uint32)) * 0x85EBCA6B
    return (bits ^ (bits >> 15)) * 0xC2B2AE35


@triton.jit
def _keep(value, bits, i: tl.constexpr, DROP: tl.constexpr):
    """value if mask i keeps it, else 0: the i-th group of 10 bits from the top is compared with DROP."""
    if DROP > 0:
        value = tl.where((bits << (10 * i)) >= (DROP << 22), value, 0.0)
    return value


@triton.jit
def _rank_block(i: tl.constexpr, first, r, RANK: tl.constexpr):
    """The indices of projection first + i on the stacked rank axis, padded to RANK, and which of them are not padding."""
    rank = tl.arange(0, RANK)
    return (first + i) * r + rank, rank < r


@triton.jit
def _a_tile(a, i: tl.constexpr, first, r, a_row, column, width, RANK: tl.constexpr):
    """A tile (RANK, COLUMNS) of A of projection first + i."""
    rank, real = _rank_block(i, first, r, RANK)
    return tl.load(
        a + rank[:, None] * a_row + column[None, :], mask=real[:, None] & (column < width)[None, :], other=0.0
    )


@triton.jit
def _g_tile(g, i: tl.constexpr, first, r, g_row, row, tokens, RANK: tl.constexpr):
    """A tile (ROWS, RANK) of g of projection first + i."""
    rank, real = _rank_block(i, first, r, RANK)
    rows = g + row.to(tl.int64)[:, None] * g_row
    return tl.load(rows + rank[None, :], mask=(row < tokens)[:, None] & real[None, :], other=0.0)


@triton.jit
def _down_step(
    total, x, bits, a, i: tl.constexpr, first, r, a_row, column, width, DROP: tl.constexpr, RANK: tl.constexpr
):
    tile = _a_tile(a, i, first, r, a_row, column, width, RANK).to(x.dtype)
    return tl.dot(_keep(x, bits, i, DROP), tl.trans(tile), total, input_precision="ieee")


@triton.jit
def _down_store(total, sums, i: tl.constexpr, first, r, row, tokens, rank_all, DROP: tl.constexpr, RANK: tl.constexpr):
    rank, real = _rank_block(i, first, r, RANK)
    at = sums + (tl.program_id(1).to(tl.int64) * tokens + row)[:, None] * rank_all + rank[None, :]
    tl.store(at, total * (1024 / (1024 - DROP)), mask=(row < tokens)[:, None] & real[None, :])


@triton.jit(do_not_specialize=["tokens", "steps", "first", "low", "high"])
def lora_down_kernel(
    x, a, sums, tokens, width, steps, first, low, high, x_row, a_row, rank_all, r,
    N: tl.constexpr, DROP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens against steps * COLUMNS columns of x, for N projections."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = x + row.to(tl.int64)[:, None] * x_row
    total_0 = tl.zeros((ROWS, RANK), tl.float32)
    total_1 = tl.zeros((ROWS, RANK), tl.float32)
    total_2 = tl.zeros((ROWS, RANK), tl.float32)
    for step in range(steps):
        column = (tl.program_id(1) * steps + step) * COLUMNS + tl.arange(0, COLUMNS)
        real = (row < tokens)[:, None]
        if not WHOLE:
            real = real & (column < width)[None, :]
        tile = tl.load(rows + column[None, :], mask=real, other=0.0)
        bits = 0
        if DROP > 0:
            bits = _hash(row, column, width, low, high)
        total_0 = _down_step(total_0, tile, bits, a, 0, first, r, a_row, column, width, DROP, RANK)
        if N > 1:
            total_1 = _down_step(total_1, tile, bits, a, 1, first, r, a_row, column, width, DROP, RANK)
        if N > 2:
            total_2 = _down_step(total_2, tile, bits, a, 2, first, r, a_row, column, width, DROP, RANK)
    _down_store(total_0, sums, 0, first, r, row, tokens, rank_all, DROP, RANK)
    if N > 1:
        _down_store(total_1, sums, 1, first, r, row, tokens, rank_all, DROP, RANK)
    if N > 2:
        _down_store(total_2, sums, 2, first, r, row, tokens, rank_all, DROP, RANK)


@triton.jit(do_not_specialize=["tokens", "first", "low", "high"])
def lora_input_grad_kernel(
    dx, g, a, tokens, width, first, low, high, dx_row, g_row, a_row, r,
    N: tl.constexpr, DROP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One program: one tile of dx. Neighbouring programs share their rows of g, and all of A stays in the L2 cache."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at = dx + row.to(tl.int64)[:, None] * dx_row + column[None, :]
    real = (row < tokens)[:, None]
    if not WHOLE:
        real = real & (column < width)[None, :]
    old = tl.load(at, mask=real, other=0.0)  # first, so that the products below hide its latency
    bits = 0
    if DROP > 0:
        bits = _hash(row, column, width, low, high)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in tl.static_range(N):
        g_tile = _g_tile(g, i, first, r, g_row, row, tokens, RANK).to(dx.dtype.element_ty)
        a_tile = _a_tile(a, i, first, r, a_row, column, width, RANK).to(dx.dtype.element_ty)
        total += _keep(tl.dot(g_tile, a_tile, input_precision="ieee"), bits, i, DROP)
    tl.store(at, old + total * (1024 / (1024 - DROP)), mask=real)


@triton.jit
def _a_grad_step(total, x, bits, g, i: tl.constexpr, first, r, g_row, row, end, DROP: tl.constexpr, RANK: tl.constexpr):
    rank, real = _rank_block(i, first, r, RANK)
    at = g + row.to(tl.int64)[None, :] * g_row + rank[:, None]
    tile = tl.load(at, mask=(row < end)[None, :] & real[:, None], other=0.0).to(x.dtype)
    return tl.dot(tile, _keep(x, bits, i, DROP), total, input_precision="ieee")


@triton.jit
def _a_grad_store(
    total, sums, i: tl.constexpr, first, r, column, width, rank_all, DROP: tl.constexpr, RANK: tl.constexpr
):
    rank, real = _rank_block(i, first, r, RANK)
    at = sums + (tl.program_id(1) * rank_all + rank).to(tl.int64)[:, None] * width + column[None, :]
    tl.store(at, total * (1024 / (1024 - DROP)), mask=real[:, None] & (column < width)[None, :])


@triton.jit(do_not_specialize=["tokens", "steps", "first", "low", "high"])
def lora_a_grad_kernel(
    g, x, sums, tokens, width, steps, first, low, high, g_row, x_row, rank_all, r,
    N: tl.constexpr, DROP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS columns of x over steps * ROWS tokens, for N projections."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total_0 = tl.zeros((RANK, COLUMNS), tl.float32)
    total_1 = tl.zeros((RANK, COLUMNS), tl.float32)
    total_2 = tl.zeros((RANK, COLUMNS), tl.float32)
    for step in range(steps):
        row = (tl.program_id(1) * steps + step) * ROWS + tl.arange(0, ROWS)
        real = (row < tokens)[:, None]
        if not WHOLE:
            real = real & (column < width)[None, :]
        tile = tl.load(x + row.to(tl.int64)[:, None] * x_row + column[None, :], mask=real, other=0.0)
        bits = 0
        if DROP > 0:
            bits = _hash(row, column, width, low, high)
        total_0 = _a_grad_step(total_0, tile, bits, g, 0, first, r, g_row, row, tokens, DROP, RANK)
        if N > 1:
            total_1 = _a_grad_step(total_1, tile, bits, g, 1, first, r, g_row, row, tokens, DROP, RANK)
        if N > 2:
            total_2 = _a_grad_step(total_2, tile, bits, g, 2, first, r, g_row, row, tokens, DROP, RANK)
    _a_grad_store(total_0, sums, 0, first, r, column, width, rank_all, DROP, RANK)
    if N > 1:
        _a_grad_store(total_1, sums, 1, first, r, column, width, rank_all, DROP, RANK)
    if N > 2:
        _a_grad_store(total_2, sums, 2, first, r, column, width, rank_all, DROP, RANK)


@triton.jit(do_not_specialize=["size", "parts"])
def sum_parts_kernel(sums, total, size, parts, BLOCK: tl.constexpr):
    """total[j] = sums[0, j] + sums[1, j] + ..., in this order, in float32."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        value += tl.load(sums + at, mask=at < size, other=0.0)
        sums += size
    tl.store(total + at, value, mask=at < size)


@triton.jit
def rope_kernel(
    x, cos, sin, x_row, cos_row, sin_row,
    HEADS: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr, HEADS_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: all heads of one token."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF_BLOCK)
    real = pair < HALF
    cos_first = tl.load(cos + row * cos_row + pair, mask=real, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos + row * cos_row + HALF + pair, mask=real, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin + row * sin_row + pair, mask=real, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin + row * sin_row + HALF + pair, mask=real, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        sin_first, sin_second = -sin_second, -sin_first
    for start in range(0, HEADS, HEADS_BLOCK):
        head = start + tl.arange(0, HEADS_BLOCK)
        at = x + row * x_row + head[:, None] * (2 * HALF) + pair[None, :]
        there = (head < HEADS)[:, None] & real[None, :]
        first = tl.load(at, mask=there, other=0.0).to(tl.float32)
        second = tl.load(at + HALF, mask=there, other=0.0).to(tl.float32)
        tl.store(at, first * cos_first - second * sin_first, mask=there)
        tl.store(at + HALF, second * cos_second + first * sin_second, mask=there)


@triton.jit
def rms_norm_kernel(x, weight, y, eps, width, x_row, y_row, BLOCK: tl.constexpr):
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    real = column < width
    value = tl.load(x + row * x_row + column, mask=real, other=0.0)
    wide = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide) / width + eps)
    normed = (wide * scale).to(value.dtype)  # rounded here, as Llama's does
    tl.store(y + row * y_row + column, normed * tl.load(weight + column, mask=real, other=0.0), mask=real)


@triton.jit
def rms_norm_backward_kernel(
    dy, x, weight, residual, dx, eps, width, dy_row, x_row, residual_row, dx_row,
    RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    real = column < width
    value = tl.load(x + row * x_row + column, mask=real, other=0.0).to(tl.float32)
    m = tl.load(dy + row * dy_row + column, mask=real, other=0.0).to(tl.float32)
    m *= tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value) / width + eps)
    grad = scale * m - (scale * scale * scale * tl.sum(m * value) / width) * value
    if RESIDUAL:
        grad += tl.load(residual + row * residual_row + column, mask=real, other=0.0).to(tl.float32)
    tl.store(dx + row * dx_row + column, grad, mask=real)


@triton.jit
def swiglu_kernel(gate_up, product, width, BLOCK: tl.constexpr):
    """One program: BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < width
    gate = tl.load(gate_up + row * (2 * width) + column, mask=real, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * width) + width + column, mask=real, other=0.0)
    silu = (gate * tl.sigmoid(gate)).to(up.dtype)  # rounded here, as torch's silu does
    tl.store(product + row * width + column, silu * up, mask=real)


@triton.jit
def swiglu_backward_kernel(gate_up, d, width, BLOCK: tl.constexpr):
    """One program: BLOCK columns of one row; gate, up and d are overwritten in place."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < width
    at_gate = gate_up + row * (2 * width) + column
    gate = tl.load(at_gate, mask=real, other=0.0).to(tl.float32)
    up = tl.load(at_gate + width, mask=real, other=0.0)
    gradient = tl.load(d + row * width + column, mask=real, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(at_gate, gradient * up.to(tl.float32) * sigmoid * (1.0 + gate * (1.0 - sigmoid)), mask=real)
    tl.store(at_gate + width, gradient * silu, mask=real)
    tl.store(d + row * width + column, silu.to(up.dtype) * up, mask=real)
