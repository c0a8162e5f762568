"""States of paged optimizers that went through a file. What only a GPU shows is in tests/models/fused/test_gpu.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.training.step.optimizer import page_again

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
    """A parameter with its optimizer after two steps, and both once more as a resume loads them: as on a GPU, the saved states
    say that they are paged."""
    one, first = paged_optimizer(torch.arange(300_000.0))
    for seed in range(2):
        step(one, first, seed)
    for name in ("state1", "state2"):
        first.state[one][name].is_paged, first.state[one][name].page_deviceid = True, 0
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    other, second = paged_optimizer(one.detach())
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    return one, first, other, second


def test_ordinary_memory_says_that_it_is_paged_after_loading(
    loaded: tuple[torch.nn.Parameter, Any, torch.nn.Parameter, Any],
) -> None:
    _, _, other, second = loaded
    assert second.state[other]["state1"].is_paged, (
        "bitsandbytes or torch drop the mark by now: is page_again still needed?"
    )


def test_states_lie_where_the_optimizer_puts_its_own_with_the_same_numbers(
    loaded: tuple[torch.nn.Parameter, Any, torch.nn.Parameter, Any],
) -> None:
    one, first, other, second = loaded
    page_again(second)
    for name in ("state1", "state2"):
        mine = second.state[other][name]
        assert not hasattr(mine, "is_paged")  # as init_state makes them without a GPU
        assert torch.equal(mine, first.state[one][name])
        assert mine.abs().max() > 0
        del first.state[one][name].is_paged
    step(one, first, 2)
    step(other, second, 2)
    assert torch.equal(one, other)


def test_a_wrapped_optimizer_is_paged_again(loaded: tuple[torch.nn.Parameter, Any, torch.nn.Parameter, Any]) -> None:
    _, _, other, second = loaded
    page_again(SimpleNamespace(optimizer=second))  # as accelerate's AcceleratedOptimizer holds it
    assert not hasattr(second.state[other]["state1"], "is_paged")


def test_other_optimizers_are_left_alone() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([parameter])
    step(parameter, optimizer, 0)
    before = dict(optimizer.state[parameter])
    page_again(optimizer)
    assert all(optimizer.state[parameter][name] is value for name, value in before.items())
