"""The processes of one run. torchrun starts one per GPU; rank 0 prints and writes files for all of them.

Without torchrun there is one rank, and everything here is a no-op that does not import torch. process_group.py connects them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")


def rank() -> int:
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def world_size() -> int:
    """How many processes train together, as set by torchrun and `accelerate launch`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def machines() -> int:
    """On how many machines they run, as torchrun says: one torchrun on each."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1")) if world_size() > 1 else 1


def is_first_here() -> bool:
    """Whether this is the first process of its machine."""
    return world_size() == 1 or os.environ.get("LOCAL_RANK", "0") == "0"


def is_rank0() -> bool:
    return rank() == 0


def barrier() -> None:
    """Wait until every rank has reached this point. (NCCL's own barrier would also wait for the GPU.)"""
    any_of(False)


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any rank. Takes a few tenths of a millisecond on one host, because it runs on the CPU."""
    return any_of_each([flag])[0]


def any_of_each(flags: Sequence[bool]) -> list[bool]:
    """`any_of` for each of several flags at once."""
    if world_size() == 1:
        return list(flags)
    import torch

    shared = torch.tensor([int(flag) for flag in flags])
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in shared]


def gather_on_rank0(value: Value) -> list[Value] | None:
    """On rank 0 the values of all ranks, in rank order; None on the others. The values must be picklable."""
    if world_size() == 1:
        return [value]
    import torch

    values: list[Any] | None = [None] * world_size() if is_rank0() else None
    torch.distributed.gather_object(value, values, dst=0)
    return values


def run_on_rank0(make: Callable[[], Value]) -> Value:
    """The result of `make`, which only rank 0 calls, on every rank. The result must be picklable."""
    if world_size() == 1:
        return make()
    import torch

    box: list[Any] = [make() if is_rank0() else None]
    torch.distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    value: Value = box[0]
    return value


def broadcast(tensor: torch.Tensor) -> None:
    """Overwrite a tensor with rank 0's."""
    if world_size() > 1:
        import torch

        torch.distributed.broadcast(tensor, src=0)


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the ranks, in place."""
    if world_size() > 1:
        import torch

        torch.distributed.all_reduce(tensor)
    return tensor


def seed_per_rank(seed: int) -> None:
    """Give each rank its own dropout masks. Rank 0 keeps the random state that it would have alone."""
    if not is_rank0():
        import torch

        torch.manual_seed(seed + rank())
