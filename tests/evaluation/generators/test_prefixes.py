"""Prompts that begin alike are found by their token ids, whatever order they come in."""

from __future__ import annotations

import random

import pytest

from finetune.evaluation.generators.prefixes import LEAST, groups

HEAD = list(range(1000, 1000 + LEAST + 4))
"""What all prompts of a template begin with."""
SCHEMAS = [[*HEAD, *range(100 * n, 100 * n + length)] for n, length in enumerate((60, 30, 45, 90), start=1)]


def prompts_of(counts: list[int]) -> list[list[int]]:
    """For each schema so many prompts, with questions of different lengths."""
    found = [
        [*schema, 5 + n, *[7] * (n % 6)] for schema, count in zip(SCHEMAS, counts, strict=True) for n in range(count)
    ]
    random.Random(3).shuffle(found)
    return found


def test_prompts_of_one_schema_are_a_group() -> None:
    prompts = prompts_of([5, 3, 1, 8])
    found = groups(prompts)
    assert sorted(number for group in found for number in group.members) == list(range(len(prompts)))
    for group in found:
        members = [prompts[number] for number in group.members]
        assert len({tuple(prompt[: group.prefix]) for prompt in members}) == 1
        assert [len(prompt) for prompt in members] == sorted(map(len, members), reverse=True)
    prefixes = {(len(group.members), group.prefix) for group in found}
    assert prefixes == {(len_of, len(SCHEMAS[n])) for n, len_of in ((0, 5), (1, 3), (3, 8))} | {(1, 0)}
    longest = [max(len(prompts[number]) for number in group.members) for group in found]
    assert longest == sorted(longest, reverse=True)


def test_a_schema_with_one_question_takes_nothing_from_its_neighbour() -> None:
    """They share the head of the template, and the other schema's group shares much more."""
    found = groups(prompts_of([1, 1, 1, 8]))
    assert max(group.prefix for group in found) == len(SCHEMAS[3])


@pytest.mark.parametrize(
    "prompts", [[], [[1]], [[1], [1]], [[1, 2], [3, 4]], [[*range(LEAST - 1), 50], [*range(LEAST - 1), 51]]]
)
def test_short_or_few_prompts_share_nothing(prompts: list[list[int]]) -> None:
    found = groups(prompts)
    assert all(group.prefix == 0 for group in found)
    assert sorted(number for group in found for number in group.members) == list(range(len(prompts)))


def test_equal_prompts_keep_a_token_of_their_own() -> None:
    [group] = groups([HEAD, HEAD, HEAD])
    assert group.prefix == len(HEAD) - 1
    [group] = groups([HEAD, [*HEAD, 1], [*HEAD, 1]])
    assert group.prefix == len(HEAD) - 1, "a prompt may be the beginning of another"
