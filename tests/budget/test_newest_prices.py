"""The launch's price table at the newest prices: by the rules of the launch, and unchanged where a price cannot be believed."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from finetune.budget.newest_prices import look, priced_again
from finetune.cloud.catalog.csv_file import PriceRows, prices_of
from finetune.cloud.catalog.disks import disk_usd_per_hour
from finetune.errors import UserError
from finetune.machine import price
from finetune.machine.price import (
    NEWEST,
    VARIABLE,
    Machine,
    dearest_usd_per_hour,
    launch_table,
    machine_price,
    too_dear,
)
from tests.helpers.catalog_fixture import HEADER, gpu, host
from tests.helpers.errors import raises

NOW = datetime(2026, 11, 30, 9, 12, tzinfo=UTC)
ZONES = ("us-central1-a", "us-east1-b", "europe-west4-a", "asia-east1-a")
DISK = {zone: disk_usd_per_hour(200, "medium", zone.rpartition("-")[0], "a2-highgpu-1g") for zone in ZONES}
HOST, GPU = 0.2, 1.0
"""US dollars per hour of a spot machine's parts at the launch."""
CEILING = 2.0
Json = dict[str, Any]


def rows(**spot_usd: float | str) -> PriceRows:
    """The catalog of the launch, with other spot prices of the GPU in some zones (us_central1_a=1.5)."""
    lines = [HEADER]
    for zone in ZONES:
        lines += [host(zone, 0.5, HOST), gpu(zone, 3.0, spot_usd.get(zone.replace("-", "_"), GPU))]
    return prices_of(("\n".join(lines) + "\n").encode(), "test")


def launched(*, nodes: int = 1, machines: int = 1, ceiling: float | None = CEILING, **more: Any) -> Json:
    kind = {"machine": "a2-highgpu-1g", "disk_gib": 200, "disk_tier": "medium", "nodes": nodes, "machines": machines}
    offers = [
        {
            "gpu": "A100",
            "count": 1,
            "zone": zone,
            "spot": True,
            "usd_per_hour": round(nodes * (HOST + GPU + DISK[zone]), 5),
            "kind": 0,
        }
        for zone in ZONES
    ]
    table = {
        "basis": "SkyPilot's catalog, fetched 2026-11-27 (today)",
        "ceiling_usd_per_hour": ceiling,
        "offers": offers,
    }
    return table | {"kinds": [kind | {"ceiling": ceiling}]} | more


def again(table: Json, newest: PriceRows) -> dict[str, Json]:
    """The new offers by zone."""
    return {offer["zone"]: offer for offer in priced_again(table, table, newest, NOW)["offers"]}


def test_the_whole_machine_is_priced_again() -> None:
    found = again(launched(), rows(us_central1_a=1.5, us_east1_b=0.9))
    assert found["us-central1-a"]["usd_per_hour"] == round(HOST + 1.5 + DISK["us-central1-a"], 5)
    assert found["us-east1-b"]["usd_per_hour"] == round(HOST + 0.9 + DISK["us-east1-b"], 5), "lower, too"
    assert found["asia-east1-a"]["usd_per_hour"] == launched()["offers"][3]["usd_per_hour"]
    here = "SkyPilot's catalog, fetched on this machine 2026-11-30 09:12 UTC"
    assert found["us-central1-a"]["basis"] == f"{here}; ${HOST + GPU + DISK['us-central1-a']:.5g}/h at the launch"
    assert found["asia-east1-a"]["basis"] == here
    assert not any("too_dear" in offer for offer in found.values())


@pytest.mark.parametrize(
    ("nodes", "machines", "ceiling", "usd", "dear"),
    [
        (1, 1, CEILING, 1.7, False),
        (1, 1, CEILING, 1.8, True),  # 0.2 + 1.8 and the disk
        (1, 1, None, 2.9, False),
        (2, 2, 2 * CEILING, 1.7, False),
        (2, 2, 2 * CEILING, 1.8, True),
        (1, 3, 3 * CEILING, 1.8, True),  # three replicas of a service
    ],
)
def test_the_ceiling_is_that_of_the_launch(
    nodes: int, machines: int, ceiling: float | None, usd: float, dear: bool
) -> None:
    found = again(launched(nodes=nodes, machines=machines, ceiling=ceiling), rows(us_central1_a=usd))
    here = found["us-central1-a"]
    assert here["usd_per_hour"] == round(nodes * (HOST + usd + DISK["us-central1-a"]), 5)
    assert ("too_dear" in here) == dear
    assert not any("too_dear" in offer for zone, offer in found.items() if zone != "us-central1-a")


@pytest.mark.parametrize(
    ("usd", "why"),
    [
        (0.3, "anomaly: GPU at $0.3000/h is 30% of the median"),
        (0, "anomaly: GPU at $0.0000/h"),
        (3.5, "spot is above $3.0000/h on demand in the same zone"),
        ("", "the newest catalog has no price for it"),
    ],
)
def test_a_price_that_is_an_anomaly_leaves_the_launchs(usd: float | str, why: str) -> None:
    here = again(launched(), rows(us_central1_a=usd))["us-central1-a"]
    assert here["usd_per_hour"] == launched()["offers"][0]["usd_per_hour"] and "too_dear" not in here
    assert (
        here["basis"].startswith("SkyPilot's catalog, fetched 2026-11-27 (today); kept, because ")
        and why in here["basis"]
    )


def test_anomalies_count_where_the_launch_trusts_prices() -> None:
    here = again(launched(trust_prices=True), rows(us_central1_a=0.3))["us-central1-a"]
    assert here["usd_per_hour"] == round(HOST + 0.3 + DISK["us-central1-a"], 5)


def test_a_price_that_nobody_charges_is_damage_even_if_the_launch_trusts_prices() -> None:
    here = again(launched(trust_prices=True), rows(us_central1_a=500.0))["us-central1-a"]
    assert here["usd_per_hour"] == launched()["offers"][0]["usd_per_hour"] and "too far" in here["basis"]


@pytest.mark.parametrize("lines", [[gpu("us-central1-a", name="L4")], [host("us-central1-a"), gpu("us-central1-a")]])
def test_a_catalog_without_most_of_the_launchs_machines_is_not_believed(lines: list[str]) -> None:
    """Another schema, or a part of a file."""
    part = prices_of(("\n".join([HEADER, *lines]) + "\n").encode(), "test")
    with raises("catalog.implausible", match=r"[34] of the 4 offers of the launch .*the prices of the launch count"):
        priced_again(launched(), launched(), part, NOW)


# --- on the machine --------------------------------------------------------------------------------------------------------


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """On a spot A100 in Iowa."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(VARIABLE, json.dumps(launched()))
    monkeypatch.setattr(price, "this_machine", lambda: Machine("us-central1-a", True, "A100", 1))
    return []


def usd() -> float:
    found = machine_price()
    assert found
    return found.usd_per_hour


def test_a_look_is_kept_for_every_process_of_the_machine(said: list[str]) -> None:
    before = usd()
    look(said.append, lambda: rows(us_central1_a=1.5, asia_east1_a=1.6))
    assert usd() == pytest.approx(before + 0.5, abs=1e-4)
    assert dearest_usd_per_hour() == round(HOST + 1.6 + DISK["asia-east1-a"], 5), "of a restart"
    assert too_dear() is None
    assert len(said) == 1 and said[0].startswith(
        f"prices: this machine costs ${usd():g}/h (SkyPilot's catalog, fetched on this"
    )
    look(said.append, lambda: rows(us_central1_a=0.9))
    assert usd() == pytest.approx(before - 0.1, abs=1e-4), "a price that falls"


@pytest.mark.parametrize(
    "fault",
    [
        UserError("could not be fetched", code="catalog.not_fetched"),
        OSError("network"),
        ValueError("x"),
        RecursionError(),
    ],
)
def test_a_look_that_fails_changes_nothing_and_says_one_line(said: list[str], fault: Exception) -> None:
    look(said.append, lambda: rows(us_central1_a=1.5))
    before = usd()

    def fails() -> PriceRows:
        raise fault

    look(said.append, fails)
    assert usd() == before and len(said) == 2 and said[1].startswith("prices: ") and "\n" not in said[1]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"launch": 1}', '{"launch": "x", "table": {"offers": 1}}'])
def test_a_damaged_table_at_newer_prices_is_passed_over(said: list[str], damage: str) -> None:
    before = usd()
    look(said.append, lambda: rows(us_central1_a=1.5))
    (Path.home() / NEWEST).write_text(damage)
    assert usd() == before


@pytest.mark.parametrize("usd_per_hour", [0, -1, True, float("nan"), "free"])
def test_a_newer_price_that_no_machine_has_is_passed_over(said: list[str], usd_per_hour: object) -> None:
    before = usd()
    look(said.append, lambda: rows(us_central1_a=1.5))
    path = Path.home() / NEWEST
    kept = json.loads(path.read_text())
    kept["table"]["offers"][0]["usd_per_hour"] = usd_per_hour
    path.write_text(json.dumps(kept))
    assert usd() == before


def test_the_newer_prices_of_an_earlier_launch_do_not_count(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    look(said.append, lambda: rows(us_central1_a=1.5))
    monkeypatch.setenv(VARIABLE, json.dumps(launched(ceiling=3.0)))
    assert usd() == launched()["offers"][0]["usd_per_hour"]


def test_a_machine_above_the_ceiling(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    look(said.append, lambda: rows(us_central1_a=1.9))
    found = too_dear()
    assert found and not found.everywhere
    assert found.reason.startswith(
        f"above max_hourly_cost ($2/h): ${usd():g}/h, SkyPilot's catalog, fetched on this machine"
    )
    look(
        said.append,
        lambda: rows(**dict.fromkeys(("us_central1_a", "us_east1_b", "europe_west4_a", "asia_east1_a"), 1.9)),
    )
    everywhere = too_dear()
    assert everywhere and everywhere.everywhere
    look(said.append, lambda: rows(us_central1_a=1.9))
    monkeypatch.setattr(price, "this_machine", lambda: Machine(None, True, "A100", 1))
    assert too_dear() is None, "it may be in a zone that is cheap enough"
    monkeypatch.setattr(price, "this_machine", lambda: Machine("us-west1-a", True, "A100", 1))
    assert too_dear() is None, "a machine outside the table"


def test_nothing_is_fetched_where_nothing_could_be_priced_by_it(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never() -> PriceRows:
        raise AssertionError("fetched")

    earlier_version = {key: value for key, value in launched().items() if key != "kinds"}
    monkeypatch.setenv(VARIABLE, json.dumps(earlier_version))
    look(said.append, never)
    monkeypatch.delenv(VARIABLE)
    look(said.append, never)
    assert not said and launch_table() is None
