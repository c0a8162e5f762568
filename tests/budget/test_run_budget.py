"""The run budget: kept on rank 0, a no-op on the other ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.budget import run_budget
from finetune.budget.ledger import Ledger
from finetune.budget.run_budget import FirstRankBudget, OtherRankBudget, RunBudget, open_budget
from finetune.machine.billed_time import MachineTime
from finetune.machine.price import MachinePrice
from finetune.run_folder import RunFolder
from finetune.runtime.stop_request import Stop
from tests.helpers.fake_clock import FakeClock
from tests.helpers.plan_examples import run_config

BUDGET = {"max_run_usd": 2.0, "max_hours": 3.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeClock:
    clock = FakeClock()
    monkeypatch.delenv("FINETUNE_PRICES", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(run_budget, "MachineTime", lambda provisioned: MachineTime(provisioned=provisioned, age=clock))
    return clock


def open_in(folder: Path, *, attempt: int = 1, step: int = 0) -> RunBudget:
    config, stop = run_config(budget=BUDGET), Stop(lambda text: None)
    return open_budget(RunFolder(folder), config, MachinePrice(3.6, "b"), stop, attempt=attempt, step=step)


def follows(budget: RunBudget, done: int, planned: int, seconds: float) -> None:
    budget.follow(lambda: (done, planned), lambda: seconds)


def test_small_dollars_are_no_zeros(tmp_path: Path, clock: FakeClock) -> None:
    first = Ledger(tmp_path / "ledger").new_attempt(1, machine={}, price=MachinePrice(0.0144, "b"), resumed_step=None)
    first.begin(1000.0)
    first.end(1000.0, "preempted", 10)
    assert open_in(tmp_path, attempt=2, step=10).short() == "$0.004 of $2.00"


def test_the_first_rank_reports_what_the_run_has_cost_and_will_cost(tmp_path: Path, clock: FakeClock) -> None:
    first = Ledger(tmp_path / "ledger").new_attempt(1, machine={}, price=MachinePrice(1.8, "b"), resumed_step=None)
    first.begin(1000.0)
    first.end(1000.0, "preempted", 10)
    budget = open_in(tmp_path, attempt=2, step=10)
    assert isinstance(budget, FirstRankBudget) and budget.short() == "$0.50 of $2.00"
    with budget.metered(hard_stop=lambda: None):
        follows(budget, 15, 30, 100.0)
        clock.seconds = 500.0  # $0.50 more; 5 steps in 100 s, and 15 are left
        series = {"spent_usd": 1.0, "ceiling_usd": 2.0, "projected_usd": 1.3, "hours_on_meter": round(1500 / 3600, 6)}
        assert budget.series() == pytest.approx(series)
        assert budget.short() == "$1.00 of $2.00, $1.30 at the end (est.)"
        budget.end("done")
    record = budget.record("done")
    assert (record["spent_usd"], record["spending"]["ceiling_usd"], record["spending"]["ceiling_hours"]) == (
        1.0,
        2.0,
        3.0,
    )
    rows = [
        (row["attempt"], row["usd"], row["from_step"], row["to_step"], row["reason"]) for row in record["attempt_log"]
    ]
    assert rows == [(1, 0.5, 0, 10, "preempted"), (2, 0.5, 10, 15, "done")]
    attempts = Ledger(tmp_path / "ledger").account().attempts
    assert [(one.seconds, one.step, one.reason) for one in attempts] == [(1000.0, 10, "preempted"), (500.0, 15, "done")]


def test_a_score_counts_towards_the_ceiling_and_is_no_attempt_of_training(tmp_path: Path, clock: FakeClock) -> None:
    """A run that was scored and then resumed, with a higher ceiling."""
    log = Ledger(tmp_path / "ledger", "evaluate").new_attempt(
        1, machine={}, price=MachinePrice(1.8, "b"), resumed_step=None
    )
    log.begin(0.0)
    log.end(1000.0, "scored", None)
    budget = open_in(tmp_path)
    assert budget.short() == "$0.50 of $2.00"
    with budget.metered(hard_stop=lambda: None):
        budget.end("done")
    (row,) = budget.record("done")["attempt_log"]
    assert (row["attempt"], row["reason"]) == (1, "done")
    assert budget.record("done")["spent_usd"] == 0.5


def test_an_attempt_that_may_not_begin_is_booked_once(tmp_path: Path, clock: FakeClock) -> None:
    clock.seconds = 1950.0
    budget = open_in(tmp_path, step=4)
    reason = budget.refusal_to_start()
    assert reason and reason.startswith("$1.95 of $2.00") and "raise budget.max_run_usd" in reason
    assert not (tmp_path / "ledger").exists()
    budget.book("budget_stop")
    budget.end("budget_stop")
    (attempt,) = Ledger(tmp_path / "ledger").account().attempts
    assert (attempt.seconds, attempt.step, attempt.reason) == (1950.0, 4, "budget_stop")
    (row,) = budget.record("budget_stop")["attempt_log"]
    assert (row["attempt"], row["started_at"]) == (1, attempt.began_at)


def test_on_other_ranks_nothing_happens(tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    def asks(*_: object, **__: Any) -> Any:
        raise AssertionError("rank 0 alone asks")

    for name in ("Ledger", "facts", "provisioned", "MachineTime", "PreemptionWatch"):
        monkeypatch.setattr(run_budget, name, asks)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    budget = open_in(tmp_path)
    assert isinstance(budget, OtherRankBudget)
    follows(budget, 5, 10, 1.0)
    with budget.metered(hard_stop=asks), budget.notices():
        budget.note("commit", step=5)
    budget.book("failed")
    budget.end("done")
    told = (budget.refusal_to_start(), budget.series(), budget.short(), budget.record("done"))
    assert told == (None, {}, "", {})
    assert not list(tmp_path.iterdir())


def test_an_attempt_that_is_kept_from_the_run_has_cost_its_start(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.seconds = 300.0
    config, price = run_config(budget=BUDGET), MachinePrice(3.6, "b")
    run_budget.book_refused(RunFolder(tmp_path), config, price)
    assert Ledger(tmp_path / "ledger").account().attempts == (), "this computer is not paid for"
    monkeypatch.setattr(run_budget, "provisioned", lambda: True)
    monkeypatch.setattr(run_budget, "facts", dict)
    run_budget.book_refused(RunFolder(tmp_path), config, None)
    assert Ledger(tmp_path / "ledger").account().attempts == ()
    run_budget.book_refused(RunFolder(tmp_path), config, price)
    (attempt,) = Ledger(tmp_path / "ledger").account().attempts
    assert attempt.reason == "refused" and attempt.usd == pytest.approx(0.3)


def test_a_preemption_that_google_announces_is_in_the_ledger(tmp_path: Path, clock: FakeClock) -> None:
    budget = open_in(tmp_path)
    assert isinstance(budget, run_budget.FirstRankBudget)
    with budget.metered(hard_stop=lambda: None):
        budget._on_notice("maintenance-event")
        budget._on_notice("preempted")
        budget.end("interrupted")
    (attempt,) = Ledger(tmp_path / "ledger").account().attempts
    assert (attempt.preempted, attempt.reason) == (True, "interrupted")
