"""Where the model lives and in which dtype it computes; the compute capability decides. answering.py has that of answers."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from finetune.errors import UserError
from finetune.machine.hardware import dtype_for


@dataclass(frozen=True)
class Device:
    """Where the model lives and in which dtype it computes. quantized_in: the dtype that weights have before they become 4-bit
    ones, and that these become again; None for `dtype`."""

    place: torch.device
    dtype: torch.dtype
    quantized_in: torch.dtype | None = None

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def choose_device(torch_dtype: str) -> Device:
    """This process's GPU if there is one, and the configured dtype; `auto` depends on the compute capability.

    Raises UserError for bfloat16 on a GPU older than 8.0, and for float16 on a CPU.
    """
    capability = capability_here()
    device = torch.device("cpu") if capability is None else torch.device("cuda", _index())
    name = dtype_for(capability, torch_dtype)
    if name == "bfloat16" and capability is not None and capability < (8, 0):
        raise UserError(
            f"model.torch_dtype: bfloat16 needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}; "
            "use auto or float16",
            code="model.bad_dtype",
        )
    if name == "float16" and device.type == "cpu":
        raise UserError("model.torch_dtype: float16 does not train on a CPU; use auto", code="model.bad_dtype")
    return Device(device, getattr(torch, name))


def capability_here() -> tuple[int, int] | None:
    """The compute capability of this process's GPU; None without one."""
    return torch.cuda.get_device_capability(_index()) if torch.cuda.is_available() else None


def _index() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
