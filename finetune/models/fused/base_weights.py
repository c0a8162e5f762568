"""The frozen weights and biases of a model's projections as the layers use them: joined, and dequantized from 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Scratch:
    """One buffer for dequantized 4-bit weights, overwritten at each use: safe because a CUDA stream runs its kernels in order."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._buffer = torch.empty(0, dtype=dtype, device=device)

    def matrix(self, rows: int, columns: int) -> Tensor:
        if self._buffer.numel() < rows * columns:
            self._buffer = torch.empty(rows * columns, dtype=self.dtype, device=self.device)
        return self._buffer[: rows * columns].view(rows, columns)


class Weights:
    """The frozen weights of projections that share an input, stacked to (sum of outputs, inputs) in dtype.

    4-bit weights are dequantized into the scratch buffer at every use, or only once if `cached`.
    """

    def __init__(self, bases: Sequence[Any], dtype: torch.dtype, scratch: Scratch, *, cached: bool) -> None:
        self._bases, self._scratch = bases, scratch
        self._outputs, self._inputs = [base.out_features for base in bases], bases[0].in_features
        self._packed = getattr(bases[0].weight, "quant_state", None) is not None
        self._whole: Tensor | None = None
        if not self._packed:
            self._whole = _joined(bases, dtype)
        elif cached:
            shape = sum(self._outputs), self._inputs
            self._whole = self._dequantized(torch.empty(shape, dtype=dtype, device=scratch.device))

    def __call__(self) -> Tensor:
        if self._whole is not None:
            return self._whole
        return self._dequantized(self._scratch.matrix(sum(self._outputs), self._inputs))

    def forget(self) -> bool:
        """Free the cached dequantized weights; returns whether there were any."""
        cached = self._packed and self._whole is not None
        if cached:
            self._whole = None
        return cached

    def _dequantized(self, whole: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        for base, part in zip(self._bases, torch.split(whole, self._outputs), strict=True):
            packed, state = base.weight.data, base.weight.quant_state
            if part.is_cuda and state.dtype == part.dtype:
                dequantize_4bit(packed, state, out=part)
            else:  # bitsandbytes 0.50 has no `out` on a CPU
                part.copy_(dequantize_4bit(packed, state))
        return whole


def joined_bias(bases: Sequence[Any], dtype: torch.dtype) -> Tensor | None:
    """The biases, concatenated, with zeros for a projection without one; None if no projection has one."""
    if all(base.bias is None for base in bases):
        return None
    device = bases[0].weight.device
    none = [torch.zeros(base.out_features, dtype=dtype, device=device) for base in bases]
    return torch.cat(
        [zero if base.bias is None else base.bias.detach().to(dtype) for base, zero in zip(bases, none, strict=True)]
    )


def _joined(bases: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """Unquantised weights, concatenated. The modules' own weights become views of the result, so that no second copy stays."""
    if len(bases) == 1:
        whole: Tensor = bases[0].weight.detach().to(dtype)
        return whole
    whole = torch.cat([base.weight.detach().to(dtype) for base in bases])
    if whole.dtype == bases[0].weight.dtype:
        for base, part in zip(bases, torch.split(whole, [base.out_features for base in bases]), strict=True):
            base.weight.data = part
    return whole
