"""The loop backend of finetune/models/fused/attention.py against attention written out with a mask, in float64."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from finetune.models.fused import attention  # noqa: E402
from finetune.models.fused.attention import Segments  # noqa: E402

CPU = torch.device("cpu")


def by_mask(q: Any, k: Any, v: Any, lengths: tuple[int, ...]) -> Any:
    """Scores of all pairs of tokens, with a mask that leaves a token itself and the earlier ones of its sequence."""
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(sequence))
    visible = (sequence[:, None] == sequence[None]) & (place[:, None] >= place[None])
    copies = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(copies, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, keys) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def parts(tokens: int, heads: int, kv_heads: int, width: int, *, seed: int = 0) -> list[Any]:
    """q, k, v as slices of one tensor, as a joined projection leaves them; float64."""
    draws = torch.Generator().manual_seed(seed)
    joined = torch.randn(tokens, heads + 2 * kv_heads, width, dtype=torch.float64, generator=draws)
    return list(torch.split(joined, [heads, kv_heads, kv_heads], dim=1))


@pytest.mark.parametrize("lengths", [(1,), (13,), (1, 1, 1), (5, 1, 12, 2), (3, 40)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_forward_and_backward_are_those_of_masked_attention(
    lengths: tuple[int, ...], heads: int, kv_heads: int
) -> None:
    q, k, v = (x.requires_grad_() for x in parts(sum(lengths), heads, kv_heads, 8))
    d_out = torch.randn(q.shape, dtype=torch.float64)
    expected = by_mask(q, k, v, lengths)
    gradients = torch.autograd.grad(expected, (q, k, v), d_out)
    segments = Segments.of(lengths, CPU)
    with torch.no_grad():
        attended = attention.forward(q, k, v, segments, "loop")
        found = attention.backward(d_out, q, k, v, attended, segments, "loop")
    torch.testing.assert_close(attended.out, expected, rtol=1e-10, atol=1e-12)
    for ours, theirs, whole in zip(found, gradients, (q, k, v), strict=True):
        assert ours.shape == whole.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_backward_works_inside_autograds_backward_and_leaves_its_inputs_alone() -> None:
    """There gradients are disabled, and the layer still uses q, k and v afterwards."""
    q, k, v = parts(9, 2, 2, 8)
    before = [x.clone() for x in (q, k, v)]
    segments = Segments.of((4, 5), CPU)
    d_out = torch.ones_like(q)
    with torch.inference_mode(False), torch.no_grad():
        attended = attention.forward(q, k, v, segments, "loop")
        attention.backward(d_out, q, k, v, attended, segments, "loop")
        assert not torch.is_grad_enabled()
    assert all(torch.equal(x, old) and not x.requires_grad for x, old in zip((q, k, v), before, strict=True))
    assert torch.equal(d_out, torch.ones_like(q))


def test_other_sequences_change_no_bit() -> None:
    lengths = (6, 11, 4)
    q, k, v = parts(21, 4, 2, 8)
    segments = Segments.of(lengths, CPU)
    d_out = torch.randn(q.shape, dtype=torch.float64)

    def run() -> list[Any]:
        attended = attention.forward(q, k, v, segments, "loop")
        return [attended.out.clone(), *attention.backward(d_out, q, k, v, attended, segments, "loop")]

    before = run()
    for x in (q, k, v, d_out):
        x[6:17] = torch.randn_like(x[6:17])
    for one, other in zip(before, run(), strict=True):
        assert torch.equal(one[:6], other[:6])
        assert torch.equal(one[17:], other[17:])
        assert not torch.equal(one[6:17], other[6:17])


def test_repeated_heads_and_the_sum_of_their_gradients_are_each_others_transpose() -> None:
    """The memory-efficient kernel gets copies in place of shared heads: query head h reads key head h // copies."""
    x = torch.randn(5, 3, 8, dtype=torch.float64, requires_grad=True)
    repeated = attention._repeated(x, 12)
    assert torch.equal(repeated, x.repeat_interleave(4, dim=1))
    d = torch.randn(5, 12, 8, dtype=torch.float64)
    (expected,) = torch.autograd.grad(repeated, x, d)
    torch.testing.assert_close(attention._summed(d, 3), expected, rtol=1e-12, atol=1e-12)


def test_segments() -> None:
    segments = Segments.of([3, 1, 7], CPU)
    assert segments.bounds.tolist() == [0, 3, 4, 11]
    assert segments.bounds.dtype == torch.int32
    assert segments.lengths == (3, 1, 7)
    assert segments.longest == 7


def test_a_cpu_and_float32_use_the_loop() -> None:
    assert attention.backend_for(CPU, torch.bfloat16) == "loop"
    assert attention.backend_for(CPU, torch.float32) == "loop"
    assert attention.backend_for(torch.device("cuda"), torch.float32) == "loop"


@pytest.mark.parametrize(
    ("capability", "backend"), [((7, 0), "efficient"), ((7, 5), "efficient"), ((8, 0), "flash"), ((9, 0), "flash")]
)
def test_on_a_gpu_the_compute_capability_decides(
    capability: tuple[int, int], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert attention.backend_for(torch.device("cuda"), torch.float16) == backend
