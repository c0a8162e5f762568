"""Aligned tables of text."""

from __future__ import annotations

import pytest

from finetune.runtime.table import aligned

ROWS = [("", "GPU", "hours"), ("1.", "A100-80GB", "2.5"), ("-", "L4", "10.0")]


@pytest.mark.parametrize(
    ("align", "expected"),
    [
        ("l", ["    GPU        hours", "1.  A100-80GB  2.5", "-   L4         10.0"]),
        ("llr", ["    GPU        hours", "1.  A100-80GB    2.5", "-   L4          10.0"]),
        ("lr", ["          GPU  hours", "1.  A100-80GB    2.5", "-          L4   10.0"]),
    ],
)
def test_columns_are_as_wide_as_their_longest_cell_and_the_last_letter_repeats(align: str, expected: list[str]) -> None:
    assert aligned(ROWS, align) == expected


def test_a_rule_stands_below_the_head_and_empty_last_cells_leave_no_blanks() -> None:
    assert aligned([("name", "note"), ("a", ""), ("b", "NULL")], rule=True) == [
        "name  note",
        "----  ----",
        "a",
        "b     NULL",
    ]


def test_rows_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        aligned([("a", "b"), ("c",)])
