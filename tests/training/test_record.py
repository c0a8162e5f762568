"""However an attempt ends, run.json agrees with the newest checkpoint, and the adapter of a budget stop is of that step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.errors import reported
from tests.helpers.train_helpers import (
    FakeTime,
    adapter_of,
    at_step,
    change,
    check_agrees,
    hanging_program,
    record_of,
    steps_in,
)

torch = pytest.importorskip("torch")

from finetune.checkpoint.store import CheckpointStore  # noqa: E402
from finetune.cli.main import main  # noqa: E402
from finetune.errors import UserError  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_keys")
ROOT = Path(__file__).resolve().parents[2]
ConfigWriter = Callable[..., Path]
Shown = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "tiny-001"


def fail() -> None:
    raise RuntimeError("the machine is on fire")


def fails_at(step: int, words: list[str], action: Callable[[], object] = fail) -> None:
    with pytest.MonkeyPatch.context() as patched, pytest.raises(RuntimeError, match="on fire"):
        at_step(step, action, patched)
        main(words)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- a fault, a second Ctrl-C, a store that refuses


def test_after_a_failure_steps_that_were_not_saved_do_not_count(tiny_config: ConfigWriter, run: Path) -> None:
    fails_at(4, ["train", str(tiny_config(training={"max_steps": 6, "eval_steps": 1}))])
    record = check_agrees(run)
    assert (record["status"], record["steps"]) == ("failed", {"done": 2, "planned": 6})
    assert [row["step"] for row in record["history"] if "eval_loss" in row] == [1, 2]
    assert record["losses"]["eval_last"] == record["history"][-1]["eval_loss"]
    assert (
        record["attempt_log"][0]["to_step"] == 3
    )  # the attempt log still shows that it went further, and at what cost


def test_after_a_failure_before_the_first_save_no_step_counts(tiny_config: ConfigWriter, run: Path) -> None:
    fails_at(3, ["train", str(tiny_config(checkpoint={"save_steps": 100}))])
    record = check_agrees(run)
    assert (record["status"], record["steps"]) == ("failed", {"done": 0, "planned": 4})


def test_after_a_second_ctrl_c_only_saved_steps_count(
    tiny_config: ConfigWriter, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        at_step(4, twice, patched)
        assert main(["train", str(tiny_config(training={"max_steps": 5}))]) == 75
    record = check_agrees(run)
    assert (record["status"], record["steps"]["done"]) == ("interrupted", 2)


def test_a_last_save_that_fails_does_not_count(
    tiny_config: ConfigWriter, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = CheckpointStore.put

    def refuse(self: CheckpointStore, source: Path, **labels: Any) -> Path:
        if labels["step"] > 2:
            raise UserError("the bucket is gone", code="checkpoint.store_vanished")
        return put(self, source, **labels)

    monkeypatch.setattr(CheckpointStore, "put", refuse)
    assert main(["train", str(tiny_config())]) == 2
    record = check_agrees(run)
    assert (record["status"], record["steps"]["done"]) == ("failed", 2)


def test_a_copy_that_is_committed_after_the_end_still_counts(
    tiny_config: ConfigWriter, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a slow bucket: a failed run does not wait for the writer's thread."""
    put, proceed = CheckpointStore.put, threading.Event()

    def late(self: CheckpointStore, source: Path, **labels: Any) -> Path:
        proceed.wait(60)
        return put(self, source, **labels)

    monkeypatch.setattr(CheckpointStore, "put", late)
    monkeypatch.setattr("finetune.checkpoint.async_writer.CLOSE_SECONDS", 0.1)
    fails_at(4, ["train", str(tiny_config())])
    assert record_of(run)["status"] == "failed"
    check_agrees(run)  # none yet
    proceed.set()
    wait_for(lambda: record_of(run)["steps"]["done"] == 2)
    assert check_agrees(run)["status"] == "failed"


# --- between two logs


def test_a_run_that_logs_rarely_agrees_at_the_end_of_each_attempt(
    tiny_config: ConfigWriter, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(training={"max_steps": 8, "logging_steps": 5}, checkpoint={"save_steps": 100})
    with monkeypatch.context() as patched:
        at_step(7, lambda: signal.raise_signal(signal.SIGTERM), patched)
        assert main(["train", str(config)]) == 75
    record = check_agrees(run)
    assert (record["status"], record["steps"]["done"], steps_in(record)) == ("interrupted", 7, [1, 5])
    assert main(["train", "--resume", str(run)]) == 0
    record = check_agrees(run)
    assert (record["status"], record["steps"]["done"], record["adapter_step"]) == ("done", 8, 8)


# --- killed


def test_the_attempt_after_a_kill_corrects_the_record(
    tiny_config: ConfigWriter, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first step, and also if it fails before that."""
    config = tiny_config(training={"max_steps": 30}, checkpoint={"save_steps": 4})
    environment = os.environ | {"FINETUNE_FAULT": "step:6"}  # kill -9 at the end of the sixth step
    killed = subprocess.run(
        [sys.executable, "-m", "finetune", "train", str(config)], cwd=ROOT, env=environment, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL
    left = record_of(run)
    assert left["status"] == "running" and left["steps"]["done"] == 5
    wait = run / "checkpoints" / "step-4" / "manifest.json"
    monkeypatch.setattr("finetune.training.run.load_parts", lambda *_: fail())
    with pytest.raises(RuntimeError, match="on fire"):
        main(["train", "--resume", str(run)])
    assert wait.is_file()
    record = check_agrees(run)
    assert (record["status"], record["attempts"], record["steps"]["done"]) == ("failed", 2, 4)

    monkeypatch.undo()
    run.joinpath("run.json").write_text(json.dumps(left))
    meanwhile: list[dict[str, Any]] = []
    at_step(5, lambda: meanwhile.append(check_agrees(run)), monkeypatch)
    assert main(["train", "--resume", str(run)]) == 0
    assert [record["status"] for record in meanwhile] == ["running"]
    assert steps_in(check_agrees(run)) == list(range(1, 31))


# --- the budget


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeTime:
    return FakeTime(monkeypatch, tmp_path / "home")


def test_a_budget_used_up_before_the_first_step_ends_at_the_newest_checkpoint(
    tiny_config: ConfigWriter, run: Path, clock: FakeTime
) -> None:
    """The third attempt of a preempted run, whose second was killed before run.json recorded its newest checkpoint."""
    config = tiny_config(
        training={"max_steps": 8},
        budget={"max_hours": 1.0},
        checkpoint={"every_minutes": 0.5, "save_steps": 2, "keep_last": 5},
    )

    def late() -> None:
        clock.seconds = 3500.0
        fail()

    fails_at(7, ["train", str(config)], late)
    record = check_agrees(run)
    assert record["steps"]["done"] == 6
    behind = {"status": "running", "steps": {"done": 3, "planned": 8}, "tokens": {"trained": 1}}
    behind |= {"history": record["history"][:3], "losses": record["losses"] | {"last": 9.9}}
    behind |= {"saves": record["saves"] | {"committed_step": 2}}
    run.joinpath("run.json").write_text(json.dumps(record | behind))
    clock.seconds = 80.0
    assert main(["train", "--resume", str(run)]) == 0
    ended = check_agrees(run)
    assert (ended["status"], ended["steps"]["done"], ended["adapter_step"]) == ("budget_stop", 6, 6)
    assert adapter_of(run) == (run / "checkpoints" / "step-6" / "adapter_model.safetensors").read_bytes()
    assert ended["history"] == record["history"]


def test_a_budget_used_up_before_the_first_save_fails_without_an_adapter(
    tiny_config: ConfigWriter, run: Path, clock: FakeTime, capsys: Shown
) -> None:
    config = tiny_config(budget={"max_hours": 1.0}, checkpoint={"every_minutes": 0.5, "save_steps": 100})

    def late() -> None:
        clock.seconds = 3590.0
        fail()

    fails_at(3, ["train", str(config)], late)
    run.joinpath("run.json").write_text(
        json.dumps(record_of(run) | {"status": "running", "steps": {"done": 2, "planned": 4}})
    )
    capsys.readouterr()
    with reported("budget.exhausted"):
        assert main(["train", "--resume", str(run)]) == 2
    assert "budget.max_hours" in capsys.readouterr().err
    record = check_agrees(run)
    assert (record["status"], record["attempts"]) == ("failed", 2)
    assert [row["reason"] for row in record["attempt_log"]][-1] == "failed"


@pytest.mark.parametrize("in_time", [True, False], ids=["adapter in time", "adapter too slow"])
def test_a_budget_that_ends_a_hanging_step_ends_at_the_newest_checkpoint(
    in_time: bool, tiny_config: ConfigWriter, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    """The last checkpoint is of step 2, the last log of step 3. If writing the adapter is too slow, the next one writes it."""
    monkeypatch.setenv("FINETUNE_HEARTBEAT_SECONDS", "0.1")
    slow = "from finetune.training import ending\nending.adapter_from = lambda *_: time.sleep(600)"
    config = tiny_config(
        training={"max_steps": 9},
        budget={"max_hours": 300 / 3600},
        checkpoint={"every_minutes": 2.0, "save_steps": 2},
    )
    program = hanging_program(4, "" if in_time else slow)
    done = subprocess.run(
        [sys.executable, "-c", program, "train", str(config)], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert "the run did not stop by itself" in done.stderr
    record = check_agrees(run)
    assert (record["status"], record["steps"]["done"]) == ("budget_stop", 2)
    of_checkpoint = (run / "checkpoints" / "step-2" / "adapter_model.safetensors").read_bytes()
    if in_time:
        assert record["adapter_step"] == 2 and adapter_of(run) == of_checkpoint
        with reported("budget.exhausted"):
            assert main(["train", "--resume", str(run)]) == 2  # the adapter is already of that step
        assert "budget.max_hours" in capsys.readouterr().err
        assert record_of(run) == record
        return
    assert not (run / "adapter").exists()
    assert main(["train", "--resume", str(run)]) == 0
    record = check_agrees(run)
    assert (record["status"], record["adapter_step"]) == ("budget_stop", 2)
    assert adapter_of(run) == of_checkpoint


def test_an_older_adapter_of_an_earlier_budget_is_replaced(
    tiny_config: ConfigWriter, run: Path, clock: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget was raised, and the run was then ended before it could write a new adapter."""
    config = tiny_config(
        training={"max_steps": 8},
        budget={"max_hours": 1.0},
        checkpoint={"every_minutes": 0.5, "save_steps": 2},
    )

    def later() -> None:
        clock.seconds = 3600 - 15
        time.sleep(0.3)

    with monkeypatch.context() as patched:
        at_step(2, later, patched)
        assert main(["train", str(config)]) == 0
    assert check_agrees(run)["adapter_step"] == 2
    first = adapter_of(run)
    change(run / "config.yaml", "budget", max_hours=2.0)
    clock.seconds = 0.0

    def fire() -> None:
        clock.seconds = 3590.0
        fail()

    fails_at(6, ["train", "--resume", str(run)], fire)
    record = check_agrees(run)
    assert (record["steps"]["done"], record["adapter_step"], adapter_of(run)) == (4, 2, first)
    run.joinpath("run.json").write_text(json.dumps(record | {"status": "budget_stop"}))
    assert main(["train", "--resume", str(run)]) == 0
    record = check_agrees(run)
    assert (record["status"], record["adapter_step"]) == ("budget_stop", 4)
    assert adapter_of(run) == (run / "checkpoints" / "step-4" / "adapter_model.safetensors").read_bytes() != first
