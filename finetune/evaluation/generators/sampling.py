"""The next token of each row: the most likely one, or one drawn at random from the row's own seed.

A draw is the most likely token after Gumbel noise was added to logits / temperature. The noise is a hash of the answer's seed,
the number of the token in the answer and the token's id, so that an answer does not depend on the rows beside it, on the
batch, or on where it is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEP, _TOKEN = -7046029254386353131, -4417276706812531889
_MIX = (-4658895280553007687, -7723592293110705685)
"""Odd constants, those of SplitMix64 (Steele, Lea and Flood, 2014) and of its relatives, as signed numbers of 64 bits."""


def chosen(logits: Tensor, temperature: float | None, seeds: Tensor, drawn: Tensor) -> Tensor:
    """The next token of each row, shape (rows,). logits: (rows, vocabulary). temperature: None for the most likely token. seeds,
    drawn: (rows,), 64-bit integers: the seed of the row's answer, and how many tokens it has."""
    if temperature is None:
        return logits.argmax(dim=-1)
    return noisy(logits, temperature, seeds, drawn).argmax(dim=-1)


def noisy(logits: Tensor, temperature: float, seeds: Tensor, drawn: Tensor) -> Tensor:
    """logits / temperature + noise, in float64: the largest is a draw from the softmax."""
    tokens = torch.arange(logits.shape[-1], device=logits.device)
    hashed = _mixed(_mixed(seeds + drawn * _STEP)[:, None] + tokens * _TOKEN)
    uniform = ((hashed & 0xFFFFFFFF).double() + 0.5) / 2**32
    return logits.double() / temperature - (-uniform.log()).log()


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: every bit of the result depends on every bit of x. Products wrap around."""
    x = (x ^ _shifted(x, 30)) * _MIX[0]
    x = (x ^ _shifted(x, 27)) * _MIX[1]
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros on the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
