"""Whole optimizer steps in pieces: the same gradients in any pieces, and what happens when memory runs out or a loss is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from finetune.estimate.fit import Limits  # noqa: E402
from finetune.example import Example  # noqa: E402
from finetune.models.fused.model import LeanModel  # noqa: E402
from finetune.training.step.optimizer import FlatAdapters  # noqa: E402
from finetune.training.step.runner import BAD_STEPS, LeanPath, LossWatch, Step, Stepper, collate  # noqa: E402
from tests.helpers.errors import raises  # noqa: E402
from tests.helpers.lean_examples import LAYERS, adapters, labelled, lora_model, stock_gradients, texts, worst_error  # noqa: E402

LENGTHS = (30, 7, 12, 3, 25, 18, 9, 16)
TOKENS = sum(LENGTHS)
WHOLE = Limits(1000, LAYERS)


def examples(lengths: Sequence[int] = LENGTHS) -> list[Example]:
    """The first half of the texts carries one label each, the rest half their tokens: labels are spread unevenly."""
    ids, _ = texts(lengths)
    return [Example(row, len(row) - 1 if i < len(ids) // 2 else max(1, len(row) // 2)) for i, row in enumerate(ids)]


def step_of(rows: list[Example]) -> Step:
    return collate(rows, rank=0, ranks=1)["step"]


class Cramped:
    """A path with so little memory that micro-batches above `room` tokens (or with kept layers above `kept`) run out of it.

    backward_too: it shows in the backward pass only, when earlier layers' gradients are written already.
    """

    padded = False

    def __init__(self, path: LeanPath, *, room: int, kept: int = LAYERS, backward_too: bool = False) -> None:
        self.path, self.room, self.kept, self.backward_too = path, room, kept, backward_too
        self.seen: list[tuple[int, int]] = []

    def begin(self) -> None:
        self.path.begin()

    def spare(self) -> bool:
        return self.path.spare()

    def validation_loss(self, rows: Sequence[Example], count: int) -> Any:
        return self.path.validation_loss(rows, count)

    def loss(self, rows: Sequence[Example], count: int, limits: Limits) -> Any:
        tokens = sum(map(len, rows))
        self.seen.append((tokens, limits.kept_layers))
        loss = self.path.loss(rows, count, limits)
        if tokens <= self.room and limits.kept_layers <= self.kept:
            return loss
        if not self.backward_too:
            raise torch.OutOfMemoryError("CUDA out of memory")

        def fail(gradient: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        parameter = next(p for name, p in adapters(self.path.lean.model).items() if "layers.0." in name)
        handle = parameter.register_post_accumulate_grad_hook(fail)
        self._handle = handle
        return loss


class Bench:
    """A stepper over a small model, with what it said."""

    def __init__(
        self, limits: Limits = WHOLE, *, rows: int | None = None, dropout: float = 0.0, skips: bool = False,
        **cramped: Any,
    ) -> None:  # fmt: skip
        self.model = lora_model(dropout=dropout)
        lean = LeanPath(LeanModel(self.model, torch.float32))
        self.path = Cramped(lean, **cramped) if cramped else None
        self.said: list[str] = []
        self.flat = FlatAdapters(list(adapters(self.model).values()))
        self.stepper = Stepper(
            self.path or lean, limits, self.flat, rows=rows, backward=lambda loss: loss.backward(), say=self.said.append,
            skips_bad_steps=skips,
        )  # fmt: skip

    def gradients(self) -> dict[str, Any]:
        return {name: parameter.grad.clone() for name, parameter in adapters(self.model).items()}


def undisturbed(limits: Limits = WHOLE) -> tuple[float, dict[str, Any]]:
    bench = Bench(limits)
    loss = bench.stepper.run(step_of(examples()))
    return loss.item(), bench.gradients()


# --- a step


@pytest.mark.parametrize(
    ("limits", "rows"),
    [
        (WHOLE, None), (Limits(64, 1), None), (Limits(30, 0), None), (Limits(1, 2), None), (WHOLE, 1), (WHOLE, 3),
        (WHOLE, 8),
    ],
)  # fmt: skip
def test_a_step_has_the_stock_gradients_in_any_micro_batches(limits: Limits, rows: int | None) -> None:
    """Over the labels of the whole step: those of a text with one label weigh no more than others."""
    bench, mine = Bench(limits, rows=rows), examples()
    ids, labels = [row.ids for row in mine], [row.labels for row in mine]
    expected_loss, expected = stock_gradients(bench.model, ids, labels)
    loss = bench.stepper.run(step_of(mine))
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert not loss.requires_grad
    assert worst_error(bench.gradients(), expected) < 1e-5
    squares = sum(float(g.square().sum()) for g in expected.values())
    assert float(bench.flat.gradient.square().sum()) == pytest.approx(squares, rel=1e-4)


@pytest.mark.parametrize("kept_layers", [0, 2])
def test_as_many_layers_are_kept_as_the_limits_say(kept_layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = LeanModel.loss

    def noted(self: LeanModel, *given: Any, **named: Any) -> Any:
        asked.append(named["kept_layers"])
        return original(self, *given, **named)

    monkeypatch.setattr(LeanModel, "loss", noted)
    Bench(Limits(64, kept_layers)).stepper.run(step_of(examples()))
    assert set(asked) == {kept_layers}


def test_steps_do_not_add_up() -> None:
    bench = Bench()
    bench.stepper.run(step_of(examples()))
    first = bench.gradients()
    bench.model.zero_grad()  # transformers takes the adapters' gradients away after every step
    bench.stepper.run(step_of(examples()))
    assert worst_error(bench.gradients(), first) == 0.0


def test_a_step_sees_the_optimizers_last_change() -> None:
    bench = Bench()
    bench.stepper.run(step_of(examples()))
    with torch.no_grad():
        bench.flat.parameter.mul_(1.5)
    loss = bench.stepper.run(step_of(examples()))
    ids, labels = [row.ids for row in examples()], [row.labels for row in examples()]
    found = bench.gradients()
    bench.model.zero_grad()
    expected_loss, expected = stock_gradients(bench.model, ids, labels)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert worst_error(found, expected) < 1e-5


def test_the_validation_loss_is_that_of_the_adapters_as_they_are() -> None:
    bench, rows = Bench(dropout=0.4), examples()
    bench.stepper.run(step_of(rows))
    with torch.no_grad():
        bench.flat.parameter.mul_(1.5)  # the optimizer's step, after which validation comes
    ids, labels = [row.ids for row in rows], [row.labels for row in rows]
    bench.model.eval()
    expected, _ = stock_gradients(bench.model, ids, labels)
    before = torch.get_rng_state()
    bench.stepper.path.begin()
    pieces = [bench.stepper.path.validation_loss(rows[i : i + 3], labelled(labels)) for i in (0, 3, 6)]
    assert sum(piece.item() for piece in pieces) == pytest.approx(expected, rel=1e-5)
    assert not any(piece.requires_grad for piece in pieces)
    assert torch.equal(torch.get_rng_state(), before)


def test_collate_counts_the_whole_step_on_every_rank() -> None:
    rows = examples()
    rows[0] = Example(rows[0].ids, 0)  # no token comes before it, so none predicts it: it does not count
    shares = [collate(rows, rank=rank, ranks=3)["step"] for rank in range(3)]
    assert {(step.tokens, step.labelled) for step in shares} == {(TOKENS, labelled([row.labels for row in rows]))}
    assert sorted(len(row) for step in shares for row in step.mine) == sorted(LENGTHS)


def test_a_process_without_questions_has_a_loss_and_gradients_of_zero() -> None:
    bench = Bench()
    step = collate(examples()[:1], rank=1, ranks=2)["step"]
    assert step.mine == []
    assert bench.stepper.run(step).item() == 0.0
    assert not bench.flat.gradient.any()


# --- out of memory


@pytest.mark.parametrize("backward_too", [False, True])
def test_out_of_memory_begins_the_step_again_in_smaller_pieces(backward_too: bool) -> None:
    expected_loss, expected = undisturbed()
    bench = Bench(Limits(TOKENS, LAYERS), room=60, backward_too=backward_too)
    assert bench.path is not None
    if backward_too:
        original = bench.stepper._shrink

        def mend(*arguments: Any, **named: Any) -> None:
            bench.path._handle.remove()  # type: ignore[union-attr]
            original(*arguments, **named)

        bench.stepper._shrink = mend  # type: ignore[method-assign]
    loss = bench.stepper.run(step_of(examples()))
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)
    assert worst_error(bench.gradients(), expected) < 1e-5
    assert bench.stepper.out_of_memory == len(bench.said) >= 1
    assert bench.stepper.limits.tokens <= 60
    assert bench.stepper.limits.kept_layers == LAYERS
    assert "out of GPU memory" in bench.said[0]
    assert f"instead of {TOKENS:,}" in bench.said[0]
    bench.stepper.run(step_of(examples()))
    assert len(bench.said) == bench.stepper.out_of_memory, "the smaller pieces stay: nothing is said again"
    assert all(tokens <= 60 for tokens, _ in bench.path.seen[-3:])


def test_out_of_memory_in_a_later_micro_batch_keeps_nothing_of_the_earlier_ones() -> None:
    _, expected = undisturbed()
    bench = Bench(Limits(60, LAYERS), room=60)
    path = bench.path
    assert path is not None
    fail_at = [2]  # the second micro-batch, once

    class Flaky(Cramped):
        def loss(self, rows: Sequence[Example], count: int, limits: Limits) -> Any:
            loss = super().loss(rows, count, limits)
            fail_at[0] -= 1
            if fail_at[0] == 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return loss

    bench.stepper.path = Flaky(path.path, room=60)
    bench.stepper.run(step_of(examples()))
    assert bench.stepper.out_of_memory == 1
    assert worst_error(bench.gradients(), expected) < 1e-5


def test_out_of_memory_halves_the_tokens() -> None:
    bench = Bench(Limits(TOKENS, LAYERS), room=TOKENS - 1)
    bench.stepper.run(step_of(examples()))
    assert bench.stepper.limits.tokens == TOKENS // 2


@pytest.mark.parametrize("rows", [2, 4, 8])
def test_a_number_of_rows_gives_way_too(rows: int) -> None:
    _, expected = undisturbed()
    bench = Bench(Limits(rows * 30, LAYERS), rows=rows, room=33)
    bench.stepper.run(step_of(examples()))
    assert bench.stepper.rows is None
    assert 30 <= bench.stepper.limits.tokens < 60
    assert bench.path is not None
    assert bench.path.seen[-1][0] <= 33
    assert worst_error(bench.gradients(), expected) < 1e-5


def test_with_one_text_alone_all_layers_are_computed_again() -> None:
    _, expected = undisturbed()
    bench = Bench(Limits(TOKENS, LAYERS), room=30, kept=0)
    bench.stepper.run(step_of(examples()))
    assert bench.stepper.limits == Limits(30, 0)
    assert worst_error(bench.gradients(), expected) < 1e-5


@pytest.mark.parametrize("rows", [None, 1, 4])
def test_when_nothing_is_left_to_give_the_run_ends(rows: int | None) -> None:
    bench = Bench(Limits(TOKENS, LAYERS), rows=rows, room=29)
    with raises("gpu.out_of_memory", match=r"single text of 30 tokens.*model\.max_seq_length") as caught:
        bench.stepper.run(step_of(examples()))
    assert "\n" not in str(caught.value)
    assert bench.stepper.out_of_memory == len(bench.said) + 1


def test_another_error_is_not_taken_for_want_of_memory() -> None:
    bench = Bench(room=1000)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    bench.stepper.path.loss = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="illegal"):
        bench.stepper.run(step_of(examples()))
    assert bench.stepper.out_of_memory == 0


def test_a_rehearsal_leaves_random_state_gradients_and_watch_as_they_were() -> None:
    bench = Bench(Limits(TOKENS, LAYERS), dropout=0.2, room=100)
    torch.manual_seed(3)
    torch.rand(5)
    before = torch.get_rng_state()
    bench.stepper.rehearse(examples())
    assert torch.equal(torch.get_rng_state(), before)
    assert not bench.flat.gradient.any()
    assert bench.stepper.out_of_memory == len(bench.said) >= 1
    bench.stepper.watch.check()
    with raises("gpu.out_of_memory"):
        Bench(room=10).stepper.rehearse(examples())


# --- losses that are no numbers


def test_a_loss_that_is_no_number_ends_the_run_one_step_later() -> None:
    bench = Bench()
    with torch.no_grad():
        bench.flat.parameter[3] = float("nan")
    assert torch.isnan(bench.stepper.run(step_of(examples())))
    with raises("training.not_finite", match=r"not finite; resume from the last checkpoint.*learning_rate"):
        bench.stepper.run(step_of(examples()))
    assert bench.stepper.watch.bad_steps == 1


def test_where_the_scaler_skips_such_steps_ten_in_a_row_end_the_run() -> None:
    watch = LossWatch(skips_bad_steps=True)
    for finite in [False] * (BAD_STEPS - 1) + [True] + [False] * (BAD_STEPS - 1):
        watch.put(torch.tensor(1.0 if finite else float("inf")))
        watch.check()
    assert watch.bad_steps == 2 * (BAD_STEPS - 1)
    watch.put(torch.tensor(float("nan")))
    with raises("training.not_finite", match=r"10 steps in a row.*float16"):
        watch.check()


def test_a_watch_looks_at_each_loss_once() -> None:
    watch = LossWatch(skips_bad_steps=True)
    watch.check()
    watch.put(torch.tensor(float("nan")))
    watch.check()
    watch.check()
    assert watch.bad_steps == 1


def test_a_gradient_that_is_none_ends_the_run_where_no_scaler_skips_it() -> None:
    """Clipping would divide by an infinite norm: every gradient becomes zero, and the loss stays finite."""
    watch = LossWatch(skips_bad_steps=False)
    watch.put(torch.tensor(1.0))
    watch.put_norm(torch.tensor(2.0))
    watch.check()
    watch.put(torch.tensor(1.0))
    watch.put_norm(torch.tensor(float("inf")))
    with raises("training.not_finite", match="the gradient is not finite"):
        watch.check()


def test_the_last_that_a_step_gives_up_are_unpacked_weights() -> None:
    bench = Bench(Limits(30, 0, LAYERS), room=1000)
    spared: list[bool] = []

    class Full(Cramped):
        def loss(self, rows: Sequence[Example], count: int, limits: Limits) -> Any:
            if not spared:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().loss(rows, count, limits)

        def spare(self) -> bool:
            spared.append(True)
            return len(spared) == 1

    assert bench.path is not None
    bench.stepper.path = Full(bench.path.path, room=1000)
    bench.stepper.run(step_of(examples()))
    assert spared == [True]
    assert bench.stepper.limits == Limits(30, 0, 0)


def test_an_infinite_gradient_counts_unless_a_scaler_is_looking_for_its_scale() -> None:
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
