"""The fused layers against transformers and PEFT in float32 on a CPU: all adapter gradients, for models of many shapes."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from finetune.example import IGNORED  # noqa: E402
from finetune.models.fused import ops_torch  # noqa: E402
from finetune.models.fused.model import FusedModel  # noqa: E402
from tests.helpers.fused_examples import (  # noqa: E402
    CPU,
    LAYERS,
    PROJECTIONS,
    adapters,
    fused_gradients,
    hf_gradients,
    hf_loss,
    labelled,
    lora_model,
    packed,
    put_fixed_masks,
    take_gradients,
    texts,
    worst_error,
)

CLOSE = 1e-5


def check_against_hf(model: Any, *, uncheckpointed_layers: int = 1, dequantized_layers: int = 0) -> None:
    ids, labels = texts()
    expected_loss, expected = hf_gradients(model, ids, labels)
    fused = FusedModel(model, torch.float32, dequantized_layers=dequantized_layers)
    loss, found = fused_gradients(model, packed(ids, labels), uncheckpointed_layers=uncheckpointed_layers, fused=fused)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert worst_error(found, expected) < CLOSE


# --- gradients


@pytest.mark.parametrize("uncheckpointed_layers", range(LAYERS + 1))
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_gradients_are_those_of_the_hf_backend(family: str, uncheckpointed_layers: int) -> None:
    check_against_hf(lora_model(family), uncheckpointed_layers=uncheckpointed_layers)


@pytest.mark.parametrize(
    "targets", [("q_proj", "v_proj"), ("k_proj", "up_proj", "down_proj"), ("o_proj",), ("gate_proj",)]
)
@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_with_adapters_on_some_projections_only(family: str, targets: tuple[str, ...]) -> None:
    check_against_hf(lora_model(family, targets=targets))


@pytest.mark.parametrize("r", [1, 6, 16])
def test_at_other_ranks(r: int) -> None:
    check_against_hf(lora_model(r=r))


@pytest.mark.parametrize(
    "config",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"head_dim": 24},  # heads * head_dim is not the hidden size
        {"tie_word_embeddings": True},
        {"rms_norm_eps": 0.1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0,
                             "original_max_position_embeddings": 64}},
    ],
    ids=["multi-head", "multi-query", "head_dim", "tied", "eps", "theta", "yarn"],
)  # fmt: skip
def test_on_other_shapes(config: dict[str, Any]) -> None:
    check_against_hf(lora_model(**config))


def test_with_biases_on_every_projection() -> None:
    check_against_hf(lora_model("llama", attention_bias=True, mlp_bias=True))


@pytest.mark.parametrize("dequantized_layers", range(LAYERS + 1))
@pytest.mark.parametrize("uncheckpointed_layers", [0, LAYERS])
def test_on_a_four_bit_base(uncheckpointed_layers: int, dequantized_layers: int) -> None:
    check_against_hf(
        lora_model(nf4=True), uncheckpointed_layers=uncheckpointed_layers, dequantized_layers=dequantized_layers
    )


def test_a_four_bit_base_of_mixed_widths_with_biases() -> None:
    """One scratch buffer serves matrices of many sizes."""
    check_against_hf(lora_model("qwen2", nf4=True, hidden_size=128, intermediate_size=64), dequantized_layers=1)


def test_with_adapters_on_some_layers_only() -> None:
    """The first layer has none, so that nothing below the second needs a gradient."""
    check_against_hf(lora_model(lora={"layers_to_transform": [1, 2]}), uncheckpointed_layers=1)


def test_with_rank_stabilised_scaling() -> None:
    check_against_hf(lora_model(lora={"use_rslora": True}))


def test_when_the_embeddings_require_a_gradient() -> None:
    """As after PEFT's enable_input_require_grads: then the first layer has to compute an input gradient."""
    model = lora_model()
    ids, labels = texts()
    _, expected = hf_gradients(model, ids, labels)
    inputs: list[Any] = []

    def watch(module: Any, arguments: Any, output: Any) -> Any:
        inputs.append(output.detach().requires_grad_())
        return inputs[-1]

    hook = model.get_base_model().get_input_embeddings().register_forward_hook(watch)
    _, found = fused_gradients(model, packed(ids, labels))
    by_fused = torch.split(inputs.pop().grad, [len(row) for row in ids])
    assert worst_error(found, expected) < CLOSE
    for row, wanted, gradient in zip(ids, labels, by_fused, strict=True):
        if len(row) > 1:
            (hf_loss(model, row, wanted) / labelled(labels)).backward()
            alone = inputs.pop().grad[0]
            assert (gradient - alone).norm() < CLOSE * alone.norm()
    hook.remove()


def test_micro_batches_add_up_to_one() -> None:
    model = lora_model()
    ids, labels = texts((5, 17, 9, 1, 30, 12))
    count = labelled(labels)
    fused = FusedModel(model, torch.float32)
    whole_loss, whole = fused_gradients(model, packed(ids, labels), fused=fused)
    total = 0.0
    for piece in ([4], [0, 1, 3], [2, 5]):
        loss = fused.loss(packed([ids[i] for i in piece], [labels[i] for i in piece]), count, uncheckpointed_layers=2)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole_loss, rel=1e-6)
    assert worst_error(take_gradients(model), whole) < CLOSE


def test_the_optimizers_changes_are_seen_after_refresh() -> None:
    model = lora_model()
    ids, labels = texts()
    fused = FusedModel(model, torch.float32)
    with torch.no_grad():
        for parameter in adapters(model).values():
            parameter.mul_(-1.7)
    fused.refresh()
    expected_loss, expected = hf_gradients(model, ids, labels)
    loss, found = fused_gradients(model, packed(ids, labels), fused=fused)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert worst_error(found, expected) < CLOSE


# --- dropout


@pytest.mark.parametrize("targets", [PROJECTIONS, ("v_proj", "up_proj", "down_proj")])
@pytest.mark.parametrize("uncheckpointed_layers", [0, 1, LAYERS])
def test_dropout_masks_are_the_same_forwards_backwards_and_recomputed(
    uncheckpointed_layers: int, targets: tuple[str, ...]
) -> None:
    p = 0.3
    model = lora_model(dropout=p, targets=targets)
    ids, labels = texts((23,))
    batch = packed(ids, labels)
    fused = FusedModel(model, torch.float32)
    loss, found = fused_gradients(model, batch, uncheckpointed_layers=uncheckpointed_layers, seed=5, fused=fused)
    torch.manual_seed(5)
    seed = int(torch.randint(2**31, ()))
    put_fixed_masks(model, fused, seed, batch, p)
    expected_loss, expected = hf_gradients(model, ids, labels)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert worst_error(found, expected) < CLOSE


def test_layers_groups_and_micro_batches_draw_different_masks() -> None:
    model = lora_model(dropout=0.3)
    fused = FusedModel(model, torch.float32)
    ids, labels = texts((12, 9))
    seeds = []
    original = ops_torch.lora_down

    class Watched:
        """ops_torch, recording the seeds of its calls."""

        def __getattr__(self, name: str) -> Any:
            return getattr(ops_torch, name)

        def lora_down(self, x: Any, a: Any, r: int, p: float, seed: int) -> Any:
            seeds.append((seed, p))
            return original(x, a, r, p, seed)

    fused.ops = Watched()  # type: ignore[assignment]
    batch = packed(ids, labels)
    torch.manual_seed(0)
    for _ in range(3):
        fused.loss(batch, uncheckpointed_layers=LAYERS)
    assert len(seeds) == 3 * LAYERS * 4
    assert len(set(seeds)) == len(seeds)
    assert {p for _, p in seeds} == {0.3}


def test_validation_drops_nothing_and_draws_no_random_number() -> None:
    model = lora_model(dropout=0.5)
    ids, labels = texts()
    fused = FusedModel(model, torch.float32)
    before = torch.get_rng_state()
    with torch.no_grad():
        loss = fused.loss(packed(ids, labels), uncheckpointed_layers=0, training=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert not loss.requires_grad
    model.eval()
    assert loss.item() == pytest.approx(hf_gradients(model, ids, labels)[0], rel=1e-5)
    model.train()
    assert abs(fused.loss(packed(ids, labels), uncheckpointed_layers=0).item() / loss.item() - 1) > 1e-3


# --- sequences do not see each other


def losses_by_text(model: Any, ids: Any, labels: Any) -> list[float]:
    """The fused loss of each text of a packed batch, by taking the labels of all others away."""
    fused = FusedModel(model, torch.float32)
    found = []
    for chosen in range(len(ids)):
        only = [row if i == chosen else [IGNORED] * len(row) for i, row in enumerate(labels)]
        found.append(fused.loss(packed(ids, only), 1, uncheckpointed_layers=0).item())
    return found


def test_each_text_has_the_loss_that_it_has_alone() -> None:
    model = lora_model()
    ids, labels = texts((7, 21, 3, 12, 2))
    alone = [hf_loss(model, row, wanted).item() for row, wanted in zip(ids, labels, strict=True)]
    assert losses_by_text(model, ids, labels) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("changed", [0, 2, 4])
def test_changing_one_text_leaves_the_others_bit_for_bit(changed: int) -> None:
    model = lora_model()
    ids, labels = texts((7, 21, 5, 12, 6))
    inputs: list[Any] = []
    embedding = model.get_base_model().get_input_embeddings()

    def noted(*call: Any) -> Any:
        inputs.append(call[2].requires_grad_())
        return inputs[-1]

    hook = embedding.register_forward_hook(noted)
    fused = FusedModel(model, torch.float32)

    def run(rows: Any) -> tuple[list[Any], list[float]]:
        """(gradient of every text's embeddings, loss of every text)"""
        inputs.clear()
        others = [wanted if i != changed else [IGNORED] * len(wanted) for i, wanted in enumerate(labels)]
        embedded = fused.loss(packed(rows, others), 1, uncheckpointed_layers=1)
        (gradient,) = torch.autograd.grad(embedded, inputs[0])
        return list(torch.split(gradient, [len(row) for row in rows])), losses_by_text(model, rows, labels)

    before, before_losses = run(ids)
    other = [[(token + 1) % 96 for token in row] if i == changed else row for i, row in enumerate(ids)]
    after, after_losses = run(other)
    hook.remove()
    for i in range(len(ids)):
        if i == changed:
            assert not before[i].any(), "a text without labels gets no gradient from the others' loss"
            assert after_losses[i] != before_losses[i]
        else:
            assert before[i].any()
            assert torch.equal(before[i], after[i])
            assert before_losses[i] == after_losses[i]


def test_positions_begin_again_with_every_text() -> None:
    ids, labels = texts((3, 1, 4))
    assert packed(ids, labels).positions.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]


def test_a_text_that_comes_twice_has_twice_the_gradient() -> None:
    model = lora_model()
    ids, labels = texts((14,))
    one_loss, one = fused_gradients(model, packed(ids, labels))
    two_loss, two = fused_gradients(model, packed(ids * 2, labels * 2))
    assert two_loss == pytest.approx(one_loss, rel=1e-6)
    assert worst_error(two, one) < CLOSE


def test_what_a_layer_saves_is_freed_by_its_backward_pass() -> None:
    import weakref

    from finetune.models.fused.layer import Saved

    model = lora_model()
    ids, labels = texts()
    fused = FusedModel(model, torch.float32)
    alive: list[Any] = []

    original = Saved.__init__

    def noted(self: Saved, *values: Any, **named: Any) -> None:
        original(self, *values, **named)
        alive.append(weakref.ref(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saved, "__init__", noted)
        loss = fused.loss(packed(ids, labels), uncheckpointed_layers=2)
        assert [ref() is not None for ref in alive] == [False, True, True]
        loss.backward()
    assert [ref() for ref in alive] == [None] * 4  # one layer was recomputed
    assert fused.device == CPU


@pytest.mark.parametrize(("uncheckpointed_layers", "uses"), [(LAYERS, [1, 2, 2]), (1, [2, 3, 2]), (0, [2, 3, 3])])
def test_no_weight_is_dequantized_needlessly(uncheckpointed_layers: int, uses: list[int]) -> None:
    """Those of q, k and v once in the forward pass, once more if the layer is recomputed, and once for the input's gradient,
    which the first layer does not need."""
    model = lora_model()
    ids, labels = texts()
    fused = FusedModel(model, torch.float32)
    counts = [0] * LAYERS
    for layer in fused.layers:

        def counted(number: int = layer.number, weight: Any = layer.qkv.weight) -> Any:
            counts[number] += 1
            return weight()

        layer.qkv.weight = counted
    fused.loss(packed(ids, labels), uncheckpointed_layers=uncheckpointed_layers).backward()
    assert counts == uses


def test_gate_and_up_are_freed_before_attentions_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are more than half of what a layer saves, and attention's gradients need the memory."""
    import weakref

    from finetune.models.fused import attention

    made: list[Any] = []
    alive: list[int] = []
    product, backward = ops_torch.swiglu, attention.backward

    def watched(gate_up: Any) -> Any:
        made.append(weakref.ref(gate_up))
        return product(gate_up)

    def counted(*given: Any) -> Any:
        alive.append(sum(ref() is not None for ref in made))
        return backward(*given)

    monkeypatch.setattr(ops_torch, "swiglu", watched)
    monkeypatch.setattr(attention, "backward", counted)
    ids, labels = texts()
    FusedModel(lora_model(), torch.float32).loss(packed(ids, labels), uncheckpointed_layers=LAYERS).backward()
    assert len(made) >= LAYERS
    assert alive == [2, 1, 0]
