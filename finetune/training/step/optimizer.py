"""What the optimizer sees: all adapters in one tensor, so that it takes one step instead of hundreds.

bitsandbytes waits for the GPU after every parameter: 448 times a step for Mistral-7B, 45 ms of 312 on an H100. Every adapter
becomes a part of one tensor and stays what it is to PEFT. The parts begin at multiples of 256 numbers, the block size of 8-bit
optimizer states, so that each block belongs to one adapter and the result is that of separate steps (apart from adapters below
4,096 numbers, whose states bitsandbytes would leave in 32 bits). After a resume a paged optimizer's states go back to paged
memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

BLOCK = 256


class FlatAdapters:
    """parameter: what the optimizer sees, float32, of all adapters' numbers one after the other; its grad is made of theirs."""

    def __init__(self, adapters: Sequence[Tensor]) -> None:
        self._adapters = list(adapters)
        sizes = [-(-adapter.numel() // BLOCK) * BLOCK for adapter in self._adapters]
        whole = torch.zeros(sum(sizes), dtype=torch.float32, device=self._adapters[0].device)
        self.parameter = Parameter(whole)
        self.parameter.grad = torch.zeros_like(whole)
        self._gradients = []
        parts = torch.split(whole, sizes), torch.split(self.parameter.grad, sizes)
        for adapter, values, gradient in zip(self._adapters, *parts, strict=True):
            own = values[: adapter.numel()].view(adapter.shape)
            own.copy_(adapter.detach())
            adapter.data = own
            self._gradients.append(gradient[: adapter.numel()].view(adapter.shape))
        self._places = [adapter.data_ptr() for adapter in self._adapters]

    @property
    def gradient(self) -> Tensor:
        assert self.parameter.grad is not None
        return self.parameter.grad

    def begin(self) -> None:
        """Gradients of zero, into which the backward passes add; transformers takes them from the adapters after every step.

        Raises RuntimeError if somebody has moved an adapter away: the optimizer would go on without it, and nobody would see.
        """
        self.gradient.zero_()
        for adapter, gradient, place in zip(self._adapters, self._gradients, self._places, strict=True):
            if adapter.data_ptr() != place:
                raise RuntimeError("an adapter is no longer part of the flat tensor that the optimizer changes")
            adapter.grad = gradient


PAGED = ("state1", "state2")
"""The states that bitsandbytes pages, one number for each of the parameter's."""


def page_again(optimizer: Any) -> None:
    """Moves the loaded states of a paged bitsandbytes optimizer to where its own `init_state` would have put them.

    The numbers stay as they are; other optimizers are left alone.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if not getattr(inner, "is_paged", False):
        return
    for parameter, state in inner.state.items():
        for name in PAGED:
            if name in state:
                buffer = inner.get_state_buffer(parameter, dtype=state[name].dtype)
                buffer.copy_(state[name])
                state[name] = buffer
