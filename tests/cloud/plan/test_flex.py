"""What flex-start would cost: from the on-demand prices that are half of those elsewhere, and never launched."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.cloud.plan.flex import flex_json, flex_prices, flex_rows, render_flex
from finetune.cloud.plan.plan import Plan
from tests.helpers.catalog_fixture import gpu, host
from tests.helpers.plan_examples import catalog_of, plan_of, priced, run_config

HOST = "a3-highgpu-1g"
ZONES = {"us-east4-a": 10.0, "us-central1-a": 4.2, "us-west1-a": 5.6}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    lines = [line for zone, usd in ZONES.items() for line in (host(zone, 1.2, 0.3, HOST), gpu(zone, usd, 2.5, "H100"))]
    return plan_of(run_config(plan={"gpus": ["H100"]}), catalog_of(tmp_path, lines))


def test_the_price_is_that_of_the_whole_machine_where_the_gpu_is_at_half(plan: Plan) -> None:
    """200 GiB of disk and two local SSDs of 375 GiB in Iowa cost 0.027 and 0.103 an hour."""
    [(usd, zone)] = flex_prices(plan.catalog, "H100", 200)
    assert usd == pytest.approx(4.2 + 1.2 + 0.0274 + 0.1027, abs=1e-4) and zone == "us-central1-a"
    (row,) = flex_rows(plan)
    assert row.cost.preemptions == 0 and row.cost.usd == pytest.approx(row.usd_per_hour * row.cost.hours)
    assert flex_json(plan) == [
        {"gpu": "H100", "count": 1, "zone": "us-central1-a", "usd_per_hour": round(row.usd_per_hour, 5),
         "hours": round(row.cost.hours, 3), "usd": round(row.cost.usd, 3)}
    ]  # fmt: skip


def test_it_is_no_row_of_the_plan(plan: Plan) -> None:
    assert [(row.spot, row.chosen) for row in plan.rows] == [(True, True), (False, False)]
    assert plan.rows[1].refusals == ("not sold on demand; spot or flex-start (--flex)",)


def test_the_text_says_how_to_ask_for_it_and_what_no_longer_holds(plan: Plan) -> None:
    text = render_flex(plan)
    assert "1.  H100  us-central1-a" in text and "infra: gcp/us-central1`" in text and "`accelerators: H100:1`" in text
    assert "managed_instance_group: {run_duration: 3600, provision_timeout: 3600}" in text
    assert "presumably" in text and "no ceiling in dollars holds." in text


def test_without_such_a_price_nothing_is_made_up(tmp_path: Path) -> None:
    text = render_flex(plan_of(run_config(plan={"gpus": ["T4"]}), priced(tmp_path, T4=(0.4, 0.1))))
    assert text == "flex-start: the catalog has no price that looks like one for these GPUs"
