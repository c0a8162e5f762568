"""The meter: the cost so far, what is left of the ceilings, and the restart reserve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.machine.price import MachinePrice
from tests.helpers.budget_run import BudgetRun
from tests.helpers.errors import raises


@pytest.fixture
def run(tmp_path: Path) -> BudgetRun:
    return BudgetRun(tmp_path)


def test_usage_counts_every_attempt_with_the_time_since_the_last_heartbeat(run: BudgetRun) -> None:
    run.past_attempt(3600.0, usd=1.8)
    run.clock.seconds = 1800.0
    meter = run.meter(usd=3.6, dollars=25.0, hours=24.0)
    spent = meter.usage()
    assert (spent.usd, spent.hours) == (pytest.approx(3.6), 1.5)
    assert spent.seconds_left == pytest.approx((25 - 3.6) / 3.6 * 3600)
    assert spent.text == (
        "$3.60 of $25.00 (measured hours x $3.6/h, catalog of 2026-11-20), 1.50 of 24 h (measured), 5.9 h left"
    )
    run.clock.seconds += 1000.0
    assert meter.usage().usd == pytest.approx(4.6)


@pytest.mark.parametrize(
    ("usd", "dollars", "hours", "text", "left"),
    [
        (None, None, None, "0.50 h (measured), no ceiling", None),
        (None, None, 1.0, "0.50 of 1 h (measured), 30.0 min left", 1800),
        (2.0, None, None, "$1.00 (measured hours x $2/h, catalog of 2026-11-20), no ceiling", None),
        (0.008, 0.01, None, "$0.004 of $0.01 (measured hours x $0.008/h, catalog of 2026-11-20), 45.0 min left", 2700),
        (2.0, 1.5, None, "$1.00 of $1.50 (measured hours x $2/h, catalog of 2026-11-20), 15.0 min left", 900),
        (2.0, 0.5, None, "$1.00 of $0.50 (measured hours x $2/h, catalog of 2026-11-20), 0 s left", -900),
        (2.0, 10.0, 0.51, "$1.00 of $10.00 (measured hours x $2/h, catalog of 2026-11-20), 0.50 of 0.51 h (measured), "
         "36 s left", 36),
    ],
)  # fmt: skip
def test_what_is_left(run: BudgetRun, usd: Any, dollars: Any, hours: Any, text: str, left: Any) -> None:
    run.clock.seconds = 1800.0
    spent = run.meter(usd, dollars, hours).usage()
    assert spent.text == text and spent.seconds_left == (None if left is None else pytest.approx(left))


def test_a_run_with_less_left_than_a_save_interval_costs_must_not_begin(run: BudgetRun) -> None:
    run.clock.seconds = 3000.0
    meter = run.meter(dollars=3.5)  # 500 s left
    assert meter.check_start(499.0) is None
    reason = meter.check_start(600.0)
    assert reason and reason.startswith("$3.00 of $3.50") and "10.0 min" in reason and "budget.max_run_usd" in reason
    assert run.meter().check_start(1e9) is None


def test_a_machine_that_may_be_preempted_must_be_able_to_pay_for_the_longest_start(run: BudgetRun) -> None:
    run.past_attempt(300.0)
    run.clock.seconds = 120.0
    meter = run.meter(dollars=2.0, restart_usd=0.5)  # 2000 s, 420 of them are used
    assert meter.check_start(1280.0) is None
    reason = meter.check_start(1281.0)
    what = "less than the 21.4 min between two checkpoints and the 5.0 min reserved for a restart after a preemption"
    assert reason and what in reason


def test_idle_time_before_a_start_is_not_in_the_restart_reserve(run: BudgetRun) -> None:
    run.clock.seconds = 7200.0
    meter = run.meter(hours=3.0, restart_usd=9.0)
    assert meter.check_start(2700.0) is None
    reason = meter.check_start(2701.0)
    assert reason and "the 15.0 min reserved for a restart" in reason


def test_a_restart_on_a_dearer_machine_is_reserved_in_dollars(run: BudgetRun) -> None:
    run.clock.seconds = 100.0
    meter = run.meter(dollars=1.0, hours=1.0, restart_usd=18.0)  # 900 s are left, 500 of them for 100 s at $18/h
    assert meter.check_start(400.0) is None
    reason = meter.check_start(401.0)
    assert reason and "the 8.3 min reserved for a restart" in reason and "raise budget.max_run_usd" in reason


def test_the_projection_uses_the_pace_of_this_attempt(run: BudgetRun) -> None:
    run.past_attempt(1000.0, usd=3.6)  # $1
    run.clock.seconds = 2000.0
    meter = run.meter(usd=3.6)  # $2 so far
    assert meter.projected_usd(0, 50, 0.0) is None
    assert meter.projected_usd(10, 40, 100.0) == pytest.approx(3.0 + 40 * 10 / 1000)
    assert meter.projected_usd(50, 0, 500.0) == pytest.approx(3.0)
    assert run.meter(usd=None).projected_usd(10, 40, 100.0) is None


def test_a_ledger_that_cannot_be_listed_refuses_the_run(run: BudgetRun) -> None:
    run.ledger.folder.write_text("a file where the folder belongs")
    with raises("disk.error", match="ledger"):
        run.meter()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 5000), st.floats(0.1, 10), st.booleans()), min_size=1, max_size=8))
def test_usage_is_the_sum_of_the_attempts(
    tmp_path_factory: pytest.TempPathFactory, attempts: list[tuple[float, float, bool]]
) -> None:
    """Killed or ended, each counts up to its last recorded second, at its own price."""
    run, usd = BudgetRun(tmp_path_factory.mktemp("run")), 0.0
    for seconds, price, killed in attempts:
        run.clock.seconds = 0.0
        meter = run.meter(usd=price)
        assert (meter.usage().usd or 0.0) == pytest.approx(usd, abs=1e-4)  # milliseconds are the ledger's smallest
        log = run.log(meter)
        log.begin(meter.time.take())
        run.clock.seconds = seconds
        log.heartbeat(meter.time.take(), None)
        run.clock.seconds += 25.0
        if not killed:
            log.end(meter.time.take(), "done", None)
        usd += (seconds if killed else seconds + 25.0) / 3600 * price
    assert run.ledger.account().usd == pytest.approx(usd, abs=1e-4)
    assert len(run.ledger.account().attempts) == len(attempts)


def test_a_newer_price_counts_from_now_on(run: BudgetRun) -> None:
    run.clock.seconds = 1000.0
    meter = run.meter(usd=3.6, dollars=3.0)
    assert meter.seconds_left() == pytest.approx(2000.0)
    assert meter.reprice(MachinePrice(7.2, "newer"), None) == 1000.0
    assert meter.usage().usd == pytest.approx(1.0), "what is past stays as it was"
    assert meter.seconds_left() == pytest.approx(1000.0)
    run.clock.seconds = 1500.0
    assert meter.usage().usd == pytest.approx(2.0)
    assert meter.usage().text.startswith("$2.00 of $3.00 (measured hours x $7.2/h from 0.28 h on, newer)")
    assert meter.projected_usd(10, 10, 500.0) == pytest.approx(3.0)
    meter.reprice(MachinePrice(0.36, "newest"), None)
    assert meter.seconds_left() == pytest.approx(10_000.0), "a price that falls, too"


def test_the_restart_reserve_follows_the_newer_prices(run: BudgetRun) -> None:
    run.clock.seconds = 100.0
    meter = run.meter(dollars=1.0, restart_usd=3.6)
    assert meter.room().reserve_seconds == pytest.approx(100.0)
    run.clock.seconds = 300.0
    meter.reprice(MachinePrice(1.8, "newer"), 7.2)
    assert meter.room().reserve_seconds == pytest.approx(400.0), (
        "the start took 100 s, and a restart may cost four times as much"
    )
    on_demand = run.meter(dollars=1.0)
    on_demand.reprice(MachinePrice(1.8, "newer"), 7.2)
    assert on_demand.room().reserve_seconds is None, "no restart, no reserve"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 5000), st.floats(0.1, 10)), min_size=1, max_size=8))
def test_the_meter_and_the_ledger_agree_whatever_prices_do(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[float, float]]
) -> None:
    run = BudgetRun(tmp_path_factory.mktemp("run"))
    meter = run.meter(usd=1.0)
    log = run.log(meter)
    log.begin(meter.time.take())
    for seconds, usd in changes:
        run.clock.seconds += seconds
        log.note(
            "price", metered_seconds=round(meter.reprice(MachinePrice(usd, "b"), None), 3), usd_per_hour=usd, basis="b"
        )
    run.clock.seconds += 100.0
    log.end(meter.time.take(), "done", None)
    assert run.ledger.account().usd == pytest.approx(meter.usage().usd, abs=1e-4)
