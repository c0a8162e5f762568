"""Faults in a project's pairs are named where the user wrote them."""

from __future__ import annotations

import pytest

from finetune.init.origin import in_own_file

PLACES = ["mine.csv:2", "mine.csv:4"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("data/pairs.jsonl:2: asks the same as data/pairs.jsonl:1", "mine.csv:4: asks the same as mine.csv:2"),
        ("data/pairs.jsonl:3: gold_fails", "data/pairs.jsonl:3: gold_fails"),
        ("../other/data/pairs.jsonl:2: as data/pairs.jsonl:1", "../other/data/pairs.jsonl:2: as mine.csv:2"),
        ("/theirs/data/pairs.jsonl:1: gold_fails", "/theirs/data/pairs.jsonl:1: gold_fails"),
        ("old-data/pairs.jsonl:1: gold_fails", "old-data/pairs.jsonl:1: gold_fails"),
    ],
)
def test_the_lines_of_the_pairs_and_of_no_other_file_are_named_there(text: str, shown: str) -> None:
    assert in_own_file(text, PLACES) == shown
