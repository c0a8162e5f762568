"""Optimizer steps in micro-batches: the same gradients for any split, running out of memory, losses that are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from finetune.estimate.fit import MicroBatchConfig  # noqa: E402
from finetune.example import Example  # noqa: E402
from finetune.models.fused.model import FusedModel  # noqa: E402
from finetune.training.step.optimizer import FlatAdapters  # noqa: E402
from finetune.training.step.runner import BAD_STEPS, FusedBackend, LossWatch, Step, Stepper, collate  # noqa: E402
from tests.helpers.errors import raises  # noqa: E402
from tests.helpers.fused_examples import LAYERS, adapters, hf_gradients, labelled, lora_model, texts, worst_error  # noqa: E402

LENGTHS = (30, 7, 12, 3, 25, 18, 9, 16)
TOKENS = sum(LENGTHS)
WHOLE = MicroBatchConfig(1000, LAYERS)


def examples(lengths: Sequence[int] = LENGTHS) -> list[Example]:
    """The first half of the texts has one label each, the others half their tokens: labels are unevenly distributed."""
    ids, _ = texts(lengths)
    return [Example(row, len(row) - 1 if i < len(ids) // 2 else max(1, len(row) // 2)) for i, row in enumerate(ids)]


def step_of(rows: list[Example]) -> Step:
    return collate(rows, rank=0, ranks=1)["step"]


class LittleMemory:
    """A backend that runs out of memory for micro-batches above `room` tokens or above `uncheckpointed` layers not recomputed.

    backward_too: it runs out only in the backward pass, when gradients of earlier layers are already written.
    """

    padded = False

    def __init__(
        self, backend: FusedBackend, *, room: int, uncheckpointed: int = LAYERS, backward_too: bool = False
    ) -> None:
        self.backend, self.room, self.uncheckpointed, self.backward_too = backend, room, uncheckpointed, backward_too
        self.seen: list[tuple[int, int]] = []

    def begin(self) -> None:
        self.backend.begin()

    def free_memory(self) -> bool:
        return self.backend.free_memory()

    def validation_loss(self, rows: Sequence[Example], count: int) -> Any:
        return self.backend.validation_loss(rows, count)

    def loss(self, rows: Sequence[Example], count: int, limits: MicroBatchConfig) -> Any:
        tokens = sum(map(len, rows))
        self.seen.append((tokens, limits.uncheckpointed_layers))
        loss = self.backend.loss(rows, count, limits)
        if tokens <= self.room and limits.uncheckpointed_layers <= self.uncheckpointed:
            return loss
        if not self.backward_too:
            raise torch.OutOfMemoryError("CUDA out of memory")

        def fail(gradient: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        parameter = next(p for name, p in adapters(self.backend.fused.model).items() if "layers.0." in name)
        handle = parameter.register_post_accumulate_grad_hook(fail)
        self._handle = handle
        return loss


class Harness:
    """A stepper over a small model, with its messages."""

    def __init__(
        self, limits: MicroBatchConfig = WHOLE, *, rows: int | None = None, dropout: float = 0.0, skips: bool = False,
        **memory: Any,
    ) -> None:  # fmt: skip
        self.model = lora_model(dropout=dropout)
        fused = FusedBackend(FusedModel(self.model, torch.float32))
        self.backend = LittleMemory(fused, **memory) if memory else None
        self.said: list[str] = []
        self.flat = FlatAdapters(list(adapters(self.model).values()))
        self.stepper = Stepper(
            self.backend or fused, limits, self.flat, micro_batch_size=rows, backward=lambda loss: loss.backward(),
            say=self.said.append, skips_bad_steps=skips,
        )  # fmt: skip

    def gradients(self) -> dict[str, Any]:
        return {name: parameter.grad.clone() for name, parameter in adapters(self.model).items()}


def undisturbed(limits: MicroBatchConfig = WHOLE) -> tuple[float, dict[str, Any]]:
    harness = Harness(limits)
    loss = harness.stepper.run(step_of(examples()))
    return loss.item(), harness.gradients()


# --- a step


@pytest.mark.parametrize(
    ("limits", "rows"),
    [
        (WHOLE, None), (MicroBatchConfig(64, 1), None), (MicroBatchConfig(30, 0), None), (MicroBatchConfig(1, 2), None),
        (WHOLE, 1), (WHOLE, 3), (WHOLE, 8),
    ],
)  # fmt: skip
def test_a_step_has_the_hf_gradients_in_any_micro_batches(limits: MicroBatchConfig, rows: int | None) -> None:
    """Normalised over the labels of the whole step: the label of a text with one label has no more weight than others."""
    harness, mine = Harness(limits, rows=rows), examples()
    ids, labels = [row.ids for row in mine], [row.labels for row in mine]
    expected_loss, expected = hf_gradients(harness.model, ids, labels)
    loss = harness.stepper.run(step_of(mine))
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert not loss.requires_grad
    assert worst_error(harness.gradients(), expected) < 1e-5
    squares = sum(float(g.square().sum()) for g in expected.values())
    assert float(harness.flat.gradient.square().sum()) == pytest.approx(squares, rel=1e-4)


@pytest.mark.parametrize("uncheckpointed_layers", [0, 2])
def test_the_number_of_uncheckpointed_layers_is_passed_to_the_model(
    uncheckpointed_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[int] = []
    original = FusedModel.loss

    def noted(self: FusedModel, *given: Any, **named: Any) -> Any:
        passed.append(named["uncheckpointed_layers"])
        return original(self, *given, **named)

    monkeypatch.setattr(FusedModel, "loss", noted)
    Harness(MicroBatchConfig(64, uncheckpointed_layers)).stepper.run(step_of(examples()))
    assert set(passed) == {uncheckpointed_layers}


def test_gradients_do_not_accumulate_over_steps() -> None:
    harness = Harness()
    harness.stepper.run(step_of(examples()))
    first = harness.gradients()
    harness.model.zero_grad()  # transformers sets the adapters' gradients to None after every step
    harness.stepper.run(step_of(examples()))
    assert worst_error(harness.gradients(), first) == 0.0


def test_a_step_uses_the_optimizers_last_update() -> None:
    harness = Harness()
    harness.stepper.run(step_of(examples()))
    with torch.no_grad():
        harness.flat.parameter.mul_(1.5)
    loss = harness.stepper.run(step_of(examples()))
    ids, labels = [row.ids for row in examples()], [row.labels for row in examples()]
    found = harness.gradients()
    harness.model.zero_grad()
    expected_loss, expected = hf_gradients(harness.model, ids, labels)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert worst_error(found, expected) < 1e-5


def test_the_validation_loss_uses_the_current_adapters() -> None:
    harness, rows = Harness(dropout=0.4), examples()
    harness.stepper.run(step_of(rows))
    with torch.no_grad():
        harness.flat.parameter.mul_(1.5)  # the optimizer's update before validation
    ids, labels = [row.ids for row in rows], [row.labels for row in rows]
    harness.model.eval()
    expected, _ = hf_gradients(harness.model, ids, labels)
    before = torch.get_rng_state()
    harness.stepper.backend.begin()
    pieces = [harness.stepper.backend.validation_loss(rows[i : i + 3], labelled(labels)) for i in (0, 3, 6)]
    assert sum(piece.item() for piece in pieces) == pytest.approx(expected, rel=1e-5)
    assert not any(piece.requires_grad for piece in pieces)
    assert torch.equal(torch.get_rng_state(), before)


def test_collate_counts_the_whole_step_on_every_rank() -> None:
    rows = examples()
    rows[0] = Example(rows[0].ids, 0)  # the first token is never predicted, so it does not count
    shares = [collate(rows, rank=rank, ranks=3)["step"] for rank in range(3)]
    assert {(step.tokens, step.labelled) for step in shares} == {(TOKENS, labelled([row.labels for row in rows]))}
    assert sorted(len(row) for step in shares for row in step.mine) == sorted(LENGTHS)


def test_a_process_without_examples_has_a_loss_and_gradients_of_zero() -> None:
    harness = Harness()
    step = collate(examples()[:1], rank=1, ranks=2)["step"]
    assert step.mine == []
    assert harness.stepper.run(step).item() == 0.0
    assert not harness.flat.gradient.any()


# --- out of memory


@pytest.mark.parametrize("backward_too", [False, True])
def test_out_of_memory_restarts_the_step_with_smaller_micro_batches(backward_too: bool) -> None:
    expected_loss, expected = undisturbed()
    harness = Harness(MicroBatchConfig(TOKENS, LAYERS), room=60, backward_too=backward_too)
    assert harness.backend is not None
    if backward_too:
        original = harness.stepper._oom_fallback

        def remove_hook(*arguments: Any, **named: Any) -> None:
            harness.backend._handle.remove()  # type: ignore[union-attr]
            original(*arguments, **named)

        harness.stepper._oom_fallback = remove_hook  # type: ignore[method-assign]
    loss = harness.stepper.run(step_of(examples()))
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)
    assert worst_error(harness.gradients(), expected) < 1e-5
    assert harness.stepper.out_of_memory == len(harness.said) >= 1
    assert harness.stepper.limits.tokens <= 60
    assert harness.stepper.limits.uncheckpointed_layers == LAYERS
    assert "out of GPU memory" in harness.said[0]
    assert f"instead of {TOKENS:,}" in harness.said[0]
    harness.stepper.run(step_of(examples()))
    assert len(harness.said) == harness.stepper.out_of_memory, (
        "the smaller micro-batches stay: there is no further message"
    )
    assert all(tokens <= 60 for tokens, _ in harness.backend.seen[-3:])


def test_out_of_memory_in_a_later_micro_batch_discards_earlier_gradients() -> None:
    _, expected = undisturbed()
    harness = Harness(MicroBatchConfig(60, LAYERS), room=60)
    backend = harness.backend
    assert backend is not None
    fail_at = [2]  # the second micro-batch, once

    class Flaky(LittleMemory):
        def loss(self, rows: Sequence[Example], count: int, limits: MicroBatchConfig) -> Any:
            loss = super().loss(rows, count, limits)
            fail_at[0] -= 1
            if fail_at[0] == 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return loss

    harness.stepper.backend = Flaky(backend.backend, room=60)
    harness.stepper.run(step_of(examples()))
    assert harness.stepper.out_of_memory == 1
    assert worst_error(harness.gradients(), expected) < 1e-5


def test_out_of_memory_halves_the_tokens() -> None:
    harness = Harness(MicroBatchConfig(TOKENS, LAYERS), room=TOKENS - 1)
    harness.stepper.run(step_of(examples()))
    assert harness.stepper.limits.tokens == TOKENS // 2


@pytest.mark.parametrize("rows", [2, 4, 8])
def test_a_micro_batch_size_of_the_config_is_reduced_too(rows: int) -> None:
    _, expected = undisturbed()
    harness = Harness(MicroBatchConfig(rows * 30, LAYERS), rows=rows, room=33)
    harness.stepper.run(step_of(examples()))
    assert harness.stepper.micro_batch_size is None
    assert 30 <= harness.stepper.limits.tokens < 60
    assert harness.backend is not None
    assert harness.backend.seen[-1][0] <= 33
    assert worst_error(harness.gradients(), expected) < 1e-5


def test_with_one_text_per_micro_batch_all_layers_are_recomputed() -> None:
    _, expected = undisturbed()
    harness = Harness(MicroBatchConfig(TOKENS, LAYERS), room=30, uncheckpointed=0)
    harness.stepper.run(step_of(examples()))
    assert harness.stepper.limits == MicroBatchConfig(30, 0)
    assert worst_error(harness.gradients(), expected) < 1e-5


@pytest.mark.parametrize("rows", [None, 1, 4])
def test_when_no_fallback_is_left_the_run_ends(rows: int | None) -> None:
    harness = Harness(MicroBatchConfig(TOKENS, LAYERS), rows=rows, room=29)
    with raises("gpu.out_of_memory", match=r"single text of 30 tokens.*model\.max_seq_length") as caught:
        harness.stepper.run(step_of(examples()))
    assert "\n" not in str(caught.value)
    assert harness.stepper.out_of_memory == len(harness.said) + 1


def test_another_error_is_not_handled_as_out_of_memory() -> None:
    harness = Harness(room=1000)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    harness.stepper.backend.loss = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="illegal"):
        harness.stepper.run(step_of(examples()))
    assert harness.stepper.out_of_memory == 0


def test_a_memory_dry_run_does_not_change_random_state_gradients_or_watch() -> None:
    harness = Harness(MicroBatchConfig(TOKENS, LAYERS), dropout=0.2, room=100)
    torch.manual_seed(3)
    torch.rand(5)
    before = torch.get_rng_state()
    harness.stepper.memory_dry_run(examples())
    assert torch.equal(torch.get_rng_state(), before)
    assert not harness.flat.gradient.any()
    assert harness.stepper.out_of_memory == len(harness.said) >= 1
    harness.stepper.watch.check()
    with raises("gpu.out_of_memory"):
        Harness(room=10).stepper.memory_dry_run(examples())


# --- losses that are not finite


def test_a_loss_that_is_not_finite_ends_the_run_one_step_later() -> None:
    harness = Harness()
    with torch.no_grad():
        harness.flat.parameter[3] = float("nan")
    assert torch.isnan(harness.stepper.run(step_of(examples())))
    with raises("training.not_finite", match=r"not finite, .*; start a new run.*learning_rate"):
        harness.stepper.run(step_of(examples()))
    assert harness.stepper.watch.bad_steps == 1


def test_if_the_scaler_skips_such_steps_ten_in_a_row_end_the_run() -> None:
    watch = LossWatch(skips_bad_steps=True)
    for finite in [False] * (BAD_STEPS - 1) + [True] + [False] * (BAD_STEPS - 1):
        watch.put(torch.tensor(1.0 if finite else float("inf")))
        watch.check()
    assert watch.bad_steps == 2 * (BAD_STEPS - 1)
    watch.put(torch.tensor(float("nan")))
    with raises("training.not_finite", match=r"10 steps in a row.*float16"):
        watch.check()


def test_a_watch_checks_each_loss_once() -> None:
    watch = LossWatch(skips_bad_steps=True)
    watch.check()
    watch.put(torch.tensor(float("nan")))
    watch.check()
    watch.check()
    assert watch.bad_steps == 1


def test_a_gradient_that_is_not_finite_ends_the_run_unless_a_scaler_skips_it() -> None:
    """Clipping divides by the infinite norm: every gradient would become zero while the loss stays finite."""
    watch = LossWatch(skips_bad_steps=False)
    watch.put(torch.tensor(1.0))
    watch.put_norm(torch.tensor(2.0))
    watch.check()
    watch.put(torch.tensor(1.0))
    watch.put_norm(torch.tensor(float("inf")))
    with raises(
        "training.not_finite", match="the gradient is not finite, .*start a new run with a lower training.learning_rate"
    ):
        watch.check()


def test_the_last_fallback_frees_the_dequantized_weights() -> None:
    harness = Harness(MicroBatchConfig(30, 0, LAYERS), room=1000)
    freed: list[bool] = []

    class Full(LittleMemory):
        def loss(self, rows: Sequence[Example], count: int, limits: MicroBatchConfig) -> Any:
            if not freed:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().loss(rows, count, limits)

        def free_memory(self) -> bool:
            freed.append(True)
            return len(freed) == 1

    assert harness.backend is not None
    harness.stepper.backend = Full(harness.backend.backend, room=1000)
    harness.stepper.run(step_of(examples()))
    assert freed == [True]
    assert harness.stepper.limits == MicroBatchConfig(30, 0, 0)


def test_an_infinite_gradient_counts_unless_a_scaler_is_searching_for_its_scale() -> None:
    for skips in (False, True):
        watch = LossWatch(skips)
        for _ in range(BAD_STEPS + 2):
            watch.put(torch.tensor(1.0))
            watch.put_norm(torch.tensor(float("inf")))
            if skips:
                watch.check()
            else:
                with raises("training.not_finite"):
                    watch.check()
        assert bool(watch.bad_steps) is not skips
