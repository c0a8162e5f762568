"""What a rented machine costs: the price table of the launch, Google's metadata server and nvidia-smi, each a real one."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from finetune.cli import main
from finetune.cloud.instance import KEPT, VARIABLE, Machine, gpu_of, machine_price, price_in, this_machine, wall_hours
from finetune.errors import UserError

OFFERS = [
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


def smi(home: Path, gpu: str) -> None:
    program = home / "bin" / "nvidia-smi"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n[ -n '{gpu}' ] && echo '580.1, 15360, 7.5, {gpu}'\n")
    program.chmod(0o755)


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Answers as Google's metadata server does: only with its header, 404 for what it does not know."""
    values: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            value = values.get(self.path.removeprefix("/computeMetadata/v1/instance/"))
            allowed = self.headers.get("Metadata-Flavor") == "Google"
            self.send_response(403 if not allowed else 404 if value is None else 200)
            self.end_headers()
            if allowed and value is not None:
                self.wfile.write(value.encode())

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    yield values
    server.shutdown()
    server.server_close()


def test_a_machine_that_is_wholly_known_costs_its_own_price() -> None:
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
def test_what_is_not_known_counts_as_the_dearest_that_it_could_be(machine: Machine, usd: float, says: str) -> None:
    price = price_in(TABLE, machine)
    assert price.usd_per_hour == usd and says in price.basis


def test_a_machine_outside_the_table_costs_the_ceiling() -> None:
    elsewhere = Machine("asia-east1-a", True, "T4")
    assert price_in(TABLE, elsewhere).usd_per_hour == 3.5
    assert (
        price_in(TABLE | {"ceiling_usd_per_hour": None}, elsewhere).usd_per_hour == 1.1
    )  # the dearest that was allowed
    assert "ceiling" in price_in(TABLE, elsewhere).basis


def test_zone_spot_and_gpu_come_from_the_metadata_server_and_nvidia_smi(
    metadata: dict[str, str], tmp_path: Path
) -> None:
    metadata |= {"zone": "projects/123/zones/europe-west4-b", "scheduling/preemptible": "TRUE"}
    smi(tmp_path, "Tesla T4")
    assert this_machine() == Machine("europe-west4-b", True, "T4")


def test_skypilot_knows_the_zone_too(metadata: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    metadata["scheduling/preemptible"] = "FALSE"
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
    assert machine_price() is None
    kept = tmp_path / KEPT
    kept.parent.mkdir()
    kept.write_text(json.dumps(TABLE | {"offers": OFFERS[:1]}))
    found = machine_price()
    assert found and found.usd_per_hour == 0.3
    monkeypatch.setenv(VARIABLE, json.dumps(TABLE | {"offers": OFFERS[2:3]}))
    found = machine_price()
    assert found and found.usd_per_hour == 1.1


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps(TABLE | {"offers": [{"usd_per_hour": 1}]}),
                                  json.dumps(TABLE | {"offers": [OFFERS[0] | {"usd_per_hour": "x"}]})])  # fmt: skip
def test_a_broken_table_is_an_error_not_a_free_machine(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(UserError, match=f"^{VARIABLE}: .*launch again"):
        machine_price()


def test_hours_that_a_budget_buys_count_from_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.cloud.instance._uptime_hours", lambda: 0.5)
    price = price_in(TABLE, Machine("us-central1-a", False, "T4"))  # $0.80
    assert wall_hours(price, max_run_usd=8.0, max_hours=None) == pytest.approx(9.5)
    assert wall_hours(price, max_run_usd=8.0, max_hours=2.0) == 2.0
    assert wall_hours(price, max_run_usd=0.1, max_hours=2.0) == 0.0
    assert wall_hours(None, max_run_usd=8.0, max_hours=2.0) == 2.0
    assert wall_hours(None, max_run_usd=8.0, max_hours=None) is None


def test_the_command_prints_price_and_hours(
    metadata: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["machine"]) == 2
    assert "not launched by SkyPilot under our policy" in capsys.readouterr().err
    monkeypatch.setenv(VARIABLE, json.dumps(TABLE))
    metadata |= {"zone": "projects/1/zones/us-central1-a", "scheduling/preemptible": "TRUE"}
    smi(tmp_path, "Tesla V100-SXM2-16GB")
    assert main(["machine", "--max-hours", "3"]) == 0
    out = capsys.readouterr().out
    assert "V100, spot, us-central1-a: $1.1000 an hour (a catalog of today)" in out and "may go on for 3.00 h" in out
    assert main(["machine", "--wall-hours", "--max-hours", "3"]) == 0
    assert float(capsys.readouterr().out) == 3.0
    assert main(["machine", "--wall-hours"]) == 2
    for wrong in ("0", "-1", "nan", "inf", "much"):
        with pytest.raises(SystemExit, match="2"):
            main(["machine", "--max-hours", wrong])
