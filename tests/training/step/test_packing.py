"""Steps hold every example once and are the same on every machine; micro-batches are within the limit, few and balanced."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.training.step.packing import WINDOW_STEPS, micro_batches, share, steps_of_epoch
from finetune.training.step.sampler import StepSampler

LENGTHS = [(37 * n) % 101 + 1 for n in range(10)]  # 1, 38, 75, 11, 48, 85, 21, 58, 95, 31
some_lengths = st.lists(st.integers(1, 60), max_size=40)
few_lengths = st.lists(st.integers(1, 30), min_size=1, max_size=7)


def realistic(seed: int, count: int, longest: int = 2048) -> list[int]:
    """Lengths typical of text-to-SQL: about 310 tokens on average, one in twenty above 800."""
    draws = random.Random(seed)
    return [min(longest, max(40, int(draws.lognormvariate(5.45, 0.75)))) for _ in range(count)]


@cache
def partitions(count: int) -> list[list[list[int]]]:
    """All partitions of `count` positions into groups."""

    def extend(groups: list[list[int]], position: int) -> Iterator[list[list[int]]]:
        if position == count:
            yield [list(group) for group in groups]
            return
        for group in [*groups]:
            group.append(position)
            yield from extend(groups, position + 1)
            group.pop()
        yield from extend([*groups, [position]], position + 1)

    return list(extend([], 0))


def held(batch: list[int], lengths: list[int], padded: bool) -> int:
    inside = [lengths[position] for position in batch]
    return len(inside) * max(inside) if padded else sum(inside)


def largest(batches: list[list[int]], lengths: list[int], padded: bool) -> int:
    return max(held(batch, lengths, padded) for batch in batches)


def fewest(lengths: list[int], tokens: int, padded: bool) -> int:
    """The minimum number of micro-batches, by exhaustive search."""
    return min(len(batches) for batches in partitions(len(lengths)) if largest(batches, lengths, padded) <= tokens)


def smallest_largest(lengths: list[int], count: int, padded: bool) -> int:
    """The minimum size of the largest of `count` micro-batches, by exhaustive search."""
    return min(largest(batches, lengths, padded) for batches in partitions(len(lengths)) if len(batches) <= count)


# ---- steps


@pytest.mark.parametrize(
    ("by_length", "epoch", "steps"),
    [
        (False, 0, [[7, 5, 2], [1, 0, 3], [9, 6, 8], [4]]),
        (False, 1, [[9, 6, 2], [1, 3, 0], [8, 4, 7], [5]]),
        (True, 0, [[9, 1, 7], [2, 5, 8], [0, 3, 6], [4]]),
        (True, 1, [[7, 2, 8], [0, 3, 6], [9, 1, 4], [5]]),
    ],
)
def test_the_order_is_the_same_as_in_earlier_versions(by_length: bool, epoch: int, steps: list[list[int]]) -> None:
    assert steps_of_epoch(LENGTHS, batch_size=3, seed=17, epoch=epoch, by_length=by_length) == steps


@given(some_lengths, st.integers(1, 9), st.integers(-3, 2**70), st.integers(0, 5), st.booleans())
def test_an_epoch_holds_every_example_once(
    lengths: list[int], batch_size: int, seed: int, epoch: int, by_length: bool
) -> None:
    steps = steps_of_epoch(lengths, batch_size=batch_size, seed=seed, epoch=epoch, by_length=by_length)
    assert sorted(index for step in steps for index in step) == list(range(len(lengths)))
    assert all(len(step) == batch_size for step in steps[:-1])
    assert all(1 <= len(step) <= batch_size for step in steps[-1:])


def test_seed_and_epoch_change_the_order_independently() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        steps = steps_of_epoch([1] * 40, batch_size=8, seed=seed, epoch=epoch, by_length=False)
        return tuple(index for step in steps for index in step)

    pairs = [(seed, epoch) for seed in (-1, 0, 1, 11) for epoch in (0, 1, 2, 12)]
    assert len({order(*pair) for pair in pairs}) == len(pairs)


def test_the_global_random_state_is_neither_used_nor_changed() -> None:
    random.seed(1)
    before = random.getstate()
    first = steps_of_epoch(LENGTHS, batch_size=3, seed=17, epoch=0, by_length=True)
    assert random.getstate() == before
    random.seed(2)
    assert steps_of_epoch(LENGTHS, batch_size=3, seed=17, epoch=0, by_length=True) == first


def test_by_length_saves_padding_without_sorting_the_epoch() -> None:
    lengths = realistic(3, 3 * WINDOW_STEPS * 16 + 5)

    def steps(by_length: bool) -> list[list[int]]:
        return steps_of_epoch(lengths, batch_size=16, seed=1, epoch=0, by_length=by_length)

    def padding(of: list[list[int]]) -> float:
        return sum(held(step, lengths, padded=True) for step in of) / sum(lengths) - 1

    assert padding(steps(False)) > 1  # more padding than text
    assert padding(steps(True)) < 0.1
    longest = [max(lengths[index] for index in step) for step in steps(True)]
    turns = sum((b - a) * (c - b) < 0 for a, b, c in zip(longest, longest[1:], longest[2:], strict=False))
    assert turns > len(longest) / 2  # 2/3 in a shuffled row, 0 in a sorted one


@pytest.mark.parametrize("batch_size", [0, -1])
@pytest.mark.parametrize("by_length", [True, False])
def test_steps_of_no_examples_are_refused(batch_size: int, by_length: bool) -> None:
    with pytest.raises(ValueError, match=f"groups of {batch_size}"):
        steps_of_epoch(LENGTHS, batch_size=batch_size, seed=1, epoch=0, by_length=by_length)


def test_by_length_moves_no_example_out_of_its_window() -> None:
    lengths = realistic(4, 3 * WINDOW_STEPS * 4 + 7)

    def windows(by_length: bool) -> list[set[int]]:
        steps = steps_of_epoch(lengths, batch_size=4, seed=1, epoch=0, by_length=by_length)
        starts = range(0, len(steps), WINDOW_STEPS)
        return [{index for step in steps[start : start + WINDOW_STEPS] for index in step} for start in starts]

    assert windows(True) == windows(False)
    assert len(windows(True)) == 4


def test_a_short_last_step_is_a_random_sample() -> None:
    lengths = list(range(1, 102))
    last = [
        steps_of_epoch(lengths, batch_size=10, seed=1, epoch=epoch, by_length=True)[-1] for epoch in range(200)
    ]  # one example each, with a mean length of 51 and a standard error of 2
    assert {len(step) for step in last} == {1}
    assert 43 < sum(lengths[step[0]] for step in last) / len(last) < 59


@pytest.mark.parametrize("by_length", [True, False])
def test_the_sampler_iterates_the_epoch_that_was_set(by_length: bool) -> None:
    sampler = StepSampler(LENGTHS, batch_size=3, seed=17, by_length=by_length)
    assert len(sampler) == len(list(sampler)) == 4
    for epoch in (0, 2, 1):
        sampler.set_epoch(epoch)
        expected = steps_of_epoch(LENGTHS, batch_size=3, seed=17, epoch=epoch, by_length=by_length)
        assert list(sampler) == list(sampler) == expected


# ---- shares


@given(some_lengths, st.integers(1, 9))
def test_the_shares_of_all_ranks_make_up_the_step_and_are_balanced(lengths: list[int], ranks: int) -> None:
    shares = [share(lengths, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert sorted(position for part in shares for position in part) == list(range(len(lengths)))
    assert all(part == sorted(part) for part in shares)
    loads = [sum(lengths[position] for position in part) for part in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)


@given(few_lengths, st.integers(1, 4))
def test_the_largest_share_is_within_a_third_of_the_optimum(lengths: list[int], ranks: int) -> None:
    loads = [sum(lengths[p] for p in share(lengths, rank=rank, ranks=ranks)) for rank in range(ranks)]
    best = smallest_largest(lengths, ranks, padded=False)
    assert 3 * ranks * max(loads) <= (4 * ranks - 1) * best  # Graham's bound for longest first, 1969


def test_shares_go_longest_first_with_ties_to_the_lowest_rank() -> None:
    assert [share([5, 9, 5, 4], rank=rank, ranks=2) for rank in (0, 1)] == [[1, 3], [0, 2]]
    assert [share([7, 7], rank=rank, ranks=3) for rank in (0, 1, 2)] == [[0], [1], []]


@pytest.mark.parametrize(("rank", "ranks"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_out_of_range_is_refused(rank: int, ranks: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} of {ranks}"):
        share(LENGTHS, rank=rank, ranks=ranks)


# ---- micro-batches


@given(some_lengths, st.integers(0, 90), st.booleans())
def test_micro_batches_hold_the_step_within_the_budget(lengths: list[int], tokens: int, padded: bool) -> None:
    batches = micro_batches(lengths, tokens=tokens, padded=padded)
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    assert all(batch and batch == sorted(batch) for batch in batches)
    for batch in batches:
        assert held(batch, lengths, padded) <= tokens or len(batch) == 1
    sizes = [held(batch, lengths, padded) for batch in batches]
    assert sizes == sorted(sizes, reverse=True)
    assert micro_batches(lengths, tokens=tokens, padded=padded) == batches


@settings(max_examples=150)
@given(few_lengths, st.integers(0, 60))
def test_packed_micro_batches_are_few_and_even(lengths: list[int], more: int) -> None:
    tokens = max(lengths) + more
    batches = micro_batches(lengths, tokens=tokens)
    count = len(batches)
    assert 9 * count <= 11 * fewest(lengths, tokens, padded=False) + 6  # the bound of first-fit decreasing, Dosa 2007
    best = smallest_largest(lengths, count, padded=False)
    assert 3 * count * largest(batches, lengths, padded=False) <= (4 * count - 1) * best


@settings(max_examples=150)
@given(few_lengths, st.integers(0, 90))
def test_padded_micro_batches_are_optimal_in_number_and_balance(lengths: list[int], more: int) -> None:
    tokens = max(lengths) + more
    batches = micro_batches(lengths, tokens=tokens, padded=True)
    assert len(batches) == fewest(lengths, tokens, padded=True)
    assert largest(batches, lengths, padded=True) == smallest_largest(lengths, len(batches), padded=True)


@pytest.mark.parametrize(
    ("lengths", "tokens", "sizes"),
    [
        ([4, 5, 3, 6, 7, 2], 9, [9, 9, 9]),  # in the order of arrival: 9, 9, 7, 2
        ([9, 8, 5, 4, 3], 15, [15, 14]),  # into the emptiest that has room: three
        ([12, 10, 10, 9, 5, 4], 25, [25, 25]),  # best-fit decreasing: three; to the emptiest of two: two
        ([5, 5, 4, 4, 3, 3, 3], 10, [9, 9, 9]),  # best-fit decreasing: 10, 9, 8; to the emptiest of three: 11
        ([8, 8, 4, 2], 11, [8, 8, 6]),  # two batches hold 22 tokens, but not these examples
    ],
)
def test_packing_finds_what_simpler_methods_miss(lengths: list[int], tokens: int, sizes: list[int]) -> None:
    batches = micro_batches(lengths, tokens=tokens)
    assert [held(batch, lengths, padded=False) for batch in batches] == sizes


@pytest.mark.parametrize("padded", [True, False])
def test_no_micro_batch_is_needlessly_small(padded: bool) -> None:
    batches = micro_batches([300] * 16, tokens=2048, padded=padded)  # six fit: not 6, 6, 4
    assert [len(batch) for batch in batches] == [6, 5, 5]
    assert [len(batch) for batch in micro_batches([300] * 9, tokens=2400, padded=padded)] == [5, 4]


def test_an_example_above_the_limit_gets_its_own_micro_batch() -> None:
    assert micro_batches([50, 900, 50, 800], tokens=100) == [[1], [3], [0, 2]]
    assert micro_batches([50, 900, 50, 800], tokens=100, padded=True) == [[1], [3], [0, 2]]


def test_realistic_steps_are_packed_close_to_the_lower_bound() -> None:
    steps = [realistic(seed, 16, longest=1024) for seed in range(200)]
    packed = [micro_batches(step, tokens=1024) for step in steps]
    assert sum(map(len, packed)) <= 1.02 * sum(-(-sum(step) // 1024) for step in steps)  # is 1.0145
    bounds = [max(sum(step) / len(batches), *step) for step, batches in zip(steps, packed, strict=True)]
    pairs = zip(packed, steps, strict=True)
    assert sum(largest(batches, step, padded=False) for batches, step in pairs) <= 1.014 * sum(bounds)  # is 1.0105


@pytest.mark.parametrize("tokens", [1, 10**6])
def test_an_explicit_micro_batch_size_is_used_whatever_the_lengths(tokens: int) -> None:
    lengths = [10, 400, 30, 300, 20]
    assert micro_batches(lengths, tokens=tokens, micro_batch_size=2) == [[0, 1], [2, 3], [4]]
    assert micro_batches(lengths, tokens=tokens, micro_batch_size=2, padded=True) == [[1, 3], [2, 4], [0]]
    assert micro_batches(lengths, tokens=tokens, micro_batch_size=9) == [[0, 1, 2, 3, 4]]
    for rows in (0, -1):
        with pytest.raises(ValueError, match=f"groups of {rows}"):
            micro_batches(lengths, tokens=tokens, micro_batch_size=rows)


def test_a_step_without_examples_has_no_micro_batches() -> None:
    assert micro_batches([], tokens=100) == micro_batches([], tokens=100, padded=True) == []


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(("count", "milliseconds"), [(16, 1.0), (256, 10.0)])
def test_splitting_a_step_is_fast_compared_with_training_it(count: int, milliseconds: float, padded: bool) -> None:
    def took(lengths: list[int], tokens: int) -> float:
        began = time.perf_counter()
        micro_batches(lengths, tokens=tokens, padded=padded)
        return (time.perf_counter() - began) * 1000

    for tokens in (400, 1024, 2048, 8192):
        lengths = realistic(count, count, longest=tokens)
        assert min(took(lengths, tokens) for _ in range(5)) < milliseconds
