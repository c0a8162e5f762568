"""Saved and loaded states of paged optimizers. Tests that need a GPU are in tests/models/fused/test_gpu.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.training.step.optimizer import restore_paging

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def paged_optimizer(values: torch.Tensor) -> tuple[torch.nn.Parameter, Any]:
    parameter = torch.nn.Parameter(values.clone())
    return parameter, bitsandbytes.optim.PagedAdamW32bit([parameter], lr=0.01)


def step(parameter: torch.nn.Parameter, optimizer: Any, seed: int) -> None:
    parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    optimizer.step()


@pytest.fixture
def loaded(tmp_path: Path) -> tuple[torch.nn.Parameter, Any, torch.nn.Parameter, Any]:
    """A parameter with its optimizer after two steps, and a second pair loaded from them as in a resume: as on a GPU, the saved
    states are marked as paged."""
    one, first = paged_optimizer(torch.arange(300_000.0))
    for seed in range(2):
        step(one, first, seed)
    for name in ("state1", "state2"):
        first.state[one][name].is_paged, first.state[one][name].page_deviceid = True, 0
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    other, second = paged_optimizer(one.detach())
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    return one, first, other, second


def test_after_loading_ordinary_memory_is_marked_as_paged(
    loaded: tuple[torch.nn.Parameter, Any, torch.nn.Parameter, Any],
) -> None:
    _, _, other, second = loaded
    assert second.state[other]["state1"].is_paged, (
        "bitsandbytes or torch drop the mark by now: is restore_paging still needed?"
    )


def test_states_are_moved_into_paged_memory_with_the_same_values(
    loaded: tuple[torch.nn.Parameter, Any, torch.nn.Parameter, Any],
) -> None:
    one, first, other, second = loaded
    restore_paging(second)
    for name in ("state1", "state2"):
        mine = second.state[other][name]
        assert not hasattr(mine, "is_paged")  # as init_state creates them without a GPU
        assert torch.equal(mine, first.state[one][name])
        assert mine.abs().max() > 0
        del first.state[one][name].is_paged
    step(one, first, 2)
    step(other, second, 2)
    assert torch.equal(one, other)


def test_a_wrapped_optimizer_is_paged_again(loaded: tuple[torch.nn.Parameter, Any, torch.nn.Parameter, Any]) -> None:
    _, _, other, second = loaded
    restore_paging(SimpleNamespace(optimizer=second))  # as accelerate's AcceleratedOptimizer holds it
    assert not hasattr(second.state[other]["state1"], "is_paged")


def test_other_optimizers_are_left_alone() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([parameter])
    step(parameter, optimizer, 0)
    before = dict(optimizer.state[parameter])
    restore_paging(optimizer)
    assert all(optimizer.state[parameter][name] is value for name, value in before.items())
