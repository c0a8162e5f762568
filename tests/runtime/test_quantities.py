"""Dollars and times as text."""

from __future__ import annotations

import pytest

from finetune.runtime.quantities import duration, usd_text


@pytest.mark.parametrize(
    ("usd", "text"),
    [
        (0.0, "$0.00"),
        (12.345, "$12.35"),
        (1234.5, "$1,234.50"),
        (0.4, "$0.40"),
        (0.0123, "$0.012"),
        (0.00042, "$0.00042"),
        (2e-7, "$2.0e-07"),
    ],
)
def test_small_dollars_keep_two_digits(usd: float, text: str) -> None:
    assert usd_text(usd) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0 s"), (59.4, "59 s"), (60.0, "1.0 min"), (3599.0, "60.0 min"), (21240.0, "5.9 h")]
)
def test_times_have_the_unit_that_suits_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
