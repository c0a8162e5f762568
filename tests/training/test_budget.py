"""Ceilings in hours and dollars: they hold over all attempts and even if the training loop hangs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.errors import reported
from tests.helpers.train_helpers import FakeTime, adapter_of, at_step, change, hanging_program, record_of, steps_in

torch = pytest.importorskip("torch")

from finetune.budget.ledger import Ledger  # noqa: E402
from finetune.checkpoint import folders as checkpoint_folders  # noqa: E402
from finetune.cli.main import main  # noqa: E402
from finetune.config.load import config_hash, load_config  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_keys")
ROOT = Path(__file__).resolve().parents[2]
ConfigWriter = Callable[..., Path]
Shown = pytest.CaptureFixture[str]

OFTEN = {"every_minutes": 0.5}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeTime:
    return FakeTime(monkeypatch, tmp_path / "home")


def pass_time(clock: FakeTime, step: int, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the meter to `seconds` in the middle of that step, and wait until the watchdog has read it."""

    def later() -> None:
        clock.seconds = seconds
        time.sleep(0.3)

    at_step(step, later, monkeypatch)


def test_a_run_stops_at_its_hours_and_resumes_when_they_are_raised(
    tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown, clock: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(budget={"max_hours": 1.0, "usd_per_hour": 36.0}, checkpoint=OFTEN)
    with monkeypatch.context() as patched:
        pass_time(clock, 2, 3600 - 15, patched)
        assert main(["train", str(config)]) == 0
    run = tmp_path / "runs" / "tiny-001"
    stopped = record_of(run)
    assert (stopped["status"], stopped["steps"]) == ("budget_stop", {"done": 2, "planned": 4})
    assert stopped["stop"]["reason"] == "budget"
    assert stopped["spent_usd"] == pytest.approx(36 * 3585 / 3600, abs=0.001)
    assert "measured hours x $36/h, budget.usd_per_hour of the config" in stopped["spent_basis"]
    assert [path.name for path in checkpoint_folders.newest_first(run / "checkpoints")] == ["step-2"]
    first_adapter = adapter_of(run)
    capsys.readouterr()

    clock.seconds = 0.0  # another machine
    with reported("budget.exhausted"):
        assert main(["train", "--resume", str(run)]) == 2  # the ceiling holds over all attempts
    message = capsys.readouterr().err
    assert "between two checkpoints; raise budget.max_hours to go on" in message and "config.yaml" in message
    assert record_of(run) == stopped

    change(run / "config.yaml", "budget", max_hours=2.0)
    assert main(["train", "--resume", str(run)]) == 0
    assert "budget.max_hours: 1.0 -> 2.0: applies" in capsys.readouterr().err
    record = record_of(run)
    assert (record["status"], record["attempts"]) == ("done", 2)
    assert steps_in(record) == [1, 2, 3, 4]
    assert record["config"]["budget"]["max_hours"] == 2.0
    assert record["config_hash"] == config_hash(load_config(run / "config.yaml")) != stopped["config_hash"]
    assert record["spent_usd"] == pytest.approx(stopped["spent_usd"], abs=0.001)
    assert [(row["from_step"], row["to_step"], row["reason"]) for row in record["attempt_log"]] == [
        (0, 2, "budget_stop"),
        (2, 4, "done"),
    ]
    assert adapter_of(run) != first_adapter


def test_a_run_stops_at_its_dollars(
    tiny_config: ConfigWriter, tmp_path: Path, clock: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(budget={"max_run_usd": 10.0, "usd_per_hour": 36.0}, checkpoint=OFTEN)
    pass_time(clock, 3, 1000 - 12, monkeypatch)
    assert main(["train", str(config)]) == 0
    record = record_of(tmp_path / "runs" / "tiny-001")
    assert (record["status"], record["steps"]["done"]) == ("budget_stop", 3)
    assert 9.8 < record["spent_usd"] <= 10.0
    assert record["spending"]["ceiling_usd"] == 10.0
    assert Ledger(tmp_path / "runs" / "tiny-001" / "ledger").account().attempts[0].reason == "budget_stop"


def test_a_budget_below_the_work_between_two_saves_is_refused_before_anything_is_loaded(
    tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown, clock: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.training.run.load_parts", lambda inputs: pytest.fail("something is loaded"))
    with reported("budget.exhausted"):
        assert main(["train", str(tiny_config(budget={"max_hours": 0.1}))]) == 2
    message = capsys.readouterr().err
    assert (
        "less than the 10.0 min between two checkpoints; raise budget.max_hours to go on (with --max-run-usd or"
        in message
    )
    assert "config.yaml" not in message, "which is gone"
    assert not (tmp_path / "runs").exists()


def test_an_interrupted_run_without_budget_for_more_ends_with_an_adapter(
    tiny_config: ConfigWriter, tmp_path: Path, clock: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A managed job restarts after a preemption; exit code 0, so that it is not restarted again."""
    config = tiny_config(budget={"max_hours": 1.0}, checkpoint=OFTEN | {"save_steps": 2})

    def fire() -> None:
        clock.seconds = 3500.0
        raise RuntimeError("the machine is gone")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        at_step(4, fire, patched)
        main(["train", str(config)])
    run = tmp_path / "runs" / "tiny-001"
    clock.seconds = 80.0  # boot and set-up of the next machine
    assert main(["train", "--resume", str(run)]) == 0
    record = record_of(run)
    assert (record["status"], record["stop"]["reason"]) == ("budget_stop", "budget")
    saved = (run / "checkpoints" / "step-2" / "adapter_model.safetensors").read_bytes()
    assert adapter_of(run) == saved
    assert (run / "adapter" / "prompt.json").is_file() and (run / "adapter" / "tokenizer.json").is_file()
    attempts = Ledger(run / "ledger").account().attempts
    assert [(attempt.seconds, attempt.reason) for attempt in attempts] == [(3500.0, "failed"), (80.0, "budget_stop")]
    assert [(row["attempt"], row["started_at"]) for row in record["attempt_log"]] == [
        (attempt.number, attempt.began_at) for attempt in attempts
    ]


@pytest.mark.parametrize(("spot", "spent"), [(True, 2570.0), (False, 2770.0)])
def test_a_run_on_a_spot_machine_keeps_a_restart_reserve(
    spot: bool,
    spent: float,
    tiny_config: ConfigWriter,
    tmp_path: Path,
    clock: FakeTime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A preemption just before the ceiling would otherwise exceed it by a boot and a set-up, before the ledger is read."""
    monkeypatch.setattr("finetune.budget.run_budget.provisioned", lambda: True)
    monkeypatch.setattr("finetune.budget.run_budget.facts", lambda: {"spot": spot})
    monkeypatch.setattr("finetune.budget.run_budget.dearest_usd_per_hour", lambda: 3.6)
    clock.seconds = 200.0  # boot and set-up
    pass_time(clock, 2, spent, monkeypatch)
    assert main(["train", str(tiny_config(budget={"max_hours": 2785 / 3600}, checkpoint=OFTEN))]) == 0
    record = record_of(tmp_path / "runs" / "tiny-001")
    assert (record["status"], record["steps"]["done"]) == ("budget_stop", 2)
    assert ("3.3 min are reserved for a restart after a preemption" in record["stop"]["detail"]) == spot


def test_a_step_that_hangs_does_not_cross_the_ceiling(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: Any
) -> None:
    """A clock twenty times as fast: five minutes of budget are fifteen seconds, and the hanging step takes ten minutes."""
    monkeypatch.setenv("FINETUNE_HEARTBEAT_SECONDS", "0.1")
    config = tiny_config(budget={"max_hours": 300 / 3600}, checkpoint={"every_minutes": 2.0, "save_steps": 1})
    done = subprocess.run(
        [sys.executable, "-c", hanging_program(3), "train", str(config)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    run = tmp_path / "runs" / "tiny-001"
    assert done.returncode == 0, done.stderr
    assert "the run did not stop by itself" in done.stderr and "Traceback" not in done.stderr
    record = record_of(run)
    assert record["status"] == "budget_stop"
    (attempt,) = Ledger(run / "ledger").account().attempts
    assert attempt.reason == "budget_stop" and 280 < attempt.seconds <= 300
    assert checkpoint_folders.fault(run / "checkpoints" / "step-2") is None


# --- prices


def machine_costs(usd_per_hour: float, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """As on a machine that our launch policy started at this price."""
    offer = {"gpu": "T4", "zone": "us-central1-a", "spot": True, "usd_per_hour": usd_per_hour}
    table = {"basis": "a catalog of today", "ceiling_usd_per_hour": None, "offers": [offer]}
    monkeypatch.setenv("FINETUNE_PRICES", json.dumps(table))
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")  # no server listens on the discard port
    monkeypatch.setenv("HOME", str(home))


def test_the_price_and_the_boot_of_the_machine_count_before_the_configs(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.machine.billed_time import machine_age

    machine_costs(36.0, monkeypatch, tmp_path)
    assert main(["train", str(tiny_config(training={"max_steps": 1}, budget={"usd_per_hour": 1.0}))]) == 0
    record, age = record_of(tmp_path / "runs" / "tiny-001"), machine_age()
    assert age is not None
    assert record["spent_usd"] == pytest.approx(age * 36 / 3600, abs=0.5)
    assert "x $36/h, " in record["spent_basis"] and "of the config" not in record["spent_basis"]


def test_a_second_run_on_a_machine_is_not_charged_for_the_first(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_costs(36.0, monkeypatch, tmp_path)
    config = tiny_config(training={"max_steps": 1})
    assert main(["train", str(config)]) == main(["train", str(config)]) == 0
    second = record_of(tmp_path / "runs" / "tiny-002")
    assert second["spending"]["hours"] * 3600 < 60


def test_a_machine_too_expensive_for_the_budget_is_refused(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    machine_costs(36000.0, monkeypatch, tmp_path)
    with reported("budget.exhausted"):
        assert main(["train", str(tiny_config(budget={"max_run_usd": 0.01, "usd_per_hour": 0.001}))]) == 2
    assert "raise budget.max_run_usd" in capsys.readouterr().err


def test_a_run_without_a_price_reports_no_dollars(tiny_config: ConfigWriter, tmp_path: Path) -> None:
    assert main(["train", str(tiny_config(training={"max_steps": 1}))]) == 0
    record = record_of(tmp_path / "runs" / "tiny-001")
    assert (record["spent_usd"], record["spent_basis"]) == (None, None)
