"""`finetune sweep --plan`: one machine, one trial after the other, against several at once."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from finetune.cli.main import main
from finetune.cloud.catalog.offers import load_catalog
from finetune.cloud.plan.plan import Plan, plan_run
from finetune.cloud.plan.sweep import DECISION_HOURS, RELOAD_HOURS, render_sweep, sweep_costs
from finetune.config.load import load_config
from finetune.machine.price import Ceilings
from tests.helpers.catalog_fixture import lay_out_catalog
from tests.helpers.errors import raises

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = ROOT / "configs" / "mistral_7b_qlora.yaml"
Shown = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SKY_RUNTIME_DIR", raising=False)
    lay_out_catalog(tmp_path / "home", fetched=datetime.now(UTC))
    return tmp_path / "home"


@pytest.fixture
def plan() -> Plan:
    return plan_run(load_config(SHIPPED), load_catalog(), Ceilings(), scored=False)


def test_the_work_is_that_of_the_trials_up_to_where_they_stop(plan: Plan) -> None:
    """6 trials to a quarter, 3 from there to half, 2 to the end: 6/4 + 3/4 + 2/2 of a whole training."""
    costs = sweep_costs(plan, (6, 3, 2), (0.25, 0.5))
    row = costs[0].row
    assert row.cost is not None and row.offer is not None
    whole = row.on_gpu.work_hours + row.cost.lost_hours
    set_up = plan.set_up.minutes / 60
    expected = set_up + 3.25 * whole + 11 * (RELOAD_HOURS + DECISION_HOURS)
    assert costs[0].hours == costs[0].machine_hours == pytest.approx(expected)
    assert costs[0].usd == pytest.approx(expected * row.offer.usd_per_hour)
    six = costs[-1]
    assert (len(costs), six.machines) == (6, 6)
    assert six.machine_hours == pytest.approx(expected + 5 * set_up)
    assert six.hours == pytest.approx(set_up + whole + 3 * (RELOAD_HOURS + DECISION_HOURS))


def test_one_machine_is_the_cheapest_and_several_are_faster(plan: Plan) -> None:
    costs = sweep_costs(plan, (6, 3, 2), (0.25, 0.5))
    dollars, hours = [cost.usd for cost in costs], [cost.hours for cost in costs]
    assert dollars == sorted(dollars) and hours == sorted(hours, reverse=True)


def test_the_gpu_is_the_cheapest_for_the_sweep(plan: Plan) -> None:
    costs = sweep_costs(plan, (6, 3, 2), (0.25, 0.5))
    for row in plan.rows:
        if row.chosen:
            assert sweep_costs(replace(plan, rows=(row,)), (6, 3, 2), (0.25, 0.5))[0].usd >= costs[0].usd


def test_without_a_machine(plan: Plan) -> None:
    refused = tuple(replace(row, refusals=("no",)) for row in plan.rows)
    with raises("sweep.no_machine"):
        sweep_costs(replace(plan, rows=refused), (2, 1), (0.5,))


def test_a_budget_that_would_end_it(plan: Plan) -> None:
    costs = sweep_costs(plan, (6, 3, 2), (0.25, 0.5))
    text = render_sweep(costs, 6, costs[1].usd)
    marked = [bool(re.search("above --max-sweep-usd", line)) for line in text.splitlines()[2:-1]]
    assert marked[:3] == [False, False, True] and "estimated" in text


def test_on_the_command_line(capsys: Shown) -> None:
    """Nothing is written, and the data need not be prepared."""
    words = ["sweep", str(SHIPPED), "training.learning_rate=1e-4,2e-4", "lora.r=8,16,32", "--plan"]
    assert main([*words, "--max-sweep-usd", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("6 trials on ") and lines[1].split() == ["machines", "hours", "billed", "hours", "$"]
    assert lines[-1].startswith("cheapest: 1 machine, because each pays for its own set-up")
