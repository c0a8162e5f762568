"""Which prompts begin alike, in token ids: those of one database share its schema, which is then computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

LEAST = 16
"""Tokens. Keeping and copying a shorter beginning costs more than computing it again."""


@dataclass(frozen=True)
class Group:
    """Prompts that share their first `prefix` tokens; 0: none. members: their numbers, the longest prompt first."""

    prefix: int
    members: list[int]


def groups(prompts: Sequence[Sequence[int]]) -> list[Group]:
    """All prompts (token ids) in groups, that of the longest prompt first.

    Sorted by their ids, prompts of one schema are neighbours. A group ends where two neighbours share less than half of what
    their other neighbours do, or of what the group does. At least one token of a prompt stays outside the prefix, since its
    answer begins from there.
    """
    order = sorted(range(len(prompts)), key=lambda number: list(prompts[number]))
    shared = [_shared(prompts[left], prompts[right]) for left, right in pairwise(order)]
    found: list[Group] = []
    start = prefix = 0
    for place in range(1, len(order) + 1):
        if place < len(order):
            here, more = shared[place - 1], shared[place] if place < len(shared) else 0
            if here >= LEAST and 2 * here >= max(prefix, more):
                prefix = min(prefix, here) if place - 1 > start else here
                continue
        members = sorted(order[start:place], key=lambda number: -len(prompts[number]))
        found.append(Group(min(prefix, len(prompts[members[-1]]) - 1) if len(members) > 1 else 0, members))
        start, prefix = place, 0
    return sorted(found, key=lambda group: -len(prompts[group.members[0]]))


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two prompts have in common from their beginning on."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
