"""The loss is that of the model's own logits, whatever its head does to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finetune.example import IGNORED
from finetune.models.head import has_plain_head, logits_at
from finetune.training.step.hf_backend import HfBackend, answer_loss
from tests.helpers.tiny_architectures import ARCHITECTURES, tiny_config, tiny_model_of

PLAIN = {"Llama", "windows (Mistral)", "tied weights (Gemma)", "biases (Phi)", "no SDPA (GPT-J)", "ALiBi (Bloom)",
         "attention sinks (gpt-oss)"}  # fmt: skip


def batch() -> dict[str, torch.Tensor]:
    """Three rows padded on the right, whose answers begin at different tokens."""
    ids = torch.randint(3, 120, (3, 20), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.ones_like(ids), torch.full_like(ids, IGNORED)
    mask[1, 15:], mask[2, 9:] = 0, 0
    for row, answer in enumerate((slice(12, 20), slice(10, 15), slice(5, 9))):
        labels[row, answer] = ids[row, answer]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_is_that_of_the_models_own_logits(name: str) -> None:
    model = tiny_model_of(tiny_config(name), "eager")
    assert has_plain_head(model) == (name in PLAIN)
    inputs = batch()
    reference = model(**inputs, use_cache=False).loss
    torch.testing.assert_close(answer_loss(model, inputs), reference, rtol=1e-5, atol=1e-5)


def test_trying_the_head_changes_neither_mode_nor_random_state() -> None:
    model = tiny_model_of(tiny_config("scaled logits (Cohere)"), "eager").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert not has_plain_head(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes


def test_a_model_that_cannot_keep_some_logits_only_gives_all() -> None:
    model = tiny_model_of(tiny_config("scaled logits (Cohere)"), "eager")
    inputs, forward = batch(), model.forward
    wanted = inputs["labels"] != IGNORED
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = logits_at(model, wanted, **given)

    def old(input_ids: Any = None, attention_mask: Any = None, use_cache: bool = True) -> Any:
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model.forward = old
    torch.testing.assert_close(logits_at(model, wanted, **given), expected)


@pytest.mark.parametrize(("name", "fused"), [("Llama", True), ("four multipliers (Granite)", False)])
def test_trls_head_computes_only_plain_ones(name: str, fused: bool) -> None:
    from contextlib import nullcontext

    from finetune.example import Example
    from finetune.training.objectives.sft import negative_log_likelihood

    model = tiny_model_of(tiny_config(name), "eager")
    backend = HfBackend(
        model, lambda _: batch(), torch.device("cpu"), nullcontext, negative_log_likelihood,
        fused_loss=lambda *_, **__: torch.tensor(-1.0),
    )  # fmt: skip
    loss = backend.loss([Example([1, 2, 3], 1)], 17, None)  # type: ignore[arg-type]
    assert (loss == -1) == fused
