"""Which examples make up an optimizer step, and how it is split into micro-batches that fit the GPU.

The steps depend only on seed, epoch and lengths, so every machine learns from the same steps; the GPU only decides into how many
micro-batches a step is split. Lengths are in tokens, at least 1; positions are indices within one step.
"""

from __future__ import annotations

import heapq
import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import TypeVar

WINDOW_STEPS = 50
"""Number of steps whose examples `by_length` sorts together: enough to group similar lengths, few enough that no long part of
an epoch has only short examples."""
BALANCE_TOLERANCE = 0.005
"""Balancing stops once the largest micro-batch is at most this fraction above a lower bound for any packing."""

Batches = list[list[int]]
Item = TypeVar("Item")


def steps_of_epoch(lengths: Sequence[int], *, batch_size: int, seed: int, epoch: int, by_length: bool) -> Batches:
    """The examples (indices into lengths) of every optimizer step: batch_size each, and the remainder in the last one.

    Every index occurs once. by_length groups examples of similar length in a step, for padded batches; a last step that is
    smaller stays a random sample. Raises ValueError if batch_size is less than 1.
    """
    draws = random.Random(f"steps of seed {seed}, epoch {epoch}")
    order = _shuffled(range(len(lengths)), draws)
    steps = _groups(order, batch_size)
    if not by_length:
        return steps
    full = len(order) // batch_size
    alike: Batches = []
    for window in _groups(order[: full * batch_size], WINDOW_STEPS * batch_size):
        alike += _shuffled(_groups(sorted(window, key=lengths.__getitem__), batch_size), draws)
    return alike + steps[full:]


def share(lengths_of_step: Sequence[int], *, rank: int, ranks: int) -> list[int]:
    """The positions of a step, ascending, that process `rank` of `ranks` trains; may be empty if there are fewer examples than
    ranks.

    Longest first, each example goes to the rank with the fewest tokens so far, so that the loads of two ranks differ by at
    most the length of one example. Every process computes the same split. Raises ValueError for a rank outside 0 .. ranks - 1.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} of {ranks}")
    return sorted(_spread(_longest_first(lengths_of_step), lengths_of_step, ranks)[rank])


def micro_batches(
    lengths: Sequence[int], *, tokens: int, padded: bool = False, micro_batch_size: int | None = None
) -> Batches:
    """Split a step's positions into micro-batches of at most `tokens` tokens, the largest micro-batch first.

    The size of a micro-batch is the sum of its lengths or, if padded, rows times the longest. The packing minimises the number
    of micro-batches, then the size of the largest. An example longer than `tokens` gets a micro-batch of its own.

    micro_batch_size: a fixed number of examples instead, whatever their length: consecutive groups in the given order, or in
    order of decreasing length if padded. Raises ValueError if it is less than 1.
    """
    order = _longest_first(lengths)
    if micro_batch_size is not None:
        return [sorted(batch) for batch in _groups(order if padded else range(len(lengths)), micro_batch_size)]
    alone = sum(length > tokens for length in lengths)
    batches = (_padded if padded else _packed)(order[alone:], lengths, tokens)
    batches += [[position] for position in order[:alone]]
    return sorted(map(sorted, batches), key=lambda batch: (-_held(batch, lengths, padded), batch))


def _shuffled(items: Sequence[Item], draws: random.Random) -> list[Item]:
    """Shuffle by sorting on random keys: Python guarantees the sequence of random() across versions, but not shuffle()."""
    keys = [draws.random() for _ in items]
    return [items[number] for number in sorted(range(len(items)), key=keys.__getitem__)]


def _groups(items: Sequence[int], size: int) -> Batches:
    if size < 1:
        raise ValueError(f"groups of {size}")
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))


def _held(batch: Sequence[int], lengths: Sequence[int], padded: bool) -> int:
    held = [lengths[position] for position in batch]
    return len(held) * max(held) if padded else sum(held)


def _packed(order: Sequence[int], lengths: Sequence[int], tokens: int) -> Batches:
    """Best-fit decreasing determines the number of batches; a binary search then lowers their size while that number suffices.

    order: positions, longest first. The search over sizes is MULTIFIT by Coffman, Garey and Johnson (1978).
    """

    def loads(batches: Batches) -> list[int]:
        return sorted((sum(lengths[position] for position in batch) for batch in batches), reverse=True)

    best = _best_fit(order, lengths, tokens, most=len(order)) or []
    if len(best) < 2:
        return best
    total = sum(lengths[position] for position in order)
    while len(best) > -(-total // tokens) and loads(fewer := _spread(order, lengths, len(best) - 1))[0] <= tokens:
        best = fewer
    best = min(best, _spread(order, lengths, len(best)), key=loads)
    low, high = max(-(-total // len(best)), lengths[order[0]]), loads(best)[0]
    while high - low > BALANCE_TOLERANCE * low:
        size = (low + high) // 2
        smaller = _best_fit(order, lengths, size, most=len(best))
        if smaller is None:
            low = size + 1
        else:
            best, high = smaller, loads(smaller)[0]
    return best


def _best_fit(order: Sequence[int], lengths: Sequence[int], tokens: int, *, most: int) -> Batches | None:
    """Put each position into the fullest batch that has room for it; None if more than `most` batches would be needed."""
    batches: Batches = []
    room: list[tuple[int, int]] = []  # (tokens left, batch), ascending
    for position in order:
        length = lengths[position]
        place = bisect_left(room, (length, -1))
        if place < len(room):
            left, number = room.pop(place)
        elif len(batches) < most:
            left, number = tokens, len(batches)
            batches.append([])
        else:
            return None
        batches[number].append(position)
        insort(room, (left - length, number))
    return batches


def _spread(order: Sequence[int], lengths: Sequence[int], count: int) -> Batches:
    """Put each position into the batch with the fewest tokens so far; ties go to the first."""
    batches: Batches = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for position in order:
        load, number = loads[0]
        batches[number].append(position)
        heapq.heapreplace(loads, (load + lengths[position], number))
    return batches


def _padded(order: Sequence[int], lengths: Sequence[int], tokens: int) -> Batches:
    """Group examples of similar length: filling each batch greedily from the longest remaining example gives the minimum number
    of batches. The size is then lowered, batch by batch, as far as that number allows.

    order: positions, longest first.
    """

    def needed(start: int, size: int) -> int:
        count = 0
        while start < len(order):
            start += size // lengths[order[start]]
            count += 1
        return count

    batches: Batches = []
    start, size = 0, tokens
    for left in range(needed(0, tokens), 0, -1):
        low = lengths[order[start]]
        while low < size:
            middle = (low + size) // 2
            if needed(start, middle) <= left:
                size = middle
            else:
                low = middle + 1
        end = start + size // lengths[order[start]]
        batches.append(list(order[start:end]))
        start = end
    return batches
