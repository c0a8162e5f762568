"""Successive halving: the decisions follow from the losses alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.sweep.halving import Place, Results, best, key, places, quotas, rung_steps

Losses = list[list[float | None]]
"""By trial: the loss that it has, or would have, at each rung and at the end."""
RUNGS = 3


@st.composite
def sweeps(draw: st.DrawFn) -> tuple[Losses, int]:
    loss = st.one_of(st.none(), st.sampled_from([0.5, 1.0, 1.5, 2.0]), st.floats(0, 10))
    trials = draw(st.lists(st.lists(loss, min_size=RUNGS + 1, max_size=RUNGS + 1), min_size=1, max_size=9))
    return trials, draw(st.integers(2, 4))


def run(losses: Losses, eta: int, choose: Callable[[list[int]], int]) -> tuple[Results, list[list[Place]]]:
    """A whole sweep; choose: which of the trials that may train trains next. Returns its results, and the places after each."""
    allowed, results, seen = quotas(len(losses), eta, RUNGS), dict[tuple[int, int], float | None](), list[list[Place]]()
    while ready := [
        trial for trial, place in enumerate(places(len(losses), allowed, results)) if place.standing == "next"
    ]:
        trial = choose(ready)
        rung = places(len(losses), allowed, results)[trial].rung
        results[trial, rung] = losses[trial][rung]
        seen.append(places(len(losses), allowed, results))
    return results, seen


@given(sweeps(), st.randoms(use_true_random=False))
def test_the_order_of_the_losses_changes_nothing(sweep: tuple[Losses, int], random: st.DataObject) -> None:
    losses, eta = sweep
    in_order, _ = run(losses, eta, lambda ready: ready[0])
    at_random, _ = run(losses, eta, random.choice)  # type: ignore[attr-defined]
    assert at_random == in_order
    backwards, _ = run(losses, eta, lambda ready: ready[-1])
    assert backwards == in_order


@given(sweeps(), st.randoms(use_true_random=False))
def test_it_is_what_sorting_at_each_rung_gives(sweep: tuple[Losses, int], random: st.DataObject) -> None:
    """The definition: of those at a rung, the best 1/eta with a loss go on; at equal steps the best one is never dropped."""
    losses, eta = sweep
    results, _ = run(losses, eta, random.choice)  # type: ignore[attr-defined]
    here, allowed = list(range(len(losses))), quotas(len(losses), eta, RUNGS)
    for rung in range(RUNGS + 1):
        assert sorted(trial for trial, at in results if at == rung) == sorted(here)
        finite = [trial for trial in here if losses[trial][rung] is not None]
        finite.sort(key=lambda trial: (losses[trial][rung], trial))
        if finite and rung < RUNGS:
            assert (finite[0], rung + 1) in results, "the best one goes on"
        here = finite[: allowed[rung + 1]] if rung < RUNGS else []


@given(sweeps(), st.randoms(use_true_random=False))
def test_nothing_that_was_decided_is_taken_back(sweep: tuple[Losses, int], random: st.DataObject) -> None:
    losses, eta = sweep
    _, seen = run(losses, eta, random.choice)  # type: ignore[attr-defined]
    for before, after in itertools.pairwise(seen):
        for old, new in zip(before, after, strict=True):
            if old.standing == "next":
                assert new.rung >= old.rung
            if old.standing in ("stopped", "done"):
                assert new == old
    assert all(place.standing in ("stopped", "done", "waits") for place in seen[-1])


@given(sweeps())
def test_nothing_waits_for_ever(sweep: tuple[Losses, int]) -> None:
    losses, eta = sweep
    results, seen = run(losses, eta, lambda ready: ready[0])
    if all(loss is not None for trial in losses for loss in trial):
        assert {place.standing for place in seen[-1]} <= {"stopped", "done"}
        assert sum(place.standing == "done" for place in seen[-1]) == quotas(len(losses), eta, RUNGS)[-1]
    assert best(results) is None or results[best(results)] is not None  # type: ignore[index]


def test_a_trial_goes_on_as_soon_as_it_is_certain() -> None:
    """Four trials of which two go on: with two worse ones known, the third loss decides for the best of them."""
    results: dict[tuple[int, int], float | None] = {(0, 0): 3.0, (1, 0): 1.0}
    assert [place.standing for place in places(4, (4, 2), results)] == ["waits", "waits", "next", "next"]
    results[2, 0] = 2.0
    assert places(4, (4, 2), results)[1] == Place("next", 1) and places(4, (4, 2), results)[0] == Place("stopped", 0)
    assert places(4, (4, 2), results)[2] == Place("waits", 1)


def test_a_trial_that_diverged_is_dropped_though_there_is_room() -> None:
    results: Results = {(0, 0): None, (1, 0): 9.0, (2, 0): None}
    assert places(3, (3, 2), results) == [Place("stopped", 0), Place("next", 1), Place("stopped", 0)]


def test_of_equal_losses_the_lower_number_goes_on() -> None:
    assert places(2, (2, 1), {(0, 0): 1.0, (1, 0): 1.0}) == [Place("next", 1), Place("stopped", 0)]
    assert key({(0, 0): None}, 0, 0) == (math.inf, 0)


@pytest.mark.parametrize(
    ("trials", "eta", "rungs", "expected"),
    [(6, 2, 2, (6, 3, 2)), (9, 3, 2, (9, 3, 1)), (1, 2, 1, (1, 1)), (5, 2, 0, (5,))],
)
def test_quotas(trials: int, eta: int, rungs: int, expected: tuple[int, ...]) -> None:
    assert quotas(trials, eta, rungs) == expected


@pytest.mark.parametrize(
    ("steps", "eta", "rungs", "expected"),
    [(300, 2, 2, (75, 150)), (100, 3, 2, (11, 33)), (2, 2, 2, (1,)), (1, 2, 2, ())],
)
def test_rung_steps(steps: int, eta: int, rungs: int, expected: tuple[int, ...]) -> None:
    assert rung_steps(steps, eta, rungs) == expected
