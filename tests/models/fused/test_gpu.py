"""On a CUDA GPU of compute capability 8.0 or newer: in 16 bits the fused layers are no further from float32 than
Hugging Face's.

Run with `pytest -m gpu -s tests/models/fused/test_gpu.py`; it prints the errors that it compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from finetune.estimate.fit import MicroBatchConfig  # noqa: E402
from finetune.example import IGNORED, Example  # noqa: E402
from finetune.models.fused import attention, ops_torch  # noqa: E402
from finetune.models.fused.attention import Segments  # noqa: E402
from finetune.models.fused.model import FusedModel, ops_for  # noqa: E402
from finetune.training.step.optimizer import FlatAdapters, restore_paging  # noqa: E402
from finetune.training.step.runner import FusedBackend, Stepper, collate  # noqa: E402
from tests.helpers.fused_examples import (  # noqa: E402
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

CAPABLE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CAPABLE, reason="no CUDA GPU of compute capability 8.0 or newer on this machine"),
]
GPU = torch.device("cuda")
LAYERS = 4
LENGTHS = (300, 37, 700, 128, 5, 211)
SHORT = (60, 37, 9, 48)
"""Each fits one block of FlashAttention: its backward pass sums longer texts in no fixed order."""
HALF_PRECISION = [torch.bfloat16, torch.float16]


def small_mistral(dtype: Any = torch.float32, *, head_dim: int = 128, **changes: Any) -> Any:
    """Four layers of width 512. The weights are rounded to bfloat16 whatever the dtype, so that all models have the same."""
    values: dict[str, Any] = {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": LAYERS, "num_attention_heads": 512 // head_dim,
        "num_key_value_heads": 256 // head_dim, "head_dim": head_dim, "max_position_embeddings": 2048, "r": 16, "scale": 0.03,
        "attn_implementation": "sdpa",
    }  # fmt: skip
    if changes.get("nf4"):
        return lora_model(device="cuda", dtype=dtype, **(values | changes))
    model = lora_model(device="cuda", **(values | changes))
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16().to(dtype)
    return model


def total_error(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Norm of the difference of all gradients over their norm."""
    difference = torch.stack([(found[name].float() - gradient).norm() for name, gradient in expected.items()]).norm()
    return float(difference / torch.stack([gradient.norm() for gradient in expected.values()]).norm())


def on_gpu(lengths: Sequence[int] = LENGTHS) -> Any:
    return packed(*texts(lengths), GPU)


# --- attention


@pytest.mark.parametrize("dtype", HALF_PRECISION)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 2, 64), (4, 4, 128), (8, 2, 128)])
@pytest.mark.parametrize("backend", ["flash", "efficient", "loop"])
def test_every_attention_backend_gives_the_same_result(
    dtype: Any, heads: int, kv_heads: int, width: int, backend: Any
) -> None:
    """Against the loop in float64 on the same values; q, k and v are slices of one tensor, as in the layer."""
    lengths = (1, 37, 300, 128, 5, 1000)
    draws = torch.Generator("cuda").manual_seed(0)
    joined = torch.randn(sum(lengths), heads + 2 * kv_heads, width, generator=draws, device=GPU).to(dtype)
    parts = torch.split(joined, [heads, kv_heads, kv_heads], dim=1)
    d_out = torch.randn(sum(lengths), heads, width, generator=draws, device=GPU).to(dtype)
    segments = Segments.of(lengths, GPU)

    def run(backend: Any, parts: Any, d_out: Any) -> list[Any]:
        q, k, v = parts
        attended = attention.forward(q, k, v, segments, backend)
        return [attended.out, *attention.backward(d_out, q, k, v, attended, segments, backend)]

    with torch.no_grad():
        expected = run("loop", [part.double() for part in parts], d_out.double())
        found = run(backend, parts, d_out)
    limit = 4 * torch.finfo(dtype).eps
    for ours, exact in zip(found, expected, strict=True):
        assert ours.shape == exact.shape
        assert (ours.double() - exact).norm() < limit * exact.norm()


@pytest.mark.parametrize("backend", ["flash", "efficient", "loop"])
def test_another_text_changes_no_bit_of_a_texts_loss(backend: Any) -> None:
    fused = FusedModel(small_mistral(torch.bfloat16), torch.bfloat16, backend=backend)
    ids, labels = texts(LENGTHS)
    labels[2] = [IGNORED] * len(labels[2])
    with torch.no_grad():
        before = fused.loss(packed(ids, labels, GPU), uncheckpointed_layers=0, training=False)
        ids[2] = [(token + 7) % 96 for token in ids[2]]
        after = fused.loss(packed(ids, labels, GPU), uncheckpointed_layers=0, training=False)
    assert torch.equal(before, after)


# --- gradients


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_in_bfloat16_the_error_is_no_larger_than_that_of_the_hf_backend(family: str, head_dim: int) -> None:
    """Both against float32 on the same weights; the Hugging Face backend as it trains: autocast, each text alone, unpadded."""
    full, half = (small_mistral(dtype, family=family, head_dim=head_dim) for dtype in (torch.float32, torch.bfloat16))
    backends = {"triton": ops_for(GPU), "torch": ops_torch}
    layers = {name: FusedModel(half, torch.bfloat16, ops=ops) for name, ops in backends.items()}
    errors = dict.fromkeys(("hf", *backends), 0.0)
    for seed in range(3):  # one batch's rounding errors differ by 5% either way
        ids, labels = texts(LENGTHS, seed)
        _, exact = hf_gradients(full, ids, labels)
        with torch.autocast("cuda", torch.bfloat16):
            loss, hf = hf_gradients(half, ids, labels)
        errors["hf"] += total_error(hf, exact) / 3
        for name, fused in layers.items():
            ours, found = fused_gradients(half, packed(ids, labels, GPU), uncheckpointed_layers=2, fused=fused)
            assert ours == pytest.approx(loss, rel=2e-3)
            errors[name] += total_error(found, exact) / 3
    print(f"\n{family}, heads of {head_dim}, bfloat16 against float32: {errors}")
    assert 0 < errors["triton"] <= 1.05 * errors["hf"]
    assert errors["torch"] <= 1.05 * errors["hf"]


@pytest.mark.parametrize("backend", ["flash", "efficient"])
@pytest.mark.parametrize("ops", ["triton", "torch"])
def test_in_float16_with_scaled_losses_too(backend: Any, ops: str) -> None:
    """With torch's operations and the memory-efficient kernel, as on a T4 and a V100."""
    scale = 2.0**14
    ids, labels = texts(LENGTHS)
    _, exact = hf_gradients(small_mistral(), ids, labels)
    half = small_mistral(torch.float16)
    fused = FusedModel(half, torch.float16, backend=backend, ops=ops_torch if ops == "torch" else ops_for(GPU))
    (fused.loss(on_gpu(), uncheckpointed_layers=2) * scale).backward()
    found = {name: gradient / scale for name, gradient in take_gradients(half).items()}
    for row, wanted in zip(ids, labels, strict=True):
        with torch.autocast("cuda", torch.float16):
            loss = hf_loss(half, row, wanted) / labelled(labels)
        (loss * scale).backward()
    hf = {name: gradient / scale for name, gradient in take_gradients(half).items()}
    errors = {"hf": total_error(hf, exact), "fused": total_error(found, exact)}
    print(f"\nfloat16 against float32, {backend}, {ops}: {errors}")
    assert 0 < errors["fused"] <= 1.05 * errors["hf"]


def test_float16_overflow_is_skipped_by_the_scaler() -> None:
    model = small_mistral(torch.float16)
    flat = FlatAdapters(list(adapters(model).values()))
    optimizer = torch.optim.SGD([flat.parameter], lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**60)
    path = FusedBackend(FusedModel(model, torch.float16))
    stepper = Stepper(
        path, MicroBatchConfig(10_000, LAYERS), flat, micro_batch_size=None,
        backward=lambda loss: scaler.scale(loss).backward(), say=print, skips_bad_steps=True,
    )  # fmt: skip
    ids, labels = texts(LENGTHS)
    step = collate([Example(row, labels[i].count(IGNORED)) for i, row in enumerate(ids)], rank=0, ranks=1)["step"]
    before, moved = flat.parameter.detach().clone(), []
    for _ in range(50):
        assert torch.isfinite(stepper.run(step))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        moved.append(not torch.equal(flat.parameter, before))
        if moved[-1]:
            break
    assert moved[0] is False, "an infinite gradient changes nothing"
    assert moved[-1] is True, "and the scale comes down until it is none"
    assert torch.isfinite(flat.parameter).all()


@pytest.mark.parametrize("dtype", HALF_PRECISION)
@pytest.mark.parametrize("ops", ["triton", "torch"])
def test_with_dropout_a_recomputed_layer_gives_the_same_gradients(ops: str, dtype: Any) -> None:
    model = small_mistral(dtype, dropout=0.1)
    fused = FusedModel(model, dtype, ops=ops_torch if ops == "torch" else ops_for(GPU))
    batch = on_gpu(SHORT)
    loss, kept = fused_gradients(model, batch, uncheckpointed_layers=LAYERS, seed=3, fused=fused)
    again_loss, again = fused_gradients(model, batch, uncheckpointed_layers=0, seed=3, fused=fused)
    assert again_loss == loss
    assert all(torch.equal(again[name], gradient) for name, gradient in kept.items())
    _, other = fused_gradients(model, batch, uncheckpointed_layers=0, seed=4, fused=fused)
    assert total_error(other, kept) > 0.02


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("uncheckpointed_layers", [0, LAYERS])
def test_in_float32_triton_equals_the_hf_backend_under_the_same_masks(p: float, uncheckpointed_layers: int) -> None:
    """256 of 1,024 levels are 0.25 exactly."""
    model = small_mistral(dropout=p)
    ids, labels = texts((211,))
    batch = packed(ids, labels, GPU)
    fused = FusedModel(model, torch.float32, ops=ops_for(GPU))
    loss, found = fused_gradients(model, batch, uncheckpointed_layers=uncheckpointed_layers, seed=5, fused=fused)
    torch.manual_seed(5)
    if p:
        put_fixed_masks(model, fused, int(torch.randint(2**31, ())), batch, p)
    expected_loss, expected = hf_gradients(model, ids, labels)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert worst_error(found, expected) < 1e-4


# --- four bits, optimizer, memory


def test_cached_dequantized_weights_give_the_same_bits() -> None:
    model = small_mistral(torch.bfloat16, nf4=True)
    batch = on_gpu(SHORT)
    results = [
        fused_gradients(
            model, batch, uncheckpointed_layers=kept, fused=FusedModel(model, torch.bfloat16, dequantized_layers=cached)
        )
        for cached, kept in ((0, LAYERS), (LAYERS, LAYERS), (2, LAYERS), (0, 0), (LAYERS, 1))
    ]
    for loss, found in results[1:]:
        assert loss == results[0][0]
        assert all(torch.equal(found[name], gradient) for name, gradient in results[0][1].items())
    with torch.autocast("cuda", torch.bfloat16):
        _, hf = hf_gradients(model, *texts(SHORT))
    assert total_error(results[0][1], hf) < 0.05


@pytest.mark.parametrize("kind", ["AdamW8bit", "PagedAdamW8bit"])
def test_the_eight_bit_optimizer_over_the_flat_tensor_is_that_over_the_adapters(kind: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    shapes = [(16, 512), (100, 77), (512, 16), (257,), (16, 1408)]

    def train(flat: bool) -> list[Any]:
        draws = torch.Generator("cuda").manual_seed(0)
        own = [torch.nn.Parameter(torch.randn(shape, generator=draws, device=GPU)) for shape in shapes]
        whole = FlatAdapters(own) if flat else None
        over = [whole.parameter] if whole else own
        optimizer = getattr(bitsandbytes.optim, kind)(over, lr=0.01, weight_decay=0.1, min_8bit_size=0)
        for _ in range(8):
            if whole:
                whole.begin()
            else:
                optimizer.zero_grad()
            for parameter in own:
                (parameter * torch.randn(parameter.shape, generator=draws, device=GPU)).sum().backward()
            optimizer.step()
        return [parameter.detach().clone() for parameter in own]

    for ours, theirs in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["PagedAdamW8bit", "PagedAdamW32bit"])
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_paged_optimizer_states_resume_from_a_file_bit_for_bit(kind: str, where: str, tmp_path: Path) -> None:
    """transformers loads them onto the CPU for one process, and onto the GPU for several."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def optimizer_of(values: Any) -> tuple[Any, Any]:
        parameter = torch.nn.Parameter(values.clone())
        return parameter, getattr(bitsandbytes.optim, kind)([parameter], lr=0.01, min_8bit_size=0)

    def train(parameter: Any, optimizer: Any, seeds: range) -> None:
        for seed in seeds:
            draws = torch.Generator("cuda").manual_seed(seed)
            parameter.grad = torch.randn(parameter.shape, generator=draws, device=GPU)
            optimizer.step()

    whole, first = optimizer_of(torch.ones(300_000, device=GPU))
    train(whole, first, range(4))
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    resumed, second = optimizer_of(whole.detach())
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", map_location=where, weights_only=True))
    restore_paging(second)
    for name in ("state1", "state2"):
        mine, theirs = second.state[resumed][name], first.state[whole][name]
        assert mine.is_paged and mine.device == theirs.device
        assert torch.equal(mine, theirs)
    train(whole, first, range(4, 8))
    train(resumed, second, range(4, 8))
    assert torch.equal(whole, resumed)


def test_a_real_out_of_memory_error_is_survived() -> None:
    """The process may use too little memory for a step in one micro-batch; in smaller ones the gradients are the same."""
    model = small_mistral(torch.bfloat16)
    flat = FlatAdapters(list(adapters(model).values()))
    said: list[str] = []
    path = FusedBackend(FusedModel(model, torch.bfloat16))
    ids, labels = texts([300] * 64)
    step = collate([Example(row, labels[i].count(IGNORED)) for i, row in enumerate(ids)], rank=0, ranks=1)["step"]

    def stepper() -> Stepper:
        return Stepper(
            path,
            MicroBatchConfig(64 * 300, LAYERS),
            flat,
            micro_batch_size=None,
            backward=lambda loss: loss.backward(),
            say=said.append,
        )

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = stepper().run(step).item()
    expected = {name: parameter.grad.clone() for name, parameter in adapters(model).items()}
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.set_per_process_memory_fraction((before + 0.6 * (peak - before)) / total)
    try:
        cramped = stepper()
        found_loss = cramped.run(step).item()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert cramped.out_of_memory == len(said) >= 1
    print(f"\n{said}")
    assert found_loss == pytest.approx(loss, rel=1e-3)
    assert total_error({name: parameter.grad for name, parameter in adapters(model).items()}, expected) < 0.03
    assert worst_error({name: parameter.grad for name, parameter in adapters(model).items()}, expected) < 0.1
