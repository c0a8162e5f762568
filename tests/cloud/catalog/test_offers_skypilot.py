"""Compared with SkyPilot itself: the same prices, machines, disks and file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune.cloud.catalog import csv_file
from finetune.cloud.catalog import offers as offers_module
from finetune.cloud.catalog.disks import TIERS, disk_type
from finetune.cloud.catalog.machine_types import N1_LIMITS, NOT_ON_DEMAND, OWN_MACHINES, fits
from finetune.machine.gpus import MACHINES
from tests.helpers.catalog_fixture import CATALOG, lay_out_catalog, needs_skypilot, price_rows, shared_catalog
from tests.helpers.errors import raises

pytestmark = needs_skypilot
ROOT = Path(__file__).resolve().parents[3]
UNUSED = {4: {"n1-highmem-8"}, 8: set()}
"""N1 machines with so many GPUs that no task of ours uses, left out to save time."""
OLD = {(gpu, 1) for gpu in ("A100", "A100-80GB", "L4", "T4", "V100")}
DISK_MACHINES = (
    *("n1-highmem-8", "g2-standard-8", "a2-highgpu-1g", "a2-ultragpu-1g", "a3-highgpu-1g", "a3-ultragpu-8g"),
    *("n2-standard-8", "n2-standard-64", "n4-standard-8", "a4-highgpu-8g", "g4-standard-48", "e2-standard-4"),
)


def ask(program: str, home: Path, *arguments: str, asked: Any = None) -> str:
    """Standard output of a program in tests/helpers/ that imports SkyPilot."""
    environment = {name: value for name, value in os.environ.items() if name != "SKY_RUNTIME_DIR"}
    environment |= {"HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1", "NO_PROXY": "127.0.0.1"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "tests" / "helpers" / program), *arguments]
    done = subprocess.run(
        command, input=json.dumps(asked), cwd=home, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def all_offers(folder: Path) -> list[offers_module.Offer]:
    """Every offer of a catalog: all GPUs on all hosts that can have them, spot and on-demand."""
    catalog = offers_module.load_catalog(allow_snapshot=False)
    rows = [row for row in price_rows(folder) if row["GpuInfo"]]
    gpus = sorted({(row["AcceleratorName"], int(row["AcceleratorCount"])) for row in rows})
    offers = []
    for name, count in gpus:
        for machine in set(catalog.machines_for(name, count)) - UNUSED.get(count, {"n1-highmem-16"}):
            offers += catalog.offers(name, machine=machine, count=count)
    return offers


def compared(home: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[offers_module.Offer], dict[str, Any]]:
    """(our offers of the catalog under home, SkyPilot's answers about them and about everything else that is asked)."""
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SKY_RUNTIME_DIR", raising=False)
    folder = home / CATALOG
    offers = all_offers(folder)
    machines = sorted({row["InstanceType"] for row in price_rows(folder) if row["InstanceType"]})
    gpus = sorted({row["AcceleratorName"] for row in price_rows(folder) if row["GpuInfo"]})
    asked = {
        "prices": [[o.gpu, o.count, o.machine, o.zone, o.spot] for o in offers],
        "attach": [[gpu, count, machine] for gpu in gpus for count in (1, 2, 4, 8) for machine in machines],
        "zones": [list(sold) for sold in sorted({(o.gpu, o.count, o.machine, o.spot) for o in offers})],
        "disks": [[machine, tier] for machine in DISK_MACHINES for tier in TIERS],
    }
    return offers, asked | {"said": json.loads(ask("sky_referee.py", home, asked=asked).splitlines()[-1])}


def change(home: Path, old: str, new: str) -> None:
    path = home / CATALOG / csv_file.VMS
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[offers_module.Offer], dict[str, Any]]:
    home = tmp_path_factory.mktemp("home")
    lay_out_catalog(home)
    change(home, ",us-east4-b,0.37,0.1566\n", ",us-east4-b,0.37,\n")  # a T4 that is not sold as spot
    change(home, "n1-highmem-8,8.0,52.0,,,,us-west1,us-west1-a,0.47321,0.14366\n", "")  # T4 and V100 without a host
    with pytest.MonkeyPatch.context() as patch:
        return compared(home, patch)


Compared = tuple[list[offers_module.Offer], dict[str, Any]]


def assert_same_prices(offers: list[offers_module.Offer], said: list[float]) -> None:
    differing = [
        (offer, usd)
        for offer, usd in zip(offers, said, strict=True)
        if offer.host_usd + offer.gpu_usd != pytest.approx(usd, abs=1e-9)
    ]
    assert not differing


def test_every_offer_has_skypilots_price(small: Compared) -> None:
    offers, asked = small
    kinds = {(offer.gpu, offer.count, offer.machine) for offer in offers}
    ours = {(one.gpu.name, one.count, one.machine) for name, one in MACHINES.items() if name != "RTXPRO6000"}
    assert ours <= kinds, "every machine of ours that the snapshot has"
    one_gpu = [offer for offer in offers if (offer.gpu, offer.count) in OLD]
    assert len(one_gpu) == 125  # 65 zones with a GPU, two of them without a host; spot and on-demand, one not as spot
    assert not [offer for offer in offers if offer.machine in NOT_ON_DEMAND and not offer.spot]
    assert_same_prices(offers, asked["said"]["prices"])


def test_the_offers_are_in_exactly_the_zones_that_skypilot_would_try(small: Compared) -> None:
    offers, asked = small
    for (gpu, count, machine, spot), theirs in zip(asked["zones"], asked["said"]["zones"], strict=True):
        ours = [o.zone for o in offers if (o.gpu, o.count, o.machine, o.spot) == (gpu, count, machine, spot)]
        assert sorted(ours) == theirs


@pytest.mark.repeat
def test_the_shared_slice_has_skypilots_prices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shared_catalog()
    if source is None:
        pytest.skip("the shared catalog is not beside this checkout")
    lay_out_catalog(tmp_path, source=source)
    offers, asked = compared(tmp_path, monkeypatch)
    assert len(offers) > 700
    assert_same_prices(offers, asked["said"]["prices"])
    assert_same_machines(asked)


def assert_same_machines(asked: dict[str, Any]) -> None:
    sizes = {
        row["InstanceType"]: (float(row["vCPUs"]), float(row["MemoryGiB"]))
        for row in price_rows(csv_file.skypilot_folder())
        if row["InstanceType"]
    }
    ours = [fits(gpu, count, machine, sizes[machine]) for gpu, count, machine in asked["attach"]]
    assert ours == asked["said"]["attach"]
    assert 0 < sum(ours) < len(ours)


def test_a_machine_fits_a_gpu_exactly_where_skypilot_attaches_it(
    small: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out_catalog(tmp_path)
    monkeypatch.setenv("SKY_RUNTIME_DIR", str(tmp_path))
    assert_same_machines(small[1])


def test_the_tables_of_machines_are_skypilots(small: Compared) -> None:
    said = small[1]["said"]
    own = {gpu: {str(n): list(machines) for n, machines in rows.items()} for gpu, rows in OWN_MACHINES.items()}
    assert own == said["own_machines"]
    for gpu, limits in N1_LIMITS.items():
        for count, limit in limits.items():
            assert list(limit) == said["n1_limits"][gpu][str(count)]


def test_a_tier_is_the_disk_that_skypilot_uses_or_is_refused(small: Compared) -> None:
    for (machine, tier), theirs in zip(small[1]["disks"], small[1]["said"]["disks"], strict=True):
        if theirs == "pd-extreme" or (theirs == "hyperdisk-balanced" and machine.startswith("a3-highgpu")):
            with raises("price.unknown"):
                disk_type(tier, machine)
        else:
            assert disk_type(tier, machine) == theirs, (machine, tier)


def test_skypilot_reads_the_same_file(small: Compared) -> None:
    said = small[1]["said"]
    assert said["schema"] == csv_file.SCHEMA
    assert said["path"].endswith(str(CATALOG / csv_file.VMS))
    assert said["hours"] == offers_module.REFRESH_HOURS


def test_a_refresh_fetches_missing_files_and_survives_without_network(tmp_path: Path) -> None:
    lay_out_catalog(tmp_path / "hosted")
    home = tmp_path / "home"
    home.mkdir()
    serve = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "hosted" / CATALOG.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server, ThreadingHTTPServer(("127.0.0.1", 0), serve) as dead:
        urls = [f"http://127.0.0.1:{each.server_port}" for each in (server, dead)]
        dead.server_close()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        lines = ask("sky_refresh.py", home, *urls).splitlines()
        server.shutdown()
    none, fetched, kept = [line.removeprefix("result: ") for line in lines if line.startswith("result: ")]
    code, _, said = none.partition(": ")
    assert code == "catalog.not_fetched"
    assert said.startswith(f"{home / CATALOG / 'gcp' / 'vms.csv'}: SkyPilot could not fetch it")
    assert fetched.startswith("SkyPilot's catalog, fetched ") and fetched.endswith("(today)")
    assert kept == fetched
    assert (home / CATALOG / "common" / "accelerators.csv").exists()
