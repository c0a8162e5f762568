"""The price of a cloud machine, from the price table of the launch, the metadata server and nvidia-smi."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.cli.main import main
from finetune.machine import billed_time
from finetune.machine import price as machine_price_module
from finetune.machine.billed_time import MachineTime
from finetune.machine.preemption import MAINTENANCE, PREEMPTED, PreemptionWatch
from finetune.machine.price import (
    KEPT,
    VARIABLE,
    Ceilings,
    Machine,
    dearest_usd_per_hour,
    facts,
    gpu_of,
    machine_price,
    price_in,
    provisioned,
    this_machine,
    wall_hours,
)
from tests.helpers.errors import raises, reported
from tests.helpers.metadata_server import MetadataServer

OFFERS: list[dict[str, Any]] = [
    {"gpu": "T4", "zone": "us-central1-a", "spot": True, "usd_per_hour": 0.3},
    {"gpu": "T4", "zone": "us-central1-a", "spot": False, "usd_per_hour": 0.8},
    {"gpu": "V100", "zone": "us-central1-a", "spot": True, "usd_per_hour": 1.1},
    {"gpu": "T4", "zone": "europe-west4-b", "spot": True, "usd_per_hour": 0.4},
]
TABLE = {"basis": "a catalog of today", "ceiling_usd_per_hour": 3.5, "offers": OFFERS}


@pytest.fixture(autouse=True)
def nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")  # nobody listens on the discard port
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name in (VARIABLE, "SKYPILOT_CLUSTER_INFO"):
        monkeypatch.delenv(name, raising=False)
    smi(tmp_path, "")


def age(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has been up for so long."""
    for module in (billed_time, machine_price_module):
        monkeypatch.setattr(module, "machine_age", lambda: seconds)


def smi(home: Path, gpu: str) -> None:
    program = home / "bin" / "nvidia-smi"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n[ -n '{gpu}' ] && echo '580.1, 15360, 7.5, {gpu}'\n")
    program.chmod(0o755)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MetadataServer]:
    with MetadataServer() as server:
        monkeypatch.setenv("GCE_METADATA_HOST", server.host)
        yield server


def test_a_fully_known_machine_costs_its_own_price() -> None:
    price = price_in(TABLE, Machine("us-central1-a", True, "T4"))
    assert (price.usd_per_hour, price.basis) == (0.3, "a catalog of today")


@pytest.mark.parametrize(
    ("machine", "usd", "says"),
    [
        (Machine("us-central1-a", None, "T4"), 0.8, "spot unknown"),
        (Machine("us-central1-a", True, None), 1.1, "gpu unknown"),
        (Machine(None, True, "T4"), 0.4, "zone unknown"),
        (Machine(None, None, None), 1.1, "zone, spot, gpu unknown"),
    ],
)
def test_an_unknown_fact_counts_at_the_highest_matching_price(machine: Machine, usd: float, says: str) -> None:
    price = price_in(TABLE, machine)
    assert price.usd_per_hour == usd and says in price.basis


def test_a_machine_outside_the_table_costs_the_ceiling() -> None:
    elsewhere = Machine("asia-east1-a", True, "T4")
    assert price_in(TABLE, elsewhere).usd_per_hour == 3.5
    assert (
        price_in(TABLE | {"ceiling_usd_per_hour": None}, elsewhere).usd_per_hour == 1.1
    )  # the highest price that was allowed
    assert "ceiling" in price_in(TABLE, elsewhere).basis


def test_several_gpus_of_a_kind_have_a_price_of_their_own(server: MetadataServer, tmp_path: Path) -> None:
    one, four = ({**OFFERS[3], "count": count, "usd_per_hour": usd} for count, usd in ((1, 0.4), (4, 1.3)))
    table = TABLE | {"offers": [four, one]}
    server.set("zone", "projects/123/zones/europe-west4-b")
    smi(tmp_path, "Tesla T4")
    assert price_in(table, this_machine()).usd_per_hour == 0.4
    smi(tmp_path, "Tesla T4\n580.1, 15360, 7.5, Tesla T4\n580.1, 15360, 7.5, Tesla T4\n580.1, 15360, 7.5, Tesla T4")
    assert this_machine().gpus == 4 and price_in(table, this_machine()).usd_per_hour == 1.3
    assert price_in(table, Machine("europe-west4-b", True, "T4", 2)).usd_per_hour == 3.5, (
        "not in the table: the ceiling"
    )
    assert price_in(TABLE, Machine("europe-west4-b", True, "T4", 4)).usd_per_hour == 0.4, (
        "a table of an earlier version"
    )


def test_zone_spot_and_gpu_come_from_the_metadata_server_and_nvidia_smi(server: MetadataServer, tmp_path: Path) -> None:
    server.set("zone", "projects/123/zones/europe-west4-b")
    smi(tmp_path, "Tesla T4")
    assert this_machine() == Machine("europe-west4-b", True, "T4", 1)
    assert facts() == {
        "zone": "europe-west4-b", "spot": True, "gpu": "T4", "gpus": 1, "id": "4520031799277581759", "name": "train-1",
    }  # fmt: skip


def test_skypilot_knows_the_zone_too(server: MetadataServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.set("scheduling/preemptible", "FALSE")
    server.forget("zone")
    info = {"cluster_name": "c", "cloud": "GCP", "region": "us-central1", "zone": "us-central1-a"}
    monkeypatch.setenv("SKYPILOT_CLUSTER_INFO", json.dumps(info))
    assert this_machine() == Machine("us-central1-a", False, None)
    monkeypatch.setenv("SKYPILOT_CLUSTER_INFO", "[]")  # of a SkyPilot that we do not know
    assert this_machine().zone is None


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", None),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_names_of_nvidia_smi(name: str, gpu: str | None) -> None:
    assert gpu_of(name) == gpu


def test_the_table_of_this_job_wins_over_the_one_kept_at_set_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert machine_price() is None and not provisioned()
    kept = tmp_path / KEPT
    kept.parent.mkdir()
    kept.write_text(json.dumps(TABLE | {"offers": OFFERS[:1]}))
    found = machine_price()
    assert found and found.usd_per_hour == 0.3 and provisioned()
    monkeypatch.setenv(VARIABLE, json.dumps(TABLE | {"offers": OFFERS[2:3]}))
    found = machine_price()
    assert found and found.usd_per_hour == 1.1


@pytest.mark.parametrize("usd", [0, -1, 1e-300, 1e300, 10**400, float("nan"), float("inf"), -0.0, True, "", [1]])
def test_a_price_that_no_machine_has_is_not_believed(usd: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for table in ({"ceiling_usd_per_hour": usd}, {"offers": [OFFERS[0] | {"usd_per_hour": usd}]}):
        monkeypatch.setenv(VARIABLE, json.dumps(TABLE | table))
        with raises("price.bad_table", match="launch again"):
            machine_price()


def test_the_dearest_machine_of_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dearest_usd_per_hour() is None
    monkeypatch.setenv(VARIABLE, json.dumps(TABLE))
    assert dearest_usd_per_hour() == max(offer["usd_per_hour"] for offer in OFFERS)


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps(TABLE | {"offers": [{"usd_per_hour": 1}]}),
                                  json.dumps(TABLE | {"offers": [OFFERS[0] | {"usd_per_hour": "x"}]})])  # fmt: skip
def test_a_broken_table_is_an_error_not_a_free_machine(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with raises("price.bad_table", match=f"^{VARIABLE}: .*launch again"):
        machine_price()


def test_hours_that_a_budget_buys_count_from_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    age(1800.0, monkeypatch)
    price = price_in(TABLE, Machine("us-central1-a", False, "T4"))  # $0.80
    assert wall_hours(price, Ceilings(8.0, None)) == pytest.approx(9.5)
    assert wall_hours(price, Ceilings(8.0, 2.0)) == 2.0
    assert wall_hours(price, Ceilings(0.1, 2.0)) == 0.0
    assert wall_hours(None, Ceilings(8.0, 2.0)) == 2.0
    assert wall_hours(None, Ceilings(8.0, None)) is None


def test_hours_that_an_earlier_run_paid_for_do_not_count_against_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    price = price_in(TABLE, Machine("us-central1-a", False, "T4"))  # $0.80
    age(2.4 * 3600, monkeypatch)
    first = MachineTime(provisioned=True)
    first.take()
    first.mark()
    age(2.5 * 3600, monkeypatch)
    assert wall_hours(price, Ceilings(0.8, None)) == pytest.approx(0.9)
    assert wall_hours(price, Ceilings(0.8, 0.5)) == 0.5
    assert wall_hours(price, Ceilings(3.2, None), of_machine=True) == pytest.approx(1.5)
    assert wall_hours(price, Ceilings(0.8, None), of_machine=True) == 0.0


def test_the_command_prints_price_and_hours(
    server: MetadataServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with reported("price.unknown"):
        assert main(["machine"]) == 2
    assert "not launched by SkyPilot with our policy" in capsys.readouterr().err
    monkeypatch.setenv(VARIABLE, json.dumps(TABLE))
    smi(tmp_path, "Tesla V100-SXM2-16GB")
    assert main(["machine", "--max-hours", "3"]) == 0
    out = capsys.readouterr().out
    assert (
        "V100, spot, us-central1-a: $1.1000 an hour (a catalog of today)" in out and "may run for another 3.00 h" in out
    )
    assert main(["machine", "--wall-hours", "--max-hours", "3"]) == 0
    assert float(capsys.readouterr().out) == 3.0
    with reported("cli.missing_option"):
        assert main(["machine", "--wall-hours"]) == 2
    for wrong in ("0", "-1", "nan", "inf", "much"):
        with pytest.raises(SystemExit, match="2"):
            main(["machine", "--max-hours", wrong])


class Notices:
    """Collects the notices of a watch."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self._came = threading.Event()

    def __call__(self, notice: str) -> None:
        self.keys.append(notice)
        self._came.set()

    def soon(self, seconds: float = 5.0) -> bool:
        return self._came.wait(seconds)


def waiting(server: MetadataServer) -> None:
    """Waits until the server holds both requests of the watch."""
    wait_until(lambda: len({path for path in server.asked if "wait_for_change" in path}) == 2)


def wait_until(true: object, seconds: float = 10.0) -> None:
    assert callable(true)
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "timed out"
        time.sleep(0.01)


def test_a_preemption_is_reported_once_and_at_once(server: MetadataServer) -> None:
    notices = Notices()
    with PreemptionWatch(notices):
        waiting(server)
        assert not notices.keys
        began = time.monotonic()
        server.set("preempted", "TRUE")
        assert notices.soon() and time.monotonic() - began < 2
        wait_until(lambda: f"metadata {PREEMPTED}" not in [thread.name for thread in threading.enumerate()])
    assert notices.keys == [PREEMPTED]


def test_a_preemption_before_the_watch_is_reported_too(server: MetadataServer) -> None:
    server.set("preempted", "TRUE")
    notices = Notices()
    with PreemptionWatch(notices):
        assert notices.soon(3)
    assert notices.keys == [PREEMPTED]


def test_only_maintenance_that_ends_the_machine_is_reported(server: MetadataServer) -> None:
    notices = Notices()
    with PreemptionWatch(notices):
        waiting(server)
        server.set("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
        assert not notices.soon(0.3)
        server.set("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
        assert notices.soon()
    assert notices.keys == [MAINTENANCE]


def test_outside_of_google_cloud_the_watch_ends_by_itself() -> None:
    notices = Notices()
    with PreemptionWatch(notices) as watch:
        wait_until(lambda: not watch.listening(), 3)
    assert not notices.keys


def test_on_a_cloud_machine_it_waits_for_a_late_server(server: MetadataServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, json.dumps(TABLE))
    server.stop()
    notices = Notices()
    with PreemptionWatch(notices) as watch:
        time.sleep(0.3)
        assert watch.listening()
        server.values["preempted"] = "TRUE"
        server.start()
        assert notices.soon()


def test_a_busy_server_a_dropped_connection_and_a_restart_are_survived(server: MetadataServer) -> None:
    notices = Notices()
    server.break_next(503, 503)  # already at the first request
    with PreemptionWatch(notices):
        waiting(server)
        server.break_next(503, 0, 500, 0)
        server.set("name", "wakes those that wait")
        wait_until(lambda: not server._broken)
        server.stop()
        time.sleep(0.3)
        server.start()
        before = len(server.asked)
        wait_until(lambda: sum("wait_for_change" in path for path in server.asked[before:]) >= 2)
        assert not notices.keys
        server.set("preempted", "TRUE")
        assert notices.soon()
    assert notices.keys == [PREEMPTED]


def test_a_preemption_while_the_server_is_down_is_reported_when_it_is_back(server: MetadataServer) -> None:
    notices = Notices()
    with PreemptionWatch(notices):
        waiting(server)
        server.stop()
        server.values["preempted"] = "TRUE"
        assert not notices.soon(0.3)
        server.start()
        assert notices.soon()


def test_a_server_that_does_not_wait_is_not_flooded(server: MetadataServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_wait", lambda *_: None)
    with PreemptionWatch(Notices()):
        time.sleep(1.2)
    assert 4 <= len(server.asked) <= 8  # two keys, half a second apart


def test_a_server_that_stays_busy_is_not_flooded(server: MetadataServer) -> None:
    server.break_next(*[503] * 1000)
    with PreemptionWatch(Notices()) as watch:
        time.sleep(1.0)
        assert watch.listening()
    assert 4 <= len(server.asked) <= 12  # two keys: at once, after 0.1 s, 0.2 s, 0.4 s ...


def test_closing_ends_a_pending_request(server: MetadataServer) -> None:
    watch = PreemptionWatch(Notices()).start()
    waiting(server)
    began = time.monotonic()
    watch.close()
    assert not watch.listening() and time.monotonic() - began < 2


def test_a_key_that_the_server_does_not_know_is_given_up(server: MetadataServer) -> None:
    server.forget("preempted", "maintenance-event")
    with PreemptionWatch(Notices()) as watch:
        wait_until(lambda: not watch.listening(), 3)
    assert len(server.asked) == 2
