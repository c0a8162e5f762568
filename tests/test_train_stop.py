"""How `finetune train` stops (Ctrl-C, SIGTERM, kill, budget) and how `--resume` goes on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from train_helpers import adapter_of, at_step, change, record_of, steps_in

torch = pytest.importorskip("torch")

from finetune import checkpoint  # noqa: E402
from finetune.cli import main  # noqa: E402
from finetune.config import config_hash, load_config  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_keys")
ROOT = Path(__file__).resolve().parents[1]
ConfigWriter = Callable[..., Path]
Shown = pytest.CaptureFixture[str]


# --- interrupted and resumed

LONG = {"max_steps": 40, "group_by_length": False}


def start_and_wait(config: Path, until: Callable[[], bool]) -> subprocess.Popen[str]:
    """`finetune train` in a process of its own, returned as soon as `until` holds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", "train", str(config)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not until():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.fixture(scope="module")
def uninterrupted(write_config: ConfigWriter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    assert main(["train", str(write_config(folder, training=LONG, checkpoint={"save_steps": 100}))]) == 0
    return folder / "runs" / "tiny-001"


def test_ctrl_c_ends_with_a_checkpoint_and_resume_goes_on_from_it(
    uninterrupted: Path, tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown
) -> None:
    config = tiny_config(training=LONG, checkpoint={"save_steps": 100})
    run = tmp_path / "runs" / "tiny-001"
    process = start_and_wait(config, lambda: (run / "run.json").is_file() and len(record_of(run)["history"]) > 2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "SIGINT: finishing this step, then saving a checkpoint" in said
    assert f"interrupted, a checkpoint is saved; go on with `finetune train --resume {run}`" in said
    assert "Traceback" not in said
    first = record_of(run)
    stopped_at = first["steps"]["done"]
    assert first["status"] == "interrupted"
    assert first["ended_at"] is not None
    assert 3 <= stopped_at < 40
    assert steps_in(first) == list(range(1, stopped_at + 1))
    assert checkpoint.latest_valid(run / "checkpoints") == (run / "checkpoints" / f"step-{stopped_at}", [])
    assert not (run / "adapter").exists()

    assert main(["train", "--resume", str(run)]) == 0
    assert f"resuming from {run / 'checkpoints' / f'step-{stopped_at}'}" in capsys.readouterr().err
    record, whole = record_of(run), record_of(uninterrupted)
    assert record["status"] == "done"
    assert record["attempts"] == 2
    assert record["steps"] == {"done": 40, "planned": 40}
    assert steps_in(record) == list(range(1, 41))
    assert record["history"][:stopped_at] == first["history"]
    assert record["wall_seconds"] > first["wall_seconds"]
    assert record["started_at"] == first["started_at"]
    assert record["tokens"] == whole["tokens"]
    assert [path.name for path in checkpoint.newest_first(uninterrupted / "checkpoints")] == ["step-40"]  # at the end
    numbers = ("step", "epoch", "loss", "learning_rate", "grad_norm")
    assert [[row[name] for name in numbers] for row in record["history"]] == [
        [row[name] for name in numbers] for row in whole["history"]
    ]
    assert adapter_of(run) == adapter_of(uninterrupted)  # exact, as long as batches are not grouped by length


def test_sigterm_saves_at_the_end_of_the_step_in_which_it_comes(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(training={"max_steps": 5}, checkpoint={"save_steps": 100})
    assert main(["train", str(config)]) == 0
    with monkeypatch.context() as patched:
        at_step(3, lambda: signal.raise_signal(signal.SIGTERM), patched)
        assert main(["train", str(config)]) == 75
    whole, run = (tmp_path / "runs" / f"tiny-00{n}" for n in (1, 2))
    assert record_of(run)["status"] == "interrupted"
    assert [path.name for path in checkpoint.newest_first(run / "checkpoints")] == ["step-3"]
    assert main(["train", "--resume", str(run)]) == 0
    assert record_of(run)["tokens"] == record_of(whole)["tokens"]
    assert adapter_of(run) == adapter_of(whole)  # within one epoch, resume is exact


def test_a_second_ctrl_c_exits_at_once_and_leaves_no_half_of_a_save(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        at_step(4, twice, patched)
        assert main(["train", str(tiny_config(training={"max_steps": 5}))]) == 75
    run = tmp_path / "runs" / "tiny-001"
    assert record_of(run)["status"] == "interrupted"
    assert [path.name for path in checkpoint.newest_first(run / "checkpoints")] == ["step-2"]
    assert main(["train", "--resume", str(run)]) == 0
    assert steps_in(record_of(run)) == [1, 2, 3, 4, 5]


def test_a_killed_run_goes_on_from_the_last_whole_checkpoint(
    tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown
) -> None:
    config = tiny_config(training={"max_steps": 30})
    run = tmp_path / "runs" / "tiny-001"
    checkpoints = run / "checkpoints"
    process = start_and_wait(config, lambda: (checkpoints / "step-6" / "manifest.json").is_file())
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert record_of(run)["status"] == "running"
    checkpoint.remove_leftovers(checkpoints)
    newest, older = list(checkpoint.newest_first(checkpoints))[:2]
    size = (newest / "adapter_model.safetensors").stat().st_size
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])  # a copy that was cut off
    for name in ("step-99", "checkpoint-99"):  # a save that was cut off
        shutil.copytree(older, checkpoints / name)
        (checkpoints / name / "manifest.json").unlink()

    assert main(["train", "--resume", str(run)]) == 0
    said = capsys.readouterr().err
    assert f"passed over {newest}: adapter_model.safetensors has {size - 1} bytes instead of {size}" in said
    assert f"passed over {checkpoints / 'step-99'}: no manifest: the save was cut off" in said
    assert f"resuming from {older}" in said
    record = record_of(run)
    assert (record["status"], record["attempts"]) == ("done", 2)
    assert steps_in(record) == list(range(1, 31))
    names = {path.name for path in checkpoints.iterdir() if path.is_dir()}
    assert names == {f"damaged-{newest.name}", "step-28", "step-30"}
    assert checkpoint.latest_valid(checkpoints) == (checkpoints / "step-30", [])


def test_a_run_killed_before_its_first_checkpoint_starts_from_the_beginning(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    def fault() -> None:
        raise RuntimeError("the machine is on fire")

    config = tiny_config(training={"max_steps": 4})
    assert main(["train", str(config)]) == 0
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="on fire"):
        at_step(2, fault, patched)
        main(["train", str(config)])
    whole, run = (tmp_path / "runs" / f"tiny-00{n}" for n in (1, 2))
    assert record_of(run)["status"] == "failed"
    capsys.readouterr()
    meanwhile: list[dict[str, Any]] = []
    at_step(2, lambda: meanwhile.append(record_of(run)), monkeypatch)
    assert main(["train", "--resume", str(run)]) == 0
    assert [(record["status"], record["ended_at"]) for record in meanwhile] == [("running", None)]
    assert f"{run}: no checkpoint to go on from, starting from the beginning" in capsys.readouterr().err
    assert steps_in(record_of(run)) == [1, 2, 3, 4]
    assert adapter_of(run) == adapter_of(whole)


def test_a_run_killed_after_its_last_checkpoint_only_saves_its_adapter(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(tiny_run, run)
    shutil.rmtree(run / "adapter")
    before = record_of(tiny_run)
    (run / "run.json").write_text(json.dumps(before | {"status": "running"}))
    assert main(["train", "--resume", str(run)]) == 0
    after = record_of(run)
    assert adapter_of(run) == adapter_of(tiny_run)
    assert after["status"] == "done"
    for key in ("history", "steps", "tokens", "losses", "tokens_per_second"):
        assert after[key] == before[key]
    assert after["peak_memory_gib"]["value"] >= before["peak_memory_gib"]["value"]


def test_a_run_goes_on_with_the_same_data_in_another_place(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(tiny_run, run)
    (run / "run.json").write_text(json.dumps(record_of(run) | {"status": "interrupted"}))
    shutil.copytree(tiny_data, tmp_path / "moved")
    change(run / "config.yaml", "data", output_dir=str(tmp_path / "moved"))
    assert main(["train", "--resume", str(run)]) == 0
    record = record_of(run)
    assert (record["status"], record["steps"]) == ("done", {"done": 6, "planned": 6})
    assert record["data"]["path"] == str(tmp_path / "moved")


# --- budget


def test_a_run_stops_at_its_hours_and_goes_on_when_they_are_raised(
    tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown
) -> None:
    config = tiny_config(budget={"max_hours": 1e-6, "usd_per_hour": 36.0}, checkpoint={"save_steps": 100})
    assert main(["train", str(config)]) == 0
    run = tmp_path / "runs" / "tiny-001"
    stopped = record_of(run)
    assert (stopped["status"], stopped["steps"]) == ("budget_stop", {"done": 1, "planned": 4})
    assert stopped["spent_usd"] == pytest.approx(stopped["wall_seconds"] * 36 / 3600, abs=0.001)
    assert stopped["spent_basis"] == "measured hours of training x $36/h (budget.usd_per_hour of the config)"
    assert [path.name for path in checkpoint.newest_first(run / "checkpoints")] == ["step-1"]
    first_adapter = adapter_of(run)
    capsys.readouterr()

    assert main(["train", "--resume", str(run)]) == 2  # the budget holds over all attempts
    assert f"the budget of this run is used up; raise budget.max_hours or budget.max_run_usd in {run}/config.yaml" in (
        capsys.readouterr().err
    )
    assert record_of(run) == stopped

    change(run / "config.yaml", "budget", max_hours=1.0)
    assert main(["train", "--resume", str(run)]) == 0
    record = record_of(run)
    assert (record["status"], record["attempts"]) == ("done", 2)
    assert steps_in(record) == [1, 2, 3, 4]
    assert record["config"]["budget"]["max_hours"] == 1.0
    assert record["config_hash"] == config_hash(load_config(run / "config.yaml")) != stopped["config_hash"]
    assert record["wall_seconds"] > stopped["wall_seconds"]
    assert record["spent_usd"] == pytest.approx(record["wall_seconds"] * 36 / 3600, abs=0.001)
    assert adapter_of(run) != first_adapter


def test_a_run_stops_at_its_dollars(tiny_config: ConfigWriter, tmp_path: Path) -> None:
    config = tiny_config(budget={"max_run_usd": 0.01, "usd_per_hour": 36000.0})  # a millisecond
    assert main(["train", str(config)]) == 0
    assert record_of(tmp_path / "runs" / "tiny-001")["status"] == "budget_stop"


def machine_costs(usd_per_hour: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that our launch policy started at this price."""
    offer = {"gpu": "T4", "zone": "us-central1-a", "spot": True, "usd_per_hour": usd_per_hour}
    table = {"basis": "a catalog of today", "ceiling_usd_per_hour": None, "offers": [offer]}
    monkeypatch.setenv("FINETUNE_PRICES", json.dumps(table))
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")  # nobody listens on the discard port


def test_the_price_that_came_with_the_machine_counts_before_the_configs(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_costs(36.0, monkeypatch)
    assert main(["train", str(tiny_config(training={"max_steps": 1}, budget={"usd_per_hour": 1.0}))]) == 0
    record = record_of(tmp_path / "runs" / "tiny-001")
    assert record["spent_usd"] == pytest.approx(record["wall_seconds"] * 36 / 3600, abs=0.001)
    assert record["spent_basis"].startswith("measured hours of training x $36/h (")
    assert "of the config" not in record["spent_basis"]


def test_dollars_are_held_by_the_price_that_came_with_the_machine(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    machine_costs(36000.0, monkeypatch)
    assert main(["train", str(tiny_config(budget={"max_run_usd": 0.01, "usd_per_hour": 0.001}))]) == 0
    run = tmp_path / "runs" / "tiny-001"
    stopped = record_of(run)
    assert (stopped["status"], stopped["steps"]) == ("budget_stop", {"done": 1, "planned": 4})
    assert main(["train", "--resume", str(run)]) == 2
    assert "the budget of this run is used up" in capsys.readouterr().err
    assert record_of(run) == stopped


def test_what_the_plan_assumes_may_change_between_two_attempts(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(tiny_run, run)
    (run / "run.json").write_text(json.dumps(record_of(run) | {"status": "interrupted"}))
    change(run / "config.yaml", "plan", mean_tokens=99.0, gpus=["T4"])
    assert main(["train", "--resume", str(run)]) == 0
    assert record_of(run)["config"]["plan"]["gpus"] == ["T4"]


def test_a_run_without_a_price_reports_no_dollars(tiny_config: ConfigWriter, tmp_path: Path) -> None:
    assert main(["train", str(tiny_config(training={"max_steps": 1}))]) == 0
    record = record_of(tmp_path / "runs" / "tiny-001")
    assert (record["spent_usd"], record["spent_basis"]) == (None, None)
