"""The daily look at the price while an attempt runs: never in the way, and it stops a machine that has become too dear."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune.budget import price_watch, run_budget
from finetune.budget.ledger import Ledger
from finetune.budget.price_watch import LOOK_SECONDS, LOOK_VARIABLE, PriceWatch, look_seconds
from finetune.budget.run_budget import FirstRankBudget
from finetune.machine.billed_time import MachineTime
from finetune.machine.price import MachinePrice, TooDear
from finetune.run_folder import RunFolder
from finetune.runtime.stop_request import Stop
from tests.helpers.budget_run import BudgetRun
from tests.helpers.errors import raises
from tests.helpers.plan_examples import run_config

DAY = 600.0
"""Seconds between two looks here: a real day has 2,880 heartbeats."""


class Prices:
    """What the machine knows of its price; `looks` are the prices that the next looks find, None for a look that fails."""

    def __init__(self) -> None:
        self.price, self.ceiling, self.dearest = 3.6, 10.0, 3.6
        self.looks: list[float | None] = []
        self.looked = 0

    def look(self, say: Callable[[str], None]) -> None:
        self.looked += 1
        newest = self.looks.pop(0) if self.looks else self.price
        if newest is None:
            say("prices: not fetched")
        else:
            self.price = newest

    def machine_price(self) -> MachinePrice:
        return MachinePrice(self.price, f"look {self.looked}")

    def too_dear(self) -> TooDear | None:
        return TooDear("above max_hourly_cost", False) if self.price > self.ceiling else None


@pytest.fixture
def prices(monkeypatch: pytest.MonkeyPatch) -> Prices:
    prices = Prices()
    monkeypatch.setenv(LOOK_VARIABLE, str(DAY))
    for name in ("machine_price", "too_dear"):
        monkeypatch.setattr(price_watch, name, getattr(prices, name))
    monkeypatch.setattr(price_watch, "dearest_usd_per_hour", lambda: prices.dearest)
    return prices


@pytest.fixture
def run(tmp_path: Path) -> Iterator[BudgetRun]:
    run = BudgetRun(tmp_path)
    yield run
    run.close()


def watch(run: BudgetRun, prices: Prices) -> PriceWatch:
    """On an attempt that has begun, in the threads of its watchdog."""
    meter = run.meter(usd=prices.price, dollars=1000.0)
    watchdog = run.watch(meter)
    found = PriceWatch(
        meter,
        note=watchdog.note,
        ask_stop=run.asked.append,
        say=run.said.append,
        find=prices.look,
        event=run.clock.event,
    )
    found.start()
    run.clock.settle()
    return found


def test_it_looks_once_a_day_and_takes_a_changed_price_over(run: BudgetRun, prices: Prices) -> None:
    prices.looks = [3.6, 7.2, None, 1.8]
    watching = watch(run, prices)
    run.clock.advance(DAY - 1)
    assert prices.looked == 0
    run.clock.advance(2 * DAY + 1)
    assert prices.looked == 3 and run.said == ["prices: not fetched"]
    run.clock.advance(DAY / 2)
    hours = DAY / 3600
    (attempt,) = run.ledger.account().attempts
    assert attempt.usd == pytest.approx(2 * hours * 3.6 + 1.5 * hours * 7.2, rel=1e-3), "past seconds keep their price"
    run.clock.advance(DAY)
    (attempt,) = run.ledger.account().attempts
    assert attempt.usd == pytest.approx(2 * hours * 3.6 + 2 * hours * 7.2 + hours / 2 * 1.8, rel=1e-3)
    assert attempt.price == MachinePrice(1.8, "look 4")
    lines = [json.loads(line) for line in (run.ledger.folder / "attempt-001.jsonl").read_text().splitlines()]
    changed = [(line["metered_seconds"], line["usd_per_hour"]) for line in lines if line["event"] == "price"]
    assert changed == [(2 * DAY, 7.2), (4 * DAY, 1.8)], "an unchanged price is no event"
    watching.close()
    run.clock.settle()
    run.clock.advance(DAY)
    assert prices.looked == 4 and not run.asked


def test_a_machine_that_has_become_too_dear_is_asked_to_stop_once(run: BudgetRun, prices: Prices) -> None:
    prices.looks = [11.0, 12.0]
    watching = watch(run, prices)
    run.clock.advance(2.5 * DAY)
    assert run.asked == ["above max_hourly_cost"] and watching.too_dear
    watching.close()
    run.clock.settle()


def test_a_look_that_raises_ends_neither_the_run_nor_the_looking(run: BudgetRun, prices: Prices) -> None:
    def broken(_: object) -> None:
        prices.looked += 1
        raise RuntimeError("a bug")

    prices.look = broken  # type: ignore[method-assign,assignment]
    watching = watch(run, prices)
    run.clock.advance(2.5 * DAY)
    assert prices.looked == 2 and run.said == ["prices: not looked at again ('a bug')"] * 2 and not run.asked
    watching.close()
    run.clock.settle()


def test_a_look_that_ends_after_the_attempt_changes_nothing(run: BudgetRun, prices: Prices) -> None:
    watching = watch(run, prices)
    watching.close()
    prices.looks = [11.0]
    watching.look_again()
    assert not run.asked and not watching.too_dear
    run.clock.settle()


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "86401", "daily"])
def test_the_interval_of_tests_is_checked(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOOK_VARIABLE, text)
    with raises("budget.bad_look_seconds", match=LOOK_VARIABLE):
        look_seconds()
    monkeypatch.setenv(LOOK_VARIABLE, "5")
    assert look_seconds() == 5.0
    monkeypatch.delenv(LOOK_VARIABLE)
    assert look_seconds() == LOOK_SECONDS == 24 * 3600


@pytest.mark.parametrize(
    ("status", "recorded"), [("interrupted", "too_dear"), ("done", "done"), ("budget_stop", "budget_stop")]
)
def test_a_run_that_stops_because_of_its_price_says_so_in_the_ledger(
    tmp_path: Path, prices: Prices, monkeypatch: pytest.MonkeyPatch, status: str, recorded: str
) -> None:
    budget, stop = _budget(tmp_path, monkeypatch)
    prices.price = 11.0
    with budget.metered(hard_stop=lambda: None):
        budget._prices.look_again()
        budget.end(status)
    assert [request.reason for request in stop.requests] == ["price"] and not stop.because_of("budget")
    (attempt,) = Ledger(tmp_path / "ledger").account().attempts
    assert attempt.reason == recorded
    assert attempt.usd_per_hour == 11.0, "the stop is recorded at the price that caused it"


def _budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[FirstRankBudget, Stop]:
    """On a machine of ours that fetches nothing."""
    monkeypatch.delenv("FINETUNE_PRICES", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(run_budget, "provisioned", lambda: True)
    monkeypatch.setattr(run_budget, "facts", dict)
    monkeypatch.setattr(price_watch, "look", lambda say: None)
    time = MachineTime(provisioned=True, age=lambda: 60.0)
    monkeypatch.setattr(run_budget, "MachineTime", lambda provisioned: time)
    stop, config = Stop(lambda text: None), run_config(budget={"max_run_usd": 20.0})
    return FirstRankBudget(RunFolder(tmp_path), config, MachinePrice(3.6, "b"), stop, attempt=1, step=0), stop
