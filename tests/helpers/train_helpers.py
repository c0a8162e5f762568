"""Helpers for the tests of `finetune train`: read a run's folder, and run code inside a training step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml


def record_of(run: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run / "run.json").read_text())
    return value


def adapter_of(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def steps_in(record: dict[str, Any]) -> list[int]:
    return [row["step"] for row in record["history"] if "loss" in row]


def check_agrees(run: Path) -> dict[str, Any]:
    """Check that run.json agrees with the newest checkpoint; returns run.json."""
    from finetune.checkpoint.folders import newest_first

    record = record_of(run)
    complete = [folder for folder in newest_first(run / "checkpoints") if (folder / "manifest.json").is_file()]
    if not complete:
        assert (record["steps"]["done"], record["tokens"], record["history"]) == (0, {"trained": 0}, [])
        assert set(record["losses"].values()) == {None}
        assert record["saves"]["committed_step"] is None
        return record
    state = json.loads((complete[0] / "trainer_state.json").read_text(encoding="utf-8"))
    step, losses = state["global_step"], [entry for entry in state["log_history"] if "loss" in entry]
    assert complete[0].name == f"step-{step}"
    assert record["steps"] == {"done": step, "planned": state["max_steps"]}
    assert record["epochs"] == state["epoch"]
    assert record["tokens"]["trained"] == state["num_input_tokens_seen"] > 0
    assert steps_in(record) == [entry["step"] for entry in losses]
    assert record["losses"]["first"] == losses[0]["loss"]
    assert record["losses"]["last"] == losses[-1]["loss"]
    assert record["saves"]["committed_step"] == step
    return record


def at_step(step: int, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run an action in the middle of a training step."""
    from finetune.training.callbacks import Throughput

    original = Throughput.on_step_begin

    def wrapped(self: Throughput, args: Any, state: Any, control: Any, **others: Any) -> None:
        original(self, args, state, control, **others)
        if state.global_step == step - 1:
            action()

    monkeypatch.setattr(Throughput, "on_step_begin", wrapped)


def change(path: Path, section: str, **values: Any) -> None:
    """Edit one section of a config file."""
    tree = yaml.safe_load(path.read_text())
    tree[section] |= values
    path.write_text(yaml.safe_dump(tree))


class FakeTime:
    """The meter of every attempt, in seconds, set by hand; the watchdog reads it twenty times a second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        from finetune.budget import run_budget
        from finetune.machine.billed_time import MachineTime

        self.seconds = 0.0
        monkeypatch.setenv("FINETUNE_HEARTBEAT_SECONDS", "0.05")
        monkeypatch.setattr(
            run_budget, "MachineTime", lambda provisioned: MachineTime(provisioned=provisioned, home=home, age=self)
        )

    def __call__(self) -> float:
        return self.seconds


HANGS = """
import sys, time
import finetune.training.run  # before the fast clock starts: import time must not count
from finetune.budget import run_budget as spending
from finetune.machine.billed_time import MachineTime, process_age
from finetune.training.step.runner import Stepper
origin = process_age()
spending.MachineTime = lambda provisioned: MachineTime(provisioned=False, age=lambda: 20 * (process_age() - origin))
original, steps = Stepper.run, []
def run(self, step):
    steps.append(step)
    if len(steps) == STEP:
        time.sleep(600)
    return original(self, step)
Stepper.run = run
MORE
from finetune.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def hanging_program(step: int, more: str = "") -> str:
    """`finetune` as a program for python -c that hangs for ten minutes in the given step, on a clock twenty times as fast.
    more: Python code to run before the command."""
    return HANGS.replace("STEP", str(step)).replace("MORE", more)
