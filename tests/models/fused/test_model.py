"""The fused backend around its layers: packing, which models it supports, weights and adapters, the loss head."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from transformers import AutoModelForCausalLM, GPT2Config  # noqa: E402

from finetune.example import IGNORED  # noqa: E402
from finetune.models.fused import model as fused_model  # noqa: E402
from finetune.models.fused import ops_torch  # noqa: E402
from finetune.models.fused.model import FusedModel, ops_for, pack, unsupported_reason  # noqa: E402
from tests.helpers.fused_examples import (  # noqa: E402
    CPU,
    LAYERS,
    VOCABULARY,
    adapters,
    fused_gradients,
    hf_gradients,
    labelled,
    lora_model,
    packed,
    texts,
    worst_error,
)

# --- packing


def test_pack_puts_each_label_on_the_token_before_it() -> None:
    batch = pack([[5, 6, 7, 8], [9], [1, 2, 3]], [[IGNORED, 7, 8, IGNORED], [IGNORED], [2, IGNORED, IGNORED]], CPU)
    assert batch.ids.tolist() == [5, 6, 7, 8, 9, 1, 2, 3]
    assert batch.rows.tolist() == [1, 2, 5]
    assert batch.targets.tolist() == [7, 8, 2]  # the 9 is the first token of its text: nothing predicts it
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 0, 1, 2]
    assert batch.segments.lengths == (4, 1, 3)
    assert {t.dtype for t in (batch.ids, batch.rows, batch.targets, batch.positions)} == {torch.int64}


def test_a_batch_without_labels_has_no_loss_and_gradients_of_zero() -> None:
    model = lora_model()
    ids, labels = [[1, 2, 3], [4]], [[IGNORED] * 3, [IGNORED]]
    loss, found = fused_gradients(model, packed(ids, labels))
    assert loss == 0.0
    assert all(not gradient.any() for gradient in found.values())


# --- which models


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("nf4", [False, True])
def test_supported_models(family: str, nf4: bool) -> None:
    assert unsupported_reason(lora_model(family, nf4=nf4), 200) is None


def test_a_text_longer_than_the_attention_window_is_not_supported() -> None:
    model = lora_model(sliding_window=16)
    assert unsupported_reason(model, 16) is None
    assert unsupported_reason(model, 17) == "texts of 17 tokens are longer than the model's attention window of 16"
    ids, labels = texts((16, 5))
    _, expected = hf_gradients(model, ids, labels)  # and at the window's length transformers computes the same
    assert worst_error(fused_gradients(model, packed(ids, labels))[1], expected) < 1e-5


def test_an_unused_window_does_not_matter() -> None:
    assert unsupported_reason(lora_model("qwen2", sliding_window=16, use_sliding_window=False), 100) is None


def test_other_models_are_not_supported() -> None:
    assert (unsupported_reason(lora_model("llama", hidden_act="gelu"), 9) or "").startswith("its activation is gelu")
    assert "not a multiple of 8" in (unsupported_reason(lora_model(head_dim=12), 9) or "")
    assert (
        unsupported_reason(lora_model(targets=("q_proj", "lm_head")), 9) == "it has adapters outside the decoder layers"
    )
    assert (
        unsupported_reason(lora_model(targets=("q_proj", "embed_tokens")), 9)
        == "it has adapters outside the decoder layers"
    )


def test_another_family_is_not_supported() -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50))
    model: Any = get_peft_model(base, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    assert (
        unsupported_reason(model, 9)
        == "GPT2LMHeadModel is not one of LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM"
    )


UNSEEN = {
    "attention_dropout": lambda: lora_model("llama", attention_dropout=0.5),
    "dora": lambda: lora_model(lora={"use_dora": True}),
    "rank_pattern": lambda: lora_model(lora={"rank_pattern": {"q_proj": 8}}),
    "alpha_pattern": lambda: lora_model(lora={"alpha_pattern": {"q_proj": 1}}),
    "lora_bias": lambda: lora_model(lora={"lora_bias": True}),
    "a trained norm": lambda: lora_model(lora={"modules_to_save": ["input_layernorm"]}),
}


@pytest.mark.parametrize("which", sorted(UNSEEN))
def test_models_with_other_arithmetic_are_not_supported(which: str) -> None:
    assert unsupported_reason(UNSEEN[which](), 9) is not None


# --- weights and adapters


def test_whole_weights_are_joined_without_a_second_copy() -> None:
    model = lora_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fused = FusedModel(model, torch.float32)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    block = model.get_base_model().get_decoder().layers[1].self_attn
    joined = fused.layers[1].qkv.weight()
    assert joined.shape == (128, 64)
    for projection, start in ((block.q_proj, 0), (block.k_proj, 64), (block.v_proj, 96)):
        weight = projection.base_layer.weight
        assert weight.data_ptr() == joined[start].data_ptr()
        assert torch.equal(weight, joined[start : start + weight.shape[0]])
    assert fused.layers[1].o.weight().data_ptr() == block.o_proj.base_layer.weight.data_ptr()


def test_only_the_adapters_get_gradients_and_nothing_else_changes() -> None:
    model = lora_model("qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids, labels = texts()
    FusedModel(model, torch.float32).loss(packed(ids, labels), uncheckpointed_layers=2).backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == set(adapters(model))


def test_one_model_may_be_prepared_twice() -> None:
    model = lora_model()
    ids, labels = texts()
    first = FusedModel(model, torch.float32)
    before = fused_gradients(model, packed(ids, labels), fused=first)
    second = FusedModel(model, torch.float32)
    for fused in (first, second):
        loss, found = fused_gradients(model, packed(ids, labels), fused=fused)
        assert loss == before[0]
        assert all(torch.equal(found[name], gradient) for name, gradient in before[1].items())


def test_in_bfloat16_the_error_is_no_larger_than_that_of_the_hf_backend() -> None:
    """Against float32 gradients of the same weights, summed over all adapters; training uses autocast."""
    model = lora_model(scale=0.05, hidden_size=128, head_dim=32)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    ids, labels = texts((30, 41, 17, 25))
    _, exact = hf_gradients(model, ids, labels)
    half = copy.deepcopy(model)
    for parameter in half.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        _, hf = hf_gradients(half, ids, labels)
    fused = FusedModel(half, torch.bfloat16)
    loss = fused.loss(packed(ids, labels), uncheckpointed_layers=LAYERS)
    loss.backward()
    found = {name: parameter.grad for name, parameter in adapters(half).items()}
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}

    def error(gradients: dict[str, Any]) -> float:
        return float(torch.stack([(gradients[name] - g).norm() for name, g in exact.items()]).norm())

    size = float(torch.stack([gradient.norm() for gradient in exact.values()]).norm())
    assert 0 < error(found) < 1.1 * error(hf)
    assert error(found) < 0.03 * size


def test_ops_on_a_cpu_are_torchs() -> None:
    assert ops_for(CPU) is ops_torch


# --- the loss


def test_the_head_in_blocks_is_the_head_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_model("llama", tie_word_embeddings=True)
    ids, labels = texts((30, 17))
    fused = FusedModel(model, torch.float32)
    expected = fused_gradients(model, packed(ids, labels), fused=fused)
    for rows in (1, 7, labelled(labels), labelled(labels) - 1):
        monkeypatch.setattr(fused_model, "HEAD_ROWS", rows)
        loss, found = fused_gradients(model, packed(ids, labels), fused=fused)
        assert loss == pytest.approx(expected[0], rel=1e-6)
        assert worst_error(found, expected[1]) < 1e-5


def test_the_heads_gradient_is_cross_entropys_and_scales_with_what_comes_after() -> None:
    hidden = torch.randn(9, 16, requires_grad=True)
    weight, targets = torch.randn(VOCABULARY, 16) * 3, torch.randint(VOCABULARY, (9,))
    expected = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    (gradient,) = torch.autograd.grad(expected * 2.5, hidden)
    found = fused_model._HeadLoss.apply(hidden, weight, targets)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert (torch.autograd.grad(found * 2.5, hidden)[0] - gradient).norm() < 1e-5 * gradient.norm()


def test_the_head_is_exact_where_a_plain_exponential_would_overflow() -> None:
    hidden, weight = torch.full((1, 4), 50.0, requires_grad=True), torch.tensor([[10.0] * 4, [-10.0] * 4])
    loss = fused_model._HeadLoss.apply(hidden, weight, torch.tensor([1]))
    assert loss.item() == 4000.0
    assert torch.isfinite(torch.autograd.grad(loss, hidden)[0]).all()


def test_the_loss_is_divided_by_the_given_count_else_by_its_own_labels() -> None:
    model = lora_model()
    ids, labels = texts()
    fused = FusedModel(model, torch.float32)
    mean = fused.loss(packed(ids, labels), uncheckpointed_layers=0)
    assert fused.loss(packed(ids, labels), 7, uncheckpointed_layers=0).item() == pytest.approx(
        mean.item() * labelled(labels) / 7, rel=1e-6
    )


def test_without_gradients_nothing_is_saved() -> None:
    model = lora_model()
    ids, labels = texts()
    fused = FusedModel(model, torch.float32)
    expected = fused.loss(packed(ids, labels), uncheckpointed_layers=LAYERS)
    with torch.no_grad():
        loss = fused.loss(packed(ids, labels), uncheckpointed_layers=LAYERS)
    assert loss.item() == expected.item()
    assert loss.grad_fn is None
    with torch.inference_mode():
        assert fused.loss(packed(ids, labels), uncheckpointed_layers=0, training=False).item() == expected.item()


def test_cached_weights_are_freed_without_changing_the_loss() -> None:
    model = lora_model(nf4=True)
    fused = FusedModel(model, torch.float32, dequantized_layers=LAYERS)
    before = [group.weight().clone() for layer in fused.layers for group in layer.groups]
    assert fused.free_dequantized()
    assert not fused.free_dequantized()
    after = [group.weight().clone() for layer in fused.layers for group in layer.groups]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
