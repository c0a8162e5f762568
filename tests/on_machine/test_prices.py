"""on_machine/train.sh on a machine whose price has changed since the launch: the real `finetune job`, a catalog of its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune.budget.attempts import Attempt
from finetune.budget.ledger import Ledger
from finetune.cloud.catalog.disks import disk_usd_per_hour
from finetune.cloud.catalog.fetch import VARIABLE
from finetune.job import serve
from finetune.job.settings import read_settings
from finetune.machine.price import TooDear
from tests.helpers.catalog_fixture import HEADER, gpu, host
from tests.helpers.errors import raises
from tests.helpers.machine_fixture import SET, CloudMachine, begin_run, lay_out_set, rent

HERE, THERE, ELSEWHERE = "us-central1-a", "us-east1-b", "us-west1-a"
DISK = disk_usd_per_hour(200, "medium", "us-central1", "a2-highgpu-1g")
CHEAP, DEAR = 1.0, 1.9
"""US dollars per hour of the GPU: with host (0.20) and disk below the ceiling, and above."""
CEILING = 2.0


class Publisher:
    """A server with the catalog; gpu_usd: spot price of the GPU by zone; body: what it sends instead."""

    def __init__(self) -> None:
        self.gpu_usd = dict.fromkeys((HERE, THERE, ELSEWHERE), CHEAP)
        self.body: bytes | None = None
        self.asked = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked += 1
                body = outer.file() if outer.body is None else outer.body
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def file(self) -> bytes:
        rows = [row for zone, usd in self.gpu_usd.items() for row in (host(zone), gpu(zone, spot=usd))]
        return ("\n".join([HEADER, *rows]) + "\n").encode()


@pytest.fixture
def catalog() -> Iterator[Publisher]:
    publisher = Publisher()
    yield publisher
    publisher.server.shutdown()
    publisher.server.server_close()


@pytest.fixture
def machine(tmp_path: Path, catalog: Publisher) -> CloudMachine:
    """In HERE, launched when all was cheap."""
    machine = rent(tmp_path)
    kind = {"machine": "a2-highgpu-1g", "disk_gib": 200, "disk_tier": "medium", "nodes": 1, "machines": 1}
    usd = round(0.2 + CHEAP + DISK, 5)
    offers = [
        {"gpu": "A100", "count": 1, "zone": zone, "spot": True, "usd_per_hour": usd, "kind": 0}
        for zone in catalog.gpu_usd
    ]
    table = {
        "basis": "the launch",
        "ceiling_usd_per_hour": CEILING,
        "kinds": [kind | {"ceiling": CEILING}],
        "offers": offers,
    }
    machine.env |= {
        "FINETUNE_PRICES": json.dumps(table),
        VARIABLE: f"http://127.0.0.1:{catalog.server.server_port}/vms.csv",
    }
    machine.env["MAX_RUN_USD"] = "100000"  # this computer may have run for long
    move(machine, HERE)
    return machine


def move(machine: CloudMachine, zone: str) -> None:
    """The next start is on a machine there."""
    machine.env["SKYPILOT_CLUSTER_INFO"] = json.dumps({"cluster_name": "c", "cloud": "GCP", "zone": zone})
    for name in ("newest_prices.json", "metered.json"):
        (machine.home / ".finetune" / name).unlink(missing_ok=True)


def attempts(machine: CloudMachine, folder: str = "runs/run/ledger") -> list[Attempt]:
    return list(Ledger(machine.bucket / folder).account().attempts)


def test_training_begins_at_the_newest_price(machine: CloudMachine, catalog: Publisher) -> None:
    catalog.gpu_usd[HERE] = 1.5
    code, said = machine.run("train.sh", MAX_HOURS="1000000")
    assert code == 0, said
    assert machine.called("train config.yaml") and catalog.asked == 1
    assert (
        f"prices: this machine costs ${round(1.7 + DISK, 5):g}/h (SkyPilot's catalog, fetched on this machine" in said
    )
    hours = float(said.partition("training for at most ")[2].partition(" hours")[0])
    assert hours == pytest.approx(100_000 / (1.7 + DISK), rel=0.05), "what the dollars buy now"


def test_a_machine_above_the_ceiling_trains_nothing_and_the_next_one_does(
    machine: CloudMachine, catalog: Publisher
) -> None:
    begin_run(machine, "interrupted")
    catalog.gpu_usd[HERE] = DEAR
    code, said = machine.run("train.sh")
    assert (code, machine.called("train")) == (75, []), said
    assert "this machine is above max_hourly_cost ($2/h): $2.1" in said and "goes on with its next machine" in said
    (attempt,) = attempts(machine)
    assert (attempt.reason, attempt.zone, attempt.step) == ("too_dear", HERE, None)
    assert attempt.usd_per_hour == round(0.2 + DEAR + DISK, 5) and attempt.price
    assert "fetched on this machine" in attempt.price.basis and attempt.seconds > 0
    move(machine, THERE)
    code, said = machine.run("train.sh")
    assert code == 0 and machine.called("train --resume"), said


def test_the_same_place_again_ends_the_job(machine: CloudMachine, catalog: Publisher) -> None:
    begin_run(machine, "interrupted")
    catalog.gpu_usd[HERE] = DEAR
    assert machine.run("train.sh")[0] == 75
    move(machine, HERE)
    code, said = machine.run("train.sh")
    assert (code, machine.called("train")) == (2, []), said
    assert "2 starts in a row were on such machines" in said and "--env RUN_NAME=run" in said
    assert [one.reason for one in attempts(machine)] == ["too_dear", "too_dear"]


def test_three_places_in_a_row_end_the_job(machine: CloudMachine, catalog: Publisher) -> None:
    begin_run(machine, "interrupted")
    catalog.gpu_usd |= {HERE: DEAR, THERE: DEAR, ELSEWHERE: DEAR, "us-west4-a": CHEAP}
    table = json.loads(machine.env["FINETUNE_PRICES"])
    table["offers"].append(
        table["offers"][0] | {"zone": "us-west4-a"}
    )  # the last one that is cheap, and is never tried
    machine.env["FINETUNE_PRICES"] = json.dumps(table)
    codes = []
    for zone in (HERE, THERE, ELSEWHERE):
        move(machine, zone)
        codes.append(machine.run("train.sh")[0])
    assert codes == [75, 75, 2] and not machine.called("train")


def test_where_every_machine_of_the_launch_is_too_dear_the_job_ends_at_once(
    machine: CloudMachine, catalog: Publisher
) -> None:
    begin_run(machine, "interrupted")
    catalog.gpu_usd = dict.fromkeys(catalog.gpu_usd, DEAR)
    code, said = machine.run("train.sh")
    assert (code, machine.called("train")) == (2, []), said
    assert "every other machine of the launch is above its ceiling by now, too" in said
    assert [one.reason for one in attempts(machine)] == ["too_dear"]


def test_a_run_that_has_not_begun_keeps_its_name_and_the_starts_are_counted(
    machine: CloudMachine, catalog: Publisher
) -> None:
    catalog.gpu_usd[HERE] = DEAR
    assert machine.run("train.sh")[0] == 75
    assert not machine.run_folder().exists()
    assert [one.reason for one in attempts(machine, "too-dear/run")] == ["too_dear"]
    move(machine, HERE)
    assert machine.run("train.sh")[0] == 2
    move(machine, THERE)
    code, said = machine.run("train.sh")
    assert code == 0 and machine.called("train config.yaml"), said


def test_a_run_that_is_done_does_not_look(machine: CloudMachine, catalog: Publisher) -> None:
    begin_run(machine, "done")
    catalog.gpu_usd[HERE] = DEAR
    assert machine.run("train.sh")[0] == 0
    assert catalog.asked == 0


@pytest.mark.parametrize("body", [b"", b"<html>rate limited</html>", b"InstanceType,vCPUs\n", bytes(2000)])
def test_a_catalog_that_cannot_be_believed_stops_nothing(
    machine: CloudMachine, catalog: Publisher, body: bytes
) -> None:
    catalog.body = body
    code, said = machine.run("train.sh")
    assert code == 0 and machine.called("train config.yaml"), said
    told = [line for line in said.splitlines() if "prices:" in line]
    assert len(told) == 1 and "the prices of the launch count" in told[0]


def test_nobody_who_publishes_stops_nothing(machine: CloudMachine) -> None:
    code, said = machine.run("train.sh", **{VARIABLE: "http://127.0.0.1:9/vms.csv"})
    assert code == 0 and machine.called("train config.yaml"), said
    assert "could not be fetched" in said


@pytest.mark.parametrize(("risen", "expected"), [((HERE,), 75), ((HERE, THERE, ELSEWHERE), 2)])
def test_a_price_that_rises_while_the_run_trains(
    machine: CloudMachine, catalog: Publisher, risen: tuple[str, ...], expected: int
) -> None:
    """Training looks once a day and ends with 75 then; the job makes that 2 where nothing else is cheaper."""
    begin_run(machine, "interrupted")
    at_the_start = catalog.file()
    catalog.gpu_usd |= dict.fromkeys(risen, DEAR)
    later = catalog.file()
    catalog.file = lambda: at_the_start if catalog.asked == 1 else later  # type: ignore[method-assign]
    code, said = machine.run(
        "train.sh", FAKE_WORK="from finetune.budget.newest_prices import look; look(print); raise SystemExit(75)"
    )
    assert (code, catalog.asked) == (expected, 2) and machine.called("train --resume"), said
    assert ("every other machine of the launch is above its ceiling" in said) == (expected == 2)


def trained(machine: CloudMachine) -> Path:
    folder = begin_run(machine, "done")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").touch()
    lay_out_set(machine.checkout / SET, "on the laptop")
    return folder


@pytest.mark.parametrize("script", ["train.sh", "evaluate.sh"])
def test_a_machine_above_the_ceiling_scores_nothing(machine: CloudMachine, catalog: Publisher, script: str) -> None:
    trained(machine)
    catalog.gpu_usd[HERE] = DEAR
    code, said = machine.run(script, EVALUATE="1")
    assert (code, machine.called("evaluate")) == (75, []), said


@pytest.mark.parametrize("script", ["train.sh", "evaluate.sh"])
def test_a_price_that_rises_while_the_run_is_scored(machine: CloudMachine, catalog: Publisher, script: str) -> None:
    """The answers so far are kept, and the next machine goes on from them."""
    trained(machine)
    at_the_start = catalog.file()
    catalog.gpu_usd[HERE] = DEAR
    later = catalog.file()
    catalog.file = lambda: at_the_start if catalog.asked == 1 else later  # type: ignore[method-assign]
    keeps = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); time.sleep(50)"
    code, said = machine.run(script, EVALUATE="1", FAKE_WORK=keeps, FINETUNE_LOOK_SECONDS="1")
    assert code == 75, said
    (attempt,) = attempts(machine)
    assert (attempt.work, attempt.reason) == ("evaluate", "too_dear")
    assert attempt.usd_per_hour == round(0.2 + DEAR + DISK, 5)
    spent_before = attempt.priced_from / 3600 * (0.2 + CHEAP + DISK)
    assert attempt.usd_before == pytest.approx(spent_before, abs=1e-4) and attempt.seconds > attempt.priced_from > 0


def test_a_machine_above_the_ceiling_serves_nothing(machine: CloudMachine, catalog: Publisher) -> None:
    trained(machine)
    catalog.gpu_usd[HERE] = DEAR
    code, said = machine.run("serve.sh")
    assert (code, machine.called("serve")) == (2, []) and "above max_hourly_cost ($2/h)" in said
    assert "launch again, which goes by today's prices" in said


def test_a_machine_above_the_ceiling_begins_no_sweep(machine: CloudMachine, catalog: Publisher) -> None:
    catalog.gpu_usd[HERE] = DEAR
    code, said = machine.run("sweep.sh", SWEEP="lora.r=2,4", EVALUATE="0")
    assert (code, machine.called("train")) == (75, []), said
    assert "this machine is above max_hourly_cost ($2/h)" in said and "goes on with its next machine" in said
    (attempt,) = attempts(machine, "too-dear/run")
    assert attempt.reason == "too_dear"
    assert not (machine.bucket / "runs/sweeps").exists()


def test_the_refusal_to_serve_has_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "look", lambda _: None)
    monkeypatch.setattr(serve, "now_too_dear", lambda: TooDear("above max_hourly_cost", True))
    settings = read_settings({"HOME": str(tmp_path), "FINETUNE_MOUNT": str(tmp_path), "RUN_NAME": "run"})
    with raises("price.too_dear"):
        serve.serve(settings)
