"""The cost table and the prompt before scenarios on a real project, and Ctrl-C during them, with stand-ins for gcloud and sky."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from finetune.cloud.catalog.disks import disk_usd_per_hour
from finetune.cloud.catalog.offers import load_catalog
from tests.emulated_cloud.real_cost import SCENARIOS, Scenario, admitted, controller_usd_per_hour, cost, table
from tests.emulated_cloud.real_sky import PROGRAMS
from tests.emulated_cloud.real_stand_in import StandIn, instance
from tests.helpers.catalog_fixture import gpu, host, lay_out_catalog, needs_skypilot, write_prices
from tests.helpers.sky_home import PROJECT, fake_gcloud_home

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TASK = """\
resources:
  infra: gcp
  accelerators: A100:1
  instance_type: a2-highgpu-1g
  disk_size: 200
  disk_tier: medium
  max_hourly_cost: 4.00
  ordered:
    - {use_spot: true}
    - {use_spot: false}
"""
DISK = disk_usd_per_hour(200, "medium", "us-central1", "a2-highgpu-1g")
FOREIGN = instance("prod-database", "us-central1-a", "n1-highmem-8", spot=False)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a task in sky/, a home with a price catalog: $1.20 spot, $3.50 and (in asia) $4.50 on demand, and disk."""
    (tmp_path / "sky").mkdir()
    (tmp_path / "sky" / "one.yaml").write_text(TASK)
    zones = {"us-central1-a": (3.0, 1.0), "asia-east1-a": (4.0, 1.4)}
    rows = [line for zone, (usd, spot) in zones.items() for line in (host(zone), gpu(zone, usd, spot))]
    write_prices(tmp_path, [*rows, "n2-standard-4,4.0,16.0,,,,us-central1,us-central1-a,0.19,0.05"])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SKY_RUNTIME_DIR", raising=False)
    return tmp_path


def test_a_scenario_costs_at_most_the_dearest_machine_under_the_ceiling(root: Path) -> None:
    catalog = load_catalog()
    found = admitted(root / "sky" / "one.yaml", catalog)
    assert [(offer.zone, offer.spot) for offer in found] == [
        ("us-central1-a", True),
        ("asia-east1-a", True),
        ("us-central1-a", False),
    ], "the one above $4.00 is left out"
    whole = cost(Scenario("test_x", "", "one", 30), catalog, root)
    assert whole.usd == pytest.approx((3.5 + DISK) / 2)
    spot = cost(Scenario("test_x", "", "one", 30, spot=True), catalog, root)
    assert spot.usd == pytest.approx((1.6 + DISK) / 2, abs=1e-3)
    managed = cost(Scenario("test_x", "", "one", 30, managed=True), catalog, root)
    assert managed.usd - whole.usd == pytest.approx(controller_usd_per_hour(catalog) / 2)
    assert controller_usd_per_hour(catalog) > 0.19
    (root / ".sky" / "config.yaml").write_text("jobs: {controller: {consolidation_mode: true}}")
    assert cost(Scenario("test_x", "", "one", 30, managed=True), catalog, root).usd == whole.usd
    assert cost(Scenario("test_x", ""), catalog, root).usd == 0


def test_the_table_says_what_its_figures_are(root: Path) -> None:
    catalog = load_catalog()
    scenarios = [Scenario("test_first", "some", "one", 30), Scenario("test_second", "more", "one", 60)]
    text = table([cost(one, catalog, root) for one in scenarios], "my-project", "a catalog of 2026-11-01")
    assert "On project my-project, in US dollars, estimated" in text and "a catalog of 2026-11-01" in text
    row = next(line for line in text.splitlines() if line.startswith("first "))
    assert row.split() == ["first", "some", "A100", "on", "demand,", "us-central1-a", "1.227", "3.527", "30", "1.76"]
    assert text.partition("all of them")[2].split()[0] == f"{1.5 * (3.5 + DISK):.2f}"
    assert "stock-outs cannot be ordered from Google" in text


def test_every_real_scenario_has_its_price() -> None:
    tree = ast.parse((HERE / "real_scenarios.py").read_text(encoding="utf-8"))
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert functions == [one.test for one in SCENARIOS]
    for one in SCENARIOS:
        assert cost(one, load_catalog()).usd > 0 or not one.task
        assert (one.minutes > 0) == bool(one.task)


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """The environment of a user with a login, a catalog that was fetched today, and another user's machine in the project."""
    stand_in = StandIn(tmp_path / "stand-in").lay_out(machines=[FOREIGN], launch_seconds=100)
    home = tmp_path / "home"
    home.mkdir()
    env = fake_gcloud_home(home)
    lay_out_catalog(home, fetched=datetime.now(UTC))
    return env | {"PATH": f"{stand_in.bin}{os.pathsep}{env['PATH']}", PROGRAMS: str(stand_in.bin), "COLUMNS": "200"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.emulated_cloud.real_run", *arguments]


def run(env: dict[str, str], *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=env, input=typed, capture_output=True, text=True, timeout=120, check=False
    )


def test_another_project_than_skypilots_is_refused(env: dict[str, str], tmp_path: Path) -> None:
    done = run(env, "other-project", "-k", "ceiling", typed="yes\n")
    expected = f"cloud-test: GCP_PROJECT=other-project, but SkyPilot would launch in {PROJECT}; first: gcloud config set project"
    assert done.returncode == 2 and expected in done.stderr
    assert not StandIn(tmp_path / "stand-in").calls()


@needs_skypilot
def test_without_a_yes_nothing_is_launched(env: dict[str, str], tmp_path: Path) -> None:
    done = run(env, PROJECT, "-k", "budget or ceiling", typed="no\n")
    assert done.returncode == 2 and "cloud-test: no `yes`: nothing was launched" in done.stderr
    assert "a_budget_that_runs_out" in done.stdout and "a_ceiling_below_every_price" in done.stdout
    assert "train_a100_as_typed" not in done.stdout and "all of them" in done.stdout
    assert "fetched" in done.stdout, "the prices' date"
    assert not StandIn(tmp_path / "stand-in").calls()
    none = run(env, PROJECT, "-k", "nosuch", typed="yes\n")
    assert none.returncode == 2 and "not among those that can run on a real project: train_a100_as_typed" in none.stderr


@needs_skypilot
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_takes_down_what_was_launched(env: dict[str, str], tmp_path: Path, number: signal.Signals) -> None:
    stand_in = StandIn(tmp_path / "stand-in")
    session = subprocess.Popen(
        command(PROJECT, "-k", "as_typed"), env=env | {"YES": "1"}, stdout=subprocess.PIPE, text=True, start_new_session=True
    )  # fmt: skip
    stand_in.wait_for("sky launch")
    (launch,) = stand_in.calls("sky launch")
    name = launch.split(" -c ")[1].split()[0]
    stand_in.lay_out(machines=[FOREIGN, instance(f"{name}-0f-head-x-compute", "us-east1-b", "a2-highgpu-1g")])
    if number == signal.SIGINT:
        os.killpg(session.pid, number)  # as a terminal does
    else:
        session.send_signal(number)
    out, _ = session.communicate(timeout=120)
    print(out)
    assert session.returncode == 1
    assert name.startswith("ftreal-") and name.endswith("-whole")
    assert set(stand_in.calls("sky down")) == {f"sky down -y {name}"}
    assert stand_in.machines() == ["prod-database"]
    assert f"no machine and no disk of {name.removesuffix('whole')}... is left" in out
    assert "the runs stay: gcloud storage rm --recursive 'gs://" in out
