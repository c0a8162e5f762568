"""On a CUDA GPU of compute capability 8.0 or newer: finetune/models/fused/ops_triton.py against
finetune/models/fused/ops_torch.py in float32.

Run with `pytest -m gpu -s tests/models/fused/test_gpu_ops.py`; the last test prints the memory rate that each kernel
reaches.
"""

import math
from itertools import combinations
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from finetune.models.fused import ops_torch  # noqa: E402

CAPABLE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CAPABLE, reason="no CUDA GPU of compute capability 8.0 or newer on this machine"),
]
if CAPABLE:
    from finetune.models.fused import ops_triton as ops

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOKENS = [1, 17, 500, 4901]
GROUPS = [(4096, 3, 16), (4096, 2, 16), (14336, 1, 16), (4096, 1, 64), (1000, 3, 8), (512, 5, 24)]
"""(width K, projections n, rank r)"""
HEADS, HEAD_DIM = 40, 128


def normal(*shape: int, seed: int = 0, dtype: Any = torch.float32, padding: int = 0) -> Any:
    """Normal values on the GPU; `padding` columns are between the rows."""
    generator = torch.Generator("cuda").manual_seed(seed)
    wide = torch.randn(*shape[:-1], shape[-1] + padding, generator=generator, device="cuda").to(dtype)
    return wide[..., : shape[-1]]


def assert_near(actual: Any, expected: Any, dtype: Any, steps: float = 2.0) -> None:
    """Within `steps` roundings of dtype of the largest value; for float32, sums of thousands of terms in another order."""
    limit = 1e-4 if dtype == torch.float32 else steps * torch.finfo(dtype).eps
    error = (actual.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error <= limit, f"{error:.2e} of the largest value, expected at most {limit:.2e}"


def inputs(tokens: int, width: int, n: int, r: int, dtype: Any) -> tuple[Any, Any, Any]:
    x = normal(tokens, width, dtype=dtype, padding=64)
    a = normal(n * r, width, seed=1, dtype=dtype) / math.sqrt(width)
    g = normal(tokens, n * r, seed=2, dtype=dtype, padding=16)
    return x, a.contiguous(), g


def revealed_masks(tokens: int, width: int, n: int, r: int, p: float, seed: int) -> Any:
    """The scaled masks (n, T, K) float32 that lora_input_grad_ applies: g and a select one projection each."""
    masks = torch.zeros(n, tokens, width, device="cuda")
    for i in range(n):
        g, a = torch.zeros(tokens, n * r, device="cuda"), torch.zeros(n * r, width, device="cuda")
        g[:, i * r], a[i * r] = 1.0, 1.0
        ops.lora_input_grad_(masks[i], g, a, r, p, seed)
    return masks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("width", "n", "r"), GROUPS)
def test_without_dropout_triton_is_torch(dtype: Any, tokens: int, width: int, n: int, r: int) -> None:
    x, a, g = inputs(tokens, width, n, r, dtype)
    full = (x.float(), a.float(), g.float())
    assert_near(ops.lora_down(x, a, r, 0.0, 3), ops_torch.lora_down(full[0], full[1], r, 0.0, 3), dtype)
    assert_near(ops.lora_a_grad(g, x, r, 0.0, 3), ops_torch.lora_a_grad(full[2], full[0], r, 0.0, 3), torch.float32)
    own = normal(tokens, width, seed=4, dtype=dtype, padding=32)
    expected = own.float().clone()
    ops.lora_input_grad_(own, g, a, r, 0.0, 3)
    ops_torch.lora_input_grad_(expected, full[2], full[1], r, 0.0, 3)
    assert_near(own, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("width", "n", "r"), GROUPS)
def test_all_three_kernels_draw_the_same_masks(dtype: Any, tokens: int, width: int, n: int, r: int) -> None:
    p, seed = 0.1, 2**41 + 5
    x, a, g = inputs(tokens, width, n, r, dtype)
    masks = revealed_masks(tokens, width, n, r, p, seed)
    blocks = [slice(i * r, (i + 1) * r) for i in range(n)]
    masked = [mask * x.float() for mask in masks]
    down = torch.cat([part @ a[block].float().T for part, block in zip(masked, blocks, strict=True)], dim=1)
    a_grad = torch.cat([g[:, block].float().T @ part for part, block in zip(masked, blocks, strict=True)])
    assert_near(ops.lora_down(x, a, r, p, seed), down, dtype)
    assert_near(ops.lora_a_grad(g, x, r, p, seed), a_grad, torch.float32)
    dx = normal(tokens, width, seed=4, dtype=dtype)
    expected = dx.float().clone()
    for mask, block in zip(masks, blocks, strict=True):
        expected += mask * (g[:, block].float() @ a[block].float())
    ops.lora_input_grad_(dx, g, a, r, p, seed)
    assert_near(dx, expected, dtype)


@pytest.mark.parametrize("p", [0.05, 0.3])
def test_masks_keep_the_given_share_and_scale_it_back(p: float) -> None:
    masks = revealed_masks(4901, 4096, 3, 16, p, 0)
    drop = round(p * 1024) / 1024
    assert torch.unique(masks).tolist() == pytest.approx([0.0, 1 / (1 - drop)])
    kept = (masks > 0).double()
    for share, size in ((kept.mean(dim=(1, 2)), 4901 * 4096), (kept.mean(dim=1), 4901), (kept.mean(dim=2), 4096)):
        sigma = math.sqrt(drop * (1 - drop) / size)
        assert (share - (1 - drop)).abs().max() < (4 if share.dim() == 1 else 6) * sigma  # 6 over thousands of lines


def test_masks_of_other_projections_seeds_and_places_are_independent() -> None:
    drop = 307 / 1024
    kept = [mask for seed in (0, 1, 2**40) for mask in revealed_masks(2048, 4096, 4, 4, 0.3, seed).gt(0).float()]
    centred = [(mask - (1 - drop)) / math.sqrt(drop * (1 - drop)) for mask in kept]
    for one, other in combinations(centred, 2):
        assert (one * other).double().mean().abs() < 5 / math.sqrt(one.numel())
    for down, right in ((0, 1), (0, 2), (0, 64), (1, 0), (2, 0), (64, 0), (1, 1), (16, 4)):
        for mask in centred:
            pair = mask[down:, right:] * mask[: 2048 - down, : 4096 - right]
            assert pair.double().mean().abs() < 5 / math.sqrt(pair.numel()), (down, right)


@pytest.mark.parametrize("p", [0.0, 0.05])
def test_the_same_call_gives_the_same_bytes(p: float) -> None:
    x, a, g = inputs(4901, 4096, 3, 16, torch.bfloat16)
    down, a_grad = ops.lora_down(x, a, 16, p, 9), ops.lora_a_grad(g, x, 16, p, 9)
    for _ in range(5):
        assert torch.equal(ops.lora_down(x, a, 16, p, 9), down)
        assert torch.equal(ops.lora_a_grad(g, x, 16, p, 9), a_grad)


def test_a_and_g_may_be_float32_beside_a_bfloat16_x() -> None:
    x, a, g = inputs(300, 4096, 3, 16, torch.float32)
    half = torch.bfloat16
    x, low_a, low_g = x.to(half), a.to(half), g.to(half)
    for p in (0.0, 0.05):
        assert_near(ops.lora_down(x, a, 16, p, 1), ops.lora_down(x, low_a, 16, p, 1), half)
        assert_near(ops.lora_a_grad(g, x, 16, p, 1), ops.lora_a_grad(low_g, x, 16, p, 1), torch.float32)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_torch_operations_in_half_precision(dtype: Any, p: float) -> None:
    x, a, g = inputs(1001, 4096, 2, 16, dtype)
    masks = torch.zeros(2, 1001, 4096, device="cuda", dtype=dtype)
    for i in range(2):
        one_g, one_a = torch.zeros_like(g), torch.zeros_like(a)
        one_g[:, i * 16], one_a[i * 16] = 1.0, 1.0
        ops_torch.lora_input_grad_(masks[i], one_g, one_a, 16, p, 7)
    kept = masks.gt(0).float() / (1 - p)
    down = torch.cat([(kept[i] * x.float()) @ a[i * 16 : i * 16 + 16].float().T for i in range(2)], dim=1)
    a_grad = torch.cat([g[:, i * 16 : i * 16 + 16].float().T @ (kept[i] * x.float()) for i in range(2)])
    assert_near(ops_torch.lora_down(x, a, 16, p, 7), down, dtype)
    assert_near(ops_torch.lora_a_grad(g, x, 16, p, 7), a_grad, torch.float32)


@pytest.mark.parametrize("table", [torch.float32, None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_rope(dtype: Any, tokens: int, table: Any) -> None:
    angles = torch.outer(torch.arange(tokens), 10000 ** -torch.linspace(0, 1, HEAD_DIM // 2)).repeat(1, 2).cuda()
    cos, sin = angles.cos().to(table or dtype), angles.sin().to(table or dtype)
    for inverse in (False, True):
        x = normal(tokens, (HEADS + 8) * HEAD_DIM, dtype=dtype, padding=64)
        expected = x.float().clone()
        ops_torch.rope_(expected, cos.float(), sin.float(), HEADS, HEAD_DIM, inverse)
        ops.rope_(x, cos, sin, HEADS, HEAD_DIM, inverse)
        assert_near(x, expected, dtype)
        assert torch.equal(x[:, HEADS * HEAD_DIM :].float(), expected[:, HEADS * HEAD_DIM :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", [4096, 1000])
def test_rms_norm(dtype: Any, tokens: int, width: int) -> None:
    x, dy = normal(tokens, width, dtype=dtype, padding=8), normal(tokens, width, seed=1, dtype=dtype)
    weight, residual = normal(width, seed=2, dtype=dtype), normal(tokens, width, seed=3, dtype=dtype)
    y = ops.rms_norm(x, weight, 1e-5)
    assert y.dtype == dtype
    assert_near(y, ops_torch.rms_norm(x.float(), weight.float(), 1e-5), dtype)
    for rest in (None, residual):
        expected = ops_torch.rms_norm_backward(
            dy.float(), x.float(), weight.float(), 1e-5, None if rest is None else rest.float()
        )
        assert_near(ops.rms_norm_backward(dy, x, weight, 1e-5, rest), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", [14336, 1000])
def test_swiglu(dtype: Any, tokens: int, width: int) -> None:
    gate_up, d = normal(tokens, 2 * width, dtype=dtype), normal(tokens, width, seed=1, dtype=dtype)
    full = gate_up.float().clone()
    assert_near(ops.swiglu(gate_up), ops_torch.swiglu(full), dtype)
    ops.swiglu_backward_(gate_up, d)
    assert_near(d, ops_torch.swiglu(full), dtype)
    ops_torch.swiglu_backward_(full, normal(tokens, width, seed=1, dtype=dtype).float())
    assert_near(gate_up, full, dtype, steps=4.0)


def test_memory_rates() -> None:
    """Prints, per kernel, the median time and the bytes of its large tensors over it (moved once, in bfloat16)."""
    print(f"\n{torch.cuda.get_device_name()}, T = 4901, bfloat16, measured")
    for width, n in ((4096, 3), (4096, 2), (4096, 1), (14336, 1)):
        for p in (0.0, 0.05):
            x, a, g = inputs(4901, width, n, 16, torch.bfloat16)
            size, what = x.numel() * 2, f"K={width} R={n * 16} p={p}"
            report(f"lora_down        {what}", size, ops.lora_down, x, a, 16, p, 1)
            report(f"lora_input_grad_ {what}", 2 * size, ops.lora_input_grad_, x, g, a, 16, p, 1)
            report(f"lora_a_grad      {what}", size, ops.lora_a_grad, g, x, 16, p, 1)
    x, weight = normal(4901, 4096, dtype=torch.bfloat16), normal(4096, dtype=torch.bfloat16)
    size = x.numel() * 2
    report("rms_norm         H=4096", 2 * size, ops.rms_norm, x, weight, 1e-5)
    report("rms_norm_backward H=4096, residual", 4 * size, ops.rms_norm_backward, x, x, weight, 1e-5, x)
    gate_up, d = normal(4901, 28672, dtype=torch.bfloat16), normal(4901, 14336, dtype=torch.bfloat16)
    report("swiglu           F=14336", 3 * d.numel() * 2, ops.swiglu, gate_up)
    report("swiglu_backward_ F=14336", 6 * d.numel() * 2, ops.swiglu_backward_, gate_up, d)
    heads, cos = normal(4901, 6144, dtype=torch.bfloat16), normal(4901, HEAD_DIM)
    report("rope_            40 of 48 heads", 2 * 4901 * 5120 * 2, ops.rope_, heads, cos, cos, HEADS, HEAD_DIM)


def report(name: str, size: int, operation: Any, *arguments: Any) -> None:
    from triton.testing import do_bench

    milliseconds = do_bench(lambda: operation(*arguments), warmup=10, rep=50, return_mode="median")
    assert milliseconds > 0
    print(f"{name:44s} {milliseconds * 1000:8.1f} us {size / milliseconds / 1e6:8.0f} GB/s")
