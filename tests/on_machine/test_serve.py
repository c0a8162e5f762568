"""on_machine/serve.sh: what is served, until when, and the daily budget in the bucket. `finetune serve` is a stand-in."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from finetune.budget.attempts import Account
from finetune.budget.ledger import Ledger
from finetune.job.serve import DAILY, DailyBudget, _export
from finetune.job.settings import read_settings
from finetune.machine.billed_time import MARKER, machine_age, machine_identity
from finetune.machine.price import MachinePrice
from tests.helpers.errors import raises
from tests.helpers.machine_fixture import CloudMachine, begin_run, rent, wait_for

SERVES = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
open(os.environ["CALLS"] + ".ready", "w").close()
time.sleep(60)
"""


def today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")


def prices(usd_per_hour: float) -> str:
    offer = {"gpu": "L4", "zone": "us-central1-a", "spot": False, "usd_per_hour": usd_per_hour}
    return json.dumps({"basis": "a test", "ceiling_usd_per_hour": None, "offers": [offer]})


@pytest.fixture
def machine(tmp_path: Path) -> CloudMachine:
    machine = rent(tmp_path)
    marker = machine.home / MARKER
    marker.parent.mkdir(parents=True)
    marker.write_text(json.dumps({"machine": machine_identity(), "seconds": machine_age()}))
    folder = begin_run(machine, "done")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").touch()
    machine.env |= {"FINETUNE_PRICES": prices(0.36), "MAX_RUN_USD": "25"}
    return machine


def account(machine: CloudMachine, day: str = "") -> Account:
    return Ledger(machine.bucket / "serving" / (day or today())).account()


def spend(machine: CloudMachine, usd: float, day: str = "") -> None:
    """What an earlier machine has cost on a day."""
    ledger = Ledger(machine.bucket / "serving" / (day or today()), "serve")
    log = ledger.new_attempt(ledger.next_attempt(), machine={}, price=MachinePrice(usd, "b"), resumed_step=None)
    log.begin(0.0)
    log.end(3600.0, "ended", None)


def put_export(machine: CloudMachine, weights: bytes = b"w" * 100) -> Path:
    folder = machine.run_folder() / "exports" / "merged"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "export.json").write_text(json.dumps({"first": weights[:1].decode()}))
    return folder


def test_a_run_is_served_until_nobody_asks(machine: CloudMachine) -> None:
    code, said = machine.run("serve.sh", SKYPILOT_CLUSTER_INFO='{"cluster_name": "mine"}')
    assert code == 0, said
    assert machine.calls() == [f"serve {machine.run_folder()} --port 8000 --idle-minutes 30"]
    assert "ssh -L 8000:localhost:8000 mine" in said and "nobody asks any more" in said
    (attempt,) = account(machine).attempts
    assert (attempt.work, attempt.reason, attempt.usd_per_hour) == ("serve", "ended", 0.36)
    assert 0 < attempt.seconds < 60


def test_databases_execution_and_key_are_passed_on(machine: CloudMachine) -> None:
    settings = {"DATABASES": "shop=data/shop.sqlite crm=/bucket/crm.sqlite", "EXECUTE": "1", "IDLE_MINUTES": "5.5"}
    code, said = machine.run("serve.sh", FINETUNE_API_KEY="a-secret-key-of-mine", **settings)
    assert code == 0, said
    assert machine.calls() == [
        f"serve {machine.run_folder()} --port 8000 --idle-minutes 5.5 --db shop=data/shop.sqlite --db crm=/bucket/crm.sqlite "
        "--execute --api-key-env FINETUNE_API_KEY"
    ]
    assert "a-secret-key-of-mine" not in said
    machine.run("serve.sh", FINETUNE_API_KEY="", EXECUTE="0", DATABASES="")
    assert machine.calls()[1] == f"serve {machine.run_folder()} --port 8000 --idle-minutes 5.5"


def test_without_a_name_the_newest_trained_run_is_served(machine: CloudMachine) -> None:
    code, said = machine.run("serve.sh", RUN_NAME="", SKYPILOT_TASK_ID="job")
    assert code == 0 and machine.called("serve")[0].startswith(f"serve {machine.run_folder()} "), said


@pytest.mark.parametrize(
    ("variable", "value"),
    [("IDLE_MINUTES", "0"), ("IDLE_MINUTES", "never"), ("EXECUTE", "yes"), (DAILY, "-1"), (DAILY, "0"), (DAILY, "5 $")],
)
def test_an_invalid_setting_is_refused_before_anything_is_loaded(
    machine: CloudMachine, variable: str, value: str
) -> None:
    code, said = machine.run("serve.sh", **{variable: value})
    assert (code, machine.calls(), len(said.splitlines())) == (2, [], 1), said
    assert variable in said
    assert not (machine.bucket / "serving").exists()


# --- exports


def test_an_export_is_copied_to_the_local_disk_once(machine: CloudMachine) -> None:
    put_export(machine)
    copy = machine.home / ".finetune" / "exports" / "merged"
    for copied in (True, False):
        code, said = machine.run("serve.sh", RUN_NAME="", EXPORT="runs/run/exports/merged/")
        assert code == 0 and ("export: " in said) == copied, said
        assert machine.calls()[-1].startswith(f"serve {copy} --port 8000")
        assert (copy / "model.safetensors").read_bytes() == b"w" * 100
    put_export(machine, b"v" * 100)  # as long, of another run
    code, said = machine.run("serve.sh")
    assert code == 0 and (copy / "model.safetensors").read_bytes() == b"v" * 100, said


@pytest.mark.parametrize("name", ["runs/run/exports/none", "../other", "/etc", "runs/../../x", "runs/run/run.json"])
def test_an_export_that_is_not_in_the_bucket_is_refused(machine: CloudMachine, name: str) -> None:
    code, said = machine.run("serve.sh", RUN_NAME="", EXPORT=name)
    assert (code, machine.calls()) == (2, []), said
    assert said.splitlines()[-1].startswith(f"finetune: EXPORT: {name!r}: no such folder in the bucket")


def test_a_run_and_an_export_at_once_are_refused(machine: CloudMachine) -> None:
    put_export(machine)
    code, said = machine.run("serve.sh", EXPORT="runs/run/exports/merged")
    assert (code, machine.calls()) == (2, []) and "EXPORT and RUN_NAME: expected one of them" in said


def test_a_half_copied_export_is_not_served(machine: CloudMachine) -> None:
    put_export(machine)
    copies = machine.home / ".finetune" / "exports"
    (copies / ".merged.part").mkdir(parents=True)
    (copies / ".merged.part" / "model.safetensors").write_bytes(b"half")
    (copies / "merged").mkdir()
    (copies / "merged" / "model.safetensors").write_bytes(b"w" * 99)
    code, said = machine.run("serve.sh", RUN_NAME="", EXPORT="runs/run/exports/merged")
    assert code == 0, said
    assert sorted(path.name for path in copies.iterdir()) == ["merged"]
    assert (copies / "merged" / "model.safetensors").stat().st_size == 100


# --- limits


@pytest.mark.parametrize("code", [1, 2, 75])
def test_the_exit_code_of_a_server_that_fails_is_that_of_the_job(machine: CloudMachine, code: int) -> None:
    assert machine.run("serve.sh", FAKE_CODE=str(code))[0] == code


def test_the_hours_end_it_and_the_job_succeeds(machine: CloudMachine) -> None:
    code, said = machine.run("serve.sh", MAX_HOURS="0.0008", FAKE_WORK=SERVES)
    assert code == 0, said
    assert "stopped at a limit: MAX_HOURS=0.0008, MAX_RUN_USD=25" in said


def test_a_second_machine_on_the_same_day_counts_the_first(machine: CloudMachine) -> None:
    spend(machine, 4.995)
    code, said = machine.run("serve.sh")
    assert (code, machine.calls()) == (2, []), said
    line = said.splitlines()[-1]
    assert (
        line.startswith(f"finetune: MAX_USD_PER_DAY=5: used up for {today()} (UTC)") and "launch again tomorrow" in line
    )
    assert [(one.name, one.reason) for one in account(machine).attempts] == [
        ("serving 1", "ended"),
        ("serving 2", "refused"),
    ]
    code, said = machine.run("serve.sh", MAX_USD_PER_DAY="6")
    assert code == 0 and machine.called("serve"), said


def test_another_day_has_its_own_budget(machine: CloudMachine) -> None:
    spend(machine, 400.0, "2026-01-01")
    code, said = machine.run("serve.sh")
    assert code == 0 and machine.called("serve"), said


def test_the_daily_budget_ends_the_server_in_time(machine: CloudMachine) -> None:
    """$3.60 an hour: 15 cents are 150 s, of which the watchdog keeps 20."""
    spend(machine, 4.85)
    machine.env |= {"FINETUNE_PRICES": prices(3.6), "FAKE_WORK": SERVES, "FINETUNE_HEARTBEAT_SECONDS": "1"}
    process = machine.start("serve.sh")
    wait_for(machine.folder / "calls.ready")
    spend(machine, 0.14)  # another machine, meanwhile; seen at the next heartbeat
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "stopped at a limit: MAX_USD_PER_DAY: $4.99 of $5.00" in said
    assert (account(machine).usd or 0) < 5.0


def test_it_ends_with_its_job(machine: CloudMachine) -> None:
    machine.env["FAKE_WORK"] = SERVES
    process = machine.start("serve.sh")
    wait_for(machine.folder / "calls.ready")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0, said
    assert account(machine).attempts[0].reason == "ended"


# --- midnight


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process as a machine that costs $0.36 an hour."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FINETUNE_PRICES", prices(0.36))
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    (tmp_path / MARKER.parent).mkdir()
    (tmp_path / MARKER).write_text(json.dumps({"machine": machine_identity(), "seconds": machine_age()}))
    return tmp_path


def test_at_midnight_a_new_day_begins_with_its_own_budget_and_no_second_is_billed_twice(here: Path) -> None:
    began, days = machine_age() or 0.0, ["2026-11-29"]
    budget = DailyBudget(here / "serving", Decimal(5), today=lambda: days[-1])
    with budget:
        assert not budget.over
        days.append("2026-11-30")
        assert not budget.over and not budget.overdue
    lasted = (machine_age() or 0.0) - began
    accounts = [Ledger(here / "serving" / day).account() for day in days]
    assert [[one.reason for one in account.attempts] for account in accounts] == [["next day"], ["ended"]]
    seconds = [account.hours * 3600 for account in accounts]
    assert all(one >= 0 for one in seconds) and sum(seconds) == pytest.approx(lasted, abs=1.0)


def test_a_new_day_whose_ledger_cannot_be_kept_ends_the_server(here: Path) -> None:
    days = ["2026-11-29"]
    with DailyBudget(here / "serving", Decimal(5), today=lambda: days[-1]) as budget:
        (here / "serving" / "2026-11-30").write_text("a file")
        days.append("2026-11-30")
        assert budget.over.startswith("the ledger of a new day cannot be kept: ")


def test_a_used_up_budget_is_refused_with_its_code(here: Path) -> None:
    ledger = Ledger(here / "serving" / today(), "serve")
    log = ledger.new_attempt(1, machine={}, price=MachinePrice(5.0, "b"), resumed_step=None)
    log.begin(3600.0)
    with raises("budget.exhausted", match="^MAX_USD_PER_DAY=5: used up"), DailyBudget(here / "serving", Decimal(5)):
        pytest.fail("it is used up")


def test_a_machine_without_a_price_is_bounded_in_hours_only(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FINETUNE_PRICES")
    with DailyBudget(here / "serving", Decimal("0.01")) as budget:
        assert not budget.over
    assert not (here / "serving").exists()


def test_an_export_that_is_missing_or_cannot_be_copied_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(read_settings({"RUN_NAME": "my-run"}), mount=tmp_path / "bucket", state=tmp_path / "state")
    with raises("job.no_export", match="no such folder in the bucket"):
        _export("runs/other/exports/merged", settings)
    folder = tmp_path / "bucket" / "exports" / "merged"
    folder.mkdir(parents=True)
    (folder / "export.json").write_text("{}")

    def broken(*_: object) -> None:
        raise shutil.Error([("model.safetensors", "there", "Input/output error")])

    monkeypatch.setattr(shutil, "copytree", broken)
    with raises("job.export_not_copied", match="Input/output error"):
        _export("exports/merged", settings)
    assert not (tmp_path / "state" / "exports" / "merged").exists()
