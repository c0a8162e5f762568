"""How long scenarios wait on a computer that is slower than the one they were written on."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.emulated_cloud import pace


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that have been slept; the time goes on by them alone."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(time, "monotonic", lambda: sum(slept))
    return slept


@pytest.fixture(autouse=True)
def new_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "PACE", pace.Pace())


def measured(*factors: float) -> float:
    looks = [factor * pace.IMPORT_SECONDS for factor in factors]
    return pace.measure(lambda: looks.pop(0))


def test_the_factor_follows_the_shorter_of_two_looks_after_one_that_does_not_count() -> None:
    assert measured(0.1, 4.0, 2.0) == pytest.approx(2.0)
    assert measured(9.0, 0.5, 0.4) == 1.0, "never less"
    assert measured(9.0, 90.0, 80.0) == pace.MOST, "nor without end"


def test_a_look_is_as_many_processes_as_environments_and_one_that_fails_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pace, "LOADING", f"import os; open(f'{tmp_path}/{{os.getpid()}}', 'w').close()")
    assert pace.load_side_by_side() > 0
    assert len(list(tmp_path.iterdir())) == pace.ENVIRONMENTS
    monkeypatch.setattr(pace, "LOADING", "raise SystemExit(3)")
    with pytest.raises(AssertionError, match=r"exit codes \[3, 3\]"):
        pace.load_side_by_side()


def test_an_environment_takes_the_factor_of_the_session_and_measures_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pace, "measure", lambda: 3.0)
    assert pace.patience(100) == 100, "before it is known"
    monkeypatch.setenv(pace.VARIABLE, "2.50")
    pace.PACE.learn()
    assert pace.patience(100) == 250
    monkeypatch.delenv(pace.VARIABLE)
    pace.PACE.learn()
    assert pace.patience(100) == 300


def test_a_budget_pays_for_starts_as_they_were_seen_here() -> None:
    pace.PACE.factor = 2.0
    most = pace.START_MARGIN
    assert pace.paid_seconds(2, 30) == pytest.approx(2 * most * 2 * pace.START_SECONDS + 60), "none was seen"
    pace.PACE.starts += [40.0, 50.0, 45.0]
    assert pace.paid_seconds(2, 30) == pytest.approx(2 * most * 50 + 60)


def test_a_wait_ends_when_it_has_come_or_with_last_words(clock: list[float]) -> None:
    pace.PACE.factor = 2.0
    pace.wait_until(lambda: len(clock) >= 3, 10, lambda waited: "never", every=5)
    assert clock == [5, 5, 5], "longer than 10 s, because this computer is half as fast"
    clock.clear()
    with pytest.raises(AssertionError, match="not there after 20 s"):
        pace.wait_until(lambda: False, 10, lambda waited: f"not there after {waited:.0f} s", every=6)
    assert sum(clock) == 24
