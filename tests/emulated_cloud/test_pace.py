"""How long scenarios wait on a computer that is slower than the one they were written on."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest

from tests.emulated_cloud import pace


@dataclass(frozen=True)
class Status:
    seconds: float
    code: int = 0

    def ok(self) -> Status:
        assert self.code == 0
        return self


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that have been slept; the time goes on by them alone."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(time, "monotonic", lambda: sum(slept))
    return slept


def measured(monkeypatch: pytest.MonkeyPatch, *factors: float) -> float:
    monkeypatch.setattr(pace, "PACE", pace.Pace())
    answers = [Status(factor * pace.STATUS_SECONDS) for factor in factors]
    pace.PACE.measure(lambda: answers.pop(0))
    return pace.patience(100)


def test_bounds_follow_the_shorter_of_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pace.patience(100) == 100, "before it was measured"
    assert measured(monkeypatch, 4.0, 2.0) == pytest.approx(200)
    assert measured(monkeypatch, 0.5, 0.4) == 100, "never less"
    assert measured(monkeypatch, 90.0, 80.0) == 100 * pace.MOST, "nor without end"
    with pytest.raises(AssertionError):
        pace.Pace().measure(lambda: Status(1.0, code=1))


def test_a_wait_ends_when_it_has_come_or_with_last_words(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    measured(monkeypatch, 2.0, 2.0)
    pace.wait_until(lambda: len(clock) >= 3, 10, lambda waited: "never", every=5)
    assert clock == [5, 5, 5], "longer than 10 s, because this computer is half as fast"
    clock.clear()
    with pytest.raises(AssertionError, match="not there after 20 s"):
        pace.wait_until(lambda: False, 10, lambda waited: f"not there after {waited:.0f} s", every=6)
    assert sum(clock) == 24
