"""finetune/models/fused/ops_torch.py against autograd of the plain formulas and against transformers' own modules, on
CPU."""

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.nn import functional  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, rotate_half  # noqa: E402

from finetune.models.fused import ops_torch as ops  # noqa: E402

EXACT = {"rtol": 1e-5, "atol": 1e-5}
GROUPS = [(1, 16), (2, 8), (3, 16), (4, 5)]
"""(projections, rank)"""


def normal(*shape: int, seed: int = 0, dtype: Any = torch.float32) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def slice_of_wider(*shape: int, seed: int = 0) -> Any:
    """A (T, C) view of a wider tensor."""
    return normal(shape[0], shape[1] + 7, seed=seed)[:, 3 : 3 + shape[1]]


def revealed_masks(tokens: int, width: int, n: int, r: int, p: float, seed: int) -> Any:
    """The scaled masks (n, T, K) that lora_input_grad_ applies: g and a select one projection each."""
    masks = torch.zeros(n, tokens, width)
    for i in range(n):
        g, a = torch.zeros(tokens, n * r), torch.zeros(n * r, width)
        g[:, i * r], a[i * r] = 1.0, 1.0
        ops.lora_input_grad_(masks[i], g, a, r, p, seed)
    return masks


def down_by_formula(x: Any, a: Any, masks: Any, r: int) -> Any:
    return torch.cat([(mask * x) @ a[i * r : (i + 1) * r].T for i, mask in enumerate(masks)], dim=1)


@pytest.mark.parametrize(("n", "r"), GROUPS)
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5])
def test_lora_operations_are_the_formula_and_its_gradients(n: int, r: int, p: float) -> None:
    tokens, width, seed = 37, 48, 11
    x = slice_of_wider(tokens, width).detach().requires_grad_()
    a = normal(n * r, width, seed=1).requires_grad_()
    g = slice_of_wider(tokens, n * r, seed=2)
    masks = revealed_masks(tokens, width, n, r, p, seed)
    expected = down_by_formula(x, a, masks, r)
    x_grad, a_grad = torch.autograd.grad(expected, (x, a), g)
    with torch.no_grad():
        torch.testing.assert_close(ops.lora_down(x, a, r, p, seed), expected, **EXACT)
        torch.testing.assert_close(ops.lora_a_grad(g, x, r, p, seed), a_grad, **EXACT)
        start = slice_of_wider(tokens, width, seed=3)
        dx = slice_of_wider(tokens, width, seed=3)
        ops.lora_input_grad_(dx, g, a, r, p, seed)
        torch.testing.assert_close(dx, start + x_grad, **EXACT)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_masks_keep_the_given_share_and_scale_it_back(p: float) -> None:
    masks = revealed_masks(256, 512, 3, 4, p, seed=5)
    assert torch.unique(masks).tolist() == pytest.approx([0.0, 1 / (1 - p)])
    kept = (masks > 0).double().mean(dim=(1, 2))
    sigma = math.sqrt(p * (1 - p) / masks[0].numel())
    assert (kept - (1 - p)).abs().max() < 4 * sigma


def test_masks_of_other_projections_and_seeds_are_independent() -> None:
    p = 0.3
    masks = torch.cat([revealed_masks(256, 512, 3, 4, p, seed) for seed in (0, 1, 2**40)]).gt(0).double().flatten(1)
    correlation = torch.corrcoef(masks) - torch.eye(9)
    assert correlation.abs().max() < 4.5 / math.sqrt(masks.shape[1])
    again = revealed_masks(256, 512, 3, 4, p, 1).gt(0).double().flatten(1)
    assert torch.equal(again, masks[3:6])


def test_dropout_does_not_change_torchs_own_random_state() -> None:
    before = torch.get_rng_state()
    ops.lora_down(normal(8, 16), normal(4, 16), 4, 0.5, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_gradient_of_a_is_float32_and_survives_sums_beyond_float16() -> None:
    g, x = torch.full((4000, 2), 8.0).half(), torch.full((4000, 3), 8.0).half()
    for p in (0.0, 0.5):
        grad = ops.lora_a_grad(g, x, 2, p, 0)
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, torch.full((2, 3), 256000.0), rtol=0.1, atol=0.0)
    assert ops.lora_a_grad(g, x, 2, 0.0, 0)[0, 0] == 256000.0


@pytest.mark.parametrize("heads", [1, 3])
def test_rope_is_transformers_rope_and_its_backward(heads: int) -> None:
    tokens, head_dim = 9, 8
    angles = torch.outer(torch.arange(tokens).float(), torch.rand(head_dim // 2)).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    x = slice_of_wider(tokens, heads * head_dim + 5)
    before = x.clone()
    by_head = before[:, : heads * head_dim].view(1, tokens, heads, head_dim).transpose(1, 2).requires_grad_()
    rotated, _ = apply_rotary_pos_emb(by_head, by_head, cos[None], sin[None])
    ops.rope_(x, cos, sin, heads, head_dim)
    torch.testing.assert_close(x[:, : heads * head_dim], rotated.transpose(1, 2).reshape(tokens, -1), **EXACT)
    assert torch.equal(x[:, heads * head_dim :], before[:, heads * head_dim :])

    grad = slice_of_wider(tokens, heads * head_dim, seed=4)
    (expected,) = torch.autograd.grad(rotated, by_head, grad.view(1, tokens, heads, head_dim).transpose(1, 2))
    ops.rope_(grad, cos, sin, heads, head_dim, inverse=True)
    torch.testing.assert_close(grad, expected.transpose(1, 2).reshape(tokens, -1), **EXACT)

    ops.rope_(x, cos, sin, heads, head_dim, inverse=True)
    torch.testing.assert_close(x, before, **EXACT)


def test_rope_and_its_transpose_where_the_two_halves_of_the_tables_differ() -> None:
    cos, sin = normal(1, 6, seed=1), normal(1, 6, seed=2)
    forward, backward = torch.eye(6), torch.eye(6)
    ops.rope_(forward, cos.expand(6, 6), sin.expand(6, 6), 1, 6)
    ops.rope_(backward, cos.expand(6, 6), sin.expand(6, 6), 1, 6, inverse=True)
    torch.testing.assert_close(forward, torch.eye(6) * cos + rotate_half(torch.eye(6)) * sin, **EXACT)
    torch.testing.assert_close(backward, forward.T, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_is_llamas(dtype: Any) -> None:
    norm = LlamaRMSNorm(64, eps=1e-3).to(dtype)
    norm.weight.data = normal(64, seed=1, dtype=dtype)
    x = normal(33, 70, dtype=dtype)[:, 2:66]
    y = ops.rms_norm(x, norm.weight.detach(), 1e-3)
    assert y.dtype == dtype
    torch.testing.assert_close(y, norm(x), rtol=max(1e-6, torch.finfo(dtype).eps), atol=1e-6)
    if dtype != torch.float32:  # rounded at the same places: only the sum of squares is added in another order
        assert (y == norm(x)).double().mean() > 0.99


@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm_backward_is_autograds(with_residual: bool) -> None:
    x = slice_of_wider(33, 64).detach().requires_grad_()
    norm = LlamaRMSNorm(64, eps=1e-2)
    norm.weight.data = normal(64, seed=1)
    dy, residual = normal(33, 64, seed=2), normal(33, 64, seed=3)
    (expected,) = torch.autograd.grad(norm(x), x, dy)
    given = residual if with_residual else None
    dx = ops.rms_norm_backward(dy, x.detach(), norm.weight.detach(), 1e-2, given)
    torch.testing.assert_close(dx, expected + residual if with_residual else expected, **EXACT)
    assert torch.equal(dy, normal(33, 64, seed=2)), "dy belongs to the caller"
    assert torch.equal(residual, normal(33, 64, seed=3)), "so does the residual"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_swiglu_and_its_gradient_are_autograds(dtype: Any) -> None:
    gate_up = normal(17, 48, dtype=dtype).requires_grad_()
    d = normal(17, 24, seed=1, dtype=dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    expected = functional.silu(gate) * up
    (grad,) = torch.autograd.grad(expected, gate_up, d)
    own = gate_up.detach().clone()
    assert torch.equal(ops.swiglu(own), expected)
    ops.swiglu_backward_(own, d)
    torch.testing.assert_close(own, grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    assert torch.equal(d, expected), "d has become the product"
