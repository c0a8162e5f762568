"""One decoder layer of the Llama family with LoRA as a single autograd function: forward and backward written out.

Why by hand: for Mistral-7B, PEFT, transformers and autograd together launch some 380 kernels per layer and save 142 KB per
token. Here it is about 100 launches and 92 KB, or 8 KB if the layer is recomputed in the backward pass (gradient checkpointing).
Nothing is approximated; tests/models/fused/test_layer.py compares every gradient with the Hugging Face backend's.

With y = x W' + s drop(x) A' B' for a projection (W frozen, A and B trained, s = alpha / r, ' transposes, drop is LoRA's dropout):

    g = s dy B        dB = s dy' drop(x) A'        dA = g' drop(x)        dx = dy W + drop'(g A)

so that LoRA only saves drop(x) A' (r numbers per token); masks are drawn from a seed. Projections that share an input (q, k, v;
gate, up) run as one product: their W and A are stacked, their B form a block-diagonal matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from finetune.models.fused import attention
from finetune.models.fused.attention import Attended, Segments


@dataclass(frozen=True)
class Batch:
    """What every layer needs of a packed micro-batch. cos, sin: (tokens, head_dim). seed: of this micro-batch's dropout.

    rows: indices of the tokens with a loss; after its attention, the last layer computes only these.
    ops: finetune.models.fused.ops_torch or finetune.models.fused.ops_triton. dropout: LoRA's, 0 outside training.
    """

    segments: Segments
    rows: Tensor
    cos: Tensor
    sin: Tensor
    ops: ModuleType
    backend: attention.Backend
    dropout: float
    seed: int


class Group:
    """Projections that share an input: their frozen weights as one matrix, their adapters as one pair.

    weight: called, returns (sum of outputs, inputs) in the compute dtype (finetune.models.fused.base_weights.Weights).
    adapters: (A, B) of each projection, None if it has none.
    a (n r, inputs) and b (sum of outputs, n r) are copies in the compute dtype, which FusedModel.refresh updates.
    """

    def __init__(
        self,
        weight: Any,
        bias: Tensor | None,
        outputs: Sequence[int],
        adapters: Sequence[tuple[Tensor, Tensor] | None],
        scaling: float,
        dtype: torch.dtype,
    ) -> None:
        self.weight, self.bias, self.scaling = weight, bias, scaling
        self.parameters = [parameter for pair in adapters if pair for parameter in pair]
        self.a = self.b = None
        self.r = 0
        self._copies: list[Tensor] = []
        present = [(pair, index) for index, pair in enumerate(adapters) if pair]
        if not present:
            return
        (first_a, _), _ = present[0]
        self.r = first_a.shape[0]
        columns = self.r * len(present)
        self.a = torch.empty(columns, first_a.shape[1], dtype=dtype, device=first_a.device)
        self.b = torch.zeros(sum(outputs), columns, dtype=dtype, device=first_a.device)
        self._blocks = [(sum(outputs[:index]), sum(outputs[: index + 1])) for _, index in present]
        for place, (begin, end) in enumerate(self._blocks):
            mine = slice(place * self.r, (place + 1) * self.r)
            self._copies += [self.a[mine], self.b[begin:end, mine]]

    def copies(self) -> tuple[list[Tensor], list[Tensor]]:
        """(destinations, sources) of the copies to make after the optimizer has changed the adapters."""
        return self._copies, self.parameters

    def forward(self, x: Tensor, batch: Batch, seed: int, add_to: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns (y, drop(x) A'). add_to: the residual stream (tokens, outputs), to which the result is added."""
        weight, start = self.weight().t(), self.bias if add_to is None else add_to
        y = x @ weight if start is None else torch.addmm(start, x, weight)
        if add_to is not None and self.bias is not None:
            y += self.bias
        if self.a is None or self.b is None:
            return y, None
        xa = self.inner(x, batch, seed)
        y.addmm_(xa, self.b.t(), alpha=self.scaling)
        return y, xa

    def inner(self, x: Tensor, batch: Batch, seed: int) -> Tensor:
        result: Tensor = batch.ops.lora_down(x, self.a, self.r, batch.dropout, seed)
        return result

    def backward(
        self, dy: Tensor, x: Tensor, xa: Tensor | None, batch: Batch, seed: int, *, need_dx: bool = True
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Returns (dx, gradients of the adapters in the order of `parameters`)."""
        dx, g = self.input_gradient(dy, batch, seed, need_dx=need_dx)
        return dx, self.adapter_gradients(dy, g, x, xa, batch, seed)

    def input_gradient(
        self, dy: Tensor, batch: Batch, seed: int, *, need_dx: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns (dx, g); g is an input of `adapter_gradients`."""
        dx = dy @ self.weight() if need_dx else None
        if self.a is None or self.b is None:
            return dx, None
        g = (dy @ self.b).mul_(self.scaling)
        if dx is not None:
            batch.ops.lora_input_grad_(dx, g, self.a, self.r, batch.dropout, seed)
        return dx, g

    def adapter_gradients(
        self, dy: Tensor, g: Tensor | None, x: Tensor, xa: Tensor | None, batch: Batch, seed: int
    ) -> list[Tensor]:
        if g is None or xa is None:
            return []
        db = dy.t() @ (xa * self.scaling)
        da = batch.ops.lora_a_grad(g, x, self.r, batch.dropout, seed)
        gradients = []
        for place, (begin, end) in enumerate(self._blocks):
            mine = slice(place * self.r, (place + 1) * self.r)
            gradients += [da[mine], db[begin:end, mine]]
        return gradients


@dataclass
class Saved:
    """What the forward pass of a layer saves for its backward pass; each (tokens, width). down_inner is None if the layer was
    recomputed."""

    qkv: Tensor
    qkv_inner: Tensor | None
    attended: Attended
    o_inner: Tensor | None
    middle: Tensor
    gate_up: Tensor | None
    gate_up_inner: Tensor | None
    down_inner: Tensor | None


@dataclass(frozen=True)
class Layer:
    """The frozen parameters of one decoder layer and its four groups of projections. number: its index, from 0.

    last: its output has one row for each of batch.rows, not for each token.
    """

    number: int
    last: bool
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    input_norm: Tensor
    middle_norm: Tensor
    qkv: Group
    o: Group
    gate_up: Group
    down: Group

    @property
    def groups(self) -> tuple[Group, Group, Group, Group]:
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.groups for parameter in group.parameters]

    def __call__(self, x: Tensor, batch: Batch, *, keep: bool) -> Tensor:
        """x and result: (tokens, hidden), the residual stream. keep: False recomputes the layer in the backward pass."""
        result: Tensor = _LayerFunction.apply(x, self, batch, keep, *self.parameters)  # type: ignore[no-untyped-call]
        return result

    def forward(self, x: Tensor, batch: Batch) -> tuple[Tensor, Saved]:
        saved = self.inside(x, batch)
        y, saved.down_inner = self.down.forward(
            batch.ops.swiglu(saved.gate_up), batch, self._seed(batch, 3), add_to=saved.middle
        )
        return y, saved

    def inside(self, x: Tensor, batch: Batch) -> Saved:
        """The forward pass without down_proj, whose output no gradient needs."""
        ops = batch.ops
        qkv, qkv_inner = self.qkv.forward(ops.rms_norm(x, self.input_norm, self.eps), batch, self._seed(batch, 0))
        ops.rope_(qkv, batch.cos, batch.sin, self.heads + self.kv_heads, self.head_dim)
        attended = attention.forward(*self._split(qkv), batch.segments, batch.backend)
        middle, o_inner = self.o.forward(
            self._labelled(attended.out.flatten(1), batch), batch, self._seed(batch, 1), add_to=self._labelled(x, batch)
        )
        gate_up, gate_up_inner = self.gate_up.forward(
            ops.rms_norm(middle, self.middle_norm, self.eps), batch, self._seed(batch, 2)
        )
        return Saved(qkv, qkv_inner, attended, o_inner, middle, gate_up, gate_up_inner, None)

    def backward(
        self, dy: Tensor, x: Tensor, saved: Saved, batch: Batch, *, need_dx: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Returns (dx, gradients in the order of `parameters`). Overwrites and frees parts of `saved`."""
        d_middle, mlp = self._mlp_backward(dy, saved, batch)
        dx, attention_block = self._attention_backward(d_middle, x, saved, batch, need_dx=need_dx)
        return dx, attention_block + mlp

    def _mlp_backward(self, dy: Tensor, saved: Saved, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        ops, seed, gate_up = batch.ops, self._seed(batch, 3), saved.gate_up
        assert gate_up is not None
        hidden, g = self.down.input_gradient(dy, batch, seed)
        ops.swiglu_backward_(gate_up, hidden)  # now gate_up is its own gradient, and hidden is SwiGLU's output
        assert hidden is not None
        inner = saved.down_inner
        if inner is None and g is not None:
            inner = self.down.inner(hidden, batch, seed)
        down = self.down.adapter_gradients(dy, g, hidden, inner, batch, seed)
        del hidden
        normed = ops.rms_norm(saved.middle, self.middle_norm, self.eps)
        d_normed, above = self.gate_up.backward(gate_up, normed, saved.gate_up_inner, batch, self._seed(batch, 2))
        saved.gate_up = None  # more than half of what the layer saves
        return ops.rms_norm_backward(d_normed, saved.middle, self.middle_norm, self.eps, dy), above + down

    def _attention_backward(
        self, d_middle: Tensor, x: Tensor, saved: Saved, batch: Batch, *, need_dx: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        ops, attended = batch.ops, saved.attended
        out = self._labelled(attended.out.flatten(1), batch)
        d_out, o = self.o.backward(d_middle, out, saved.o_inner, batch, self._seed(batch, 1))
        assert d_out is not None
        if self.last:
            d_out, d_middle = (_spread(part, batch.rows, x.shape[0]) for part in (d_out, d_middle))
        parts = attention.backward(
            d_out.view_as(attended.out), *self._split(saved.qkv), attended, batch.segments, batch.backend
        )
        d_qkv = torch.cat([part.flatten(1) for part in parts], dim=1)
        ops.rope_(d_qkv, batch.cos, batch.sin, self.heads + self.kv_heads, self.head_dim, inverse=True)
        normed = ops.rms_norm(x, self.input_norm, self.eps)
        d_normed, qkv = self.qkv.backward(d_qkv, normed, saved.qkv_inner, batch, self._seed(batch, 0), need_dx=need_dx)
        if d_normed is None:
            return None, qkv + o
        return ops.rms_norm_backward(d_normed, x, self.input_norm, self.eps, d_middle), qkv + o

    def _labelled(self, x: Tensor, batch: Batch) -> Tensor:
        return x[batch.rows] if self.last else x

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = qkv.view(qkv.shape[0], self.heads + 2 * self.kv_heads, self.head_dim)
        first_value = self.heads + self.kv_heads
        return heads[:, : self.heads], heads[:, self.heads : first_value], heads[:, first_value:]

    def _seed(self, batch: Batch, group: int) -> int:
        return (batch.seed + 1_000_003 * (4 * self.number + group)) % 2**31


def _spread(part: Tensor, rows: Tensor, tokens: int) -> Tensor:
    """The gradient of x[rows]: zero for all other rows. The rows must be distinct."""
    return part.new_zeros(tokens, part.shape[1]).index_copy_(0, rows, part)


class _LayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, batch: Batch, keep: bool, *parameters: Tensor) -> Tensor:
        y, saved = layer.forward(x, batch)
        ctx.save_for_backward(x)
        ctx.layer, ctx.batch, ctx.saved = layer, batch, saved if keep else None
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,), (dy,) = ctx.saved_tensors, gradients
        saved = ctx.saved or ctx.layer.inside(x, ctx.batch)
        ctx.saved = None
        dx, of_parameters = ctx.layer.backward(dy.contiguous(), x, saved, ctx.batch, need_dx=ctx.needs_input_grad[0])
        return dx, None, None, None, *of_parameters
