"""One flat tensor for all adapters: the optimizer's results, PEFT and torch are unaffected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict  # noqa: E402
from torch.nn import Parameter  # noqa: E402

from finetune.training.step.optimizer import BLOCK, FlatAdapters  # noqa: E402
from tests.helpers.fused_examples import adapters, lora_model  # noqa: E402

SHAPES = [(6, 50), (1,), (3, 100), (256,), (16, 64), (257,)]
"""Sizes below one block, of exactly one block, of several blocks, and of one element more."""


def parameters(seed: int = 0) -> list[Any]:
    draws = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=draws)) for shape in SHAPES]


def gradients(step: int) -> list[Any]:
    draws = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=draws) * 10.0**-step for shape in SHAPES]


def train(optimizer: Callable[[list[Any]], Any], *, flat: bool, steps: int = 6) -> list[Any]:
    """The values after some steps; gradients are accumulated into the adapters, as autograd does."""
    own = parameters()
    whole = FlatAdapters(own) if flat else None
    steps_of = optimizer([whole.parameter] if whole else own)
    for step in range(steps):
        if whole:
            whole.begin()
        else:
            for parameter in own:
                parameter.grad = torch.zeros_like(parameter)
        for parameter, gradient in zip(own, gradients(step), strict=True):
            (parameter * gradient).sum().backward()
            (parameter * gradient).sum().backward()
        everything = [whole.parameter] if whole else own
        torch.nn.utils.clip_grad_norm_(everything, 1.0)
        steps_of.step()
        for parameter in own:
            parameter.grad = None  # as transformers does after every step
    return [parameter.detach().clone() for parameter in own]


def test_adamw_over_the_flat_tensor_is_adamw_over_the_adapters() -> None:
    def adamw(over: list[Any]) -> Any:
        return torch.optim.AdamW(over, lr=0.05, weight_decay=0.1)

    for ours, theirs in zip(train(adamw, flat=True), train(adamw, flat=False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
        assert ours.abs().max() > 0


def test_eight_bit_adamw_keeps_the_blocks_of_each_adapter_apart() -> None:
    """Above 4,096 elements bitsandbytes quantises optimizer states in blocks of 256, each with its own scale."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def adamw(over: list[Any]) -> Any:
        return bitsandbytes.optim.AdamW8bit(over, lr=0.05, min_8bit_size=0)

    try:
        ours, theirs = train(adamw, flat=True), train(adamw, flat=False)
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"bitsandbytes has no 8-bit AdamW on this CPU: {str(error)[:60]}")
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_adapters_start_at_blocks_and_the_padding_stays_zero() -> None:
    own = parameters()
    before = [parameter.detach().clone() for parameter in own]
    flat = FlatAdapters(own)
    assert flat.parameter.dtype == torch.float32
    start = flat.parameter.data_ptr()
    used = torch.zeros_like(flat.parameter, dtype=torch.bool)
    for parameter, old in zip(own, before, strict=True):
        assert torch.equal(parameter, old)
        offset = (parameter.data_ptr() - start) // 4
        assert offset % BLOCK == 0
        assert not used[offset : offset + parameter.numel()].any()
        used[offset : offset + parameter.numel()] = True
    assert int(used.sum()) == sum(parameter.numel() for parameter in own)
    assert not flat.parameter[~used].any()
    after = FlatAdapters(own)
    train_on = torch.optim.AdamW([after.parameter], lr=0.05, weight_decay=0.1)
    for step in range(3):
        after.begin()
        for parameter, gradient in zip(own, gradients(step), strict=True):
            (parameter * gradient).sum().backward()
        train_on.step()
    assert not after.parameter[~used].any(), (
        "what pads a block has no gradient and no value, so clipping sees the same norm"
    )


def test_begin_clears_the_gradients_of_the_last_step() -> None:
    own = parameters()
    flat = FlatAdapters(own)
    for _ in range(2):
        flat.begin()
        for parameter in own:
            (parameter * 2).sum().backward()
    for parameter in own:
        assert torch.equal(parameter.grad, torch.full_like(parameter, 2.0))
    assert flat.gradient.sum() == 2 * sum(parameter.numel() for parameter in own)
    assert flat.gradient is flat.parameter.grad


def check_views(model: Any, flat: FlatAdapters) -> None:
    """Check that writes to the flat tensor reach the modules, and that the adapters' gradients reach the flat tensor."""
    for parameter in adapters(model).values():
        before = parameter.detach().clone()
        with torch.no_grad():
            flat.parameter.add_(1.0)
        torch.testing.assert_close(parameter.detach(), before + 1.0)
        with torch.no_grad():
            flat.parameter.sub_(1.0)
    flat.begin()
    model(input_ids=torch.tensor([[1, 2, 3, 4]])).logits.square().mean().backward()
    squares = sum(float(parameter.grad.square().sum()) for parameter in adapters(model).values())
    assert squares > 0
    assert float(flat.gradient.square().sum()) == pytest.approx(squares, rel=1e-5)


def test_peft_saves_and_loads_through_the_views(tmp_path: Path) -> None:
    """With every function that transformers' resume and PEFT use: load_adapter, set_peft_model_state_dict, load_state_dict."""
    model = lora_model("qwen2", r=6, dropout=0.0)
    flat = FlatAdapters(list(adapters(model).values()))
    saved = {name: parameter.detach().clone() for name, parameter in adapters(model).items()}
    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert size < 1.5 * 4 * sum(parameter.numel() for parameter in saved.values()), "each view is saved alone"
    whole = model.state_dict()
    assert all(torch.equal(whole[name], parameter) for name, parameter in saved.items())
    state = {name: tensor.clone() for name, tensor in whole.items()}

    loads: list[Callable[[], object]] = [
        lambda: model.load_adapter(str(tmp_path), "default", is_trainable=True),
        lambda: set_peft_model_state_dict(model, load_peft_weights(str(tmp_path))),
        lambda: model.load_state_dict(state),
    ]
    for load in loads:
        with torch.no_grad():
            flat.parameter.mul_(0.3)
        load()
        assert all(torch.equal(parameter, saved[name]) for name, parameter in adapters(model).items())
        check_views(model, flat)

    plain = PeftModel.from_pretrained(lora_model("qwen2", r=6).unload(), tmp_path)
    inputs = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=inputs).logits, model.eval()(input_ids=inputs).logits)


def test_moving_the_model_to_its_own_device_keeps_the_views() -> None:
    """accelerate does so when it prepares the model."""
    model = lora_model()
    flat = FlatAdapters(list(adapters(model).values()))
    model.to("cpu")
    model.zero_grad()
    check_views(model, flat)
