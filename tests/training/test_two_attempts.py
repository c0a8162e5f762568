"""Two processes that train one run: one of them does, and the other one changes nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune.budget.claims import ClaimFolder
from finetune.budget.ledger import Ledger
from tests.helpers.data_examples import files_of
from tests.helpers.train_helpers import check_agrees, record_of

pytest.importorskip("torch")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_keys")]
ROOT = Path(__file__).resolve().parents[2]
LEASE_SECONDS = 3
LONG = {"max_steps": 3000, "group_by_length": False}
OWN = ("lease/", "ledger/attempt-001.jsonl", "tensorboard/")
"""What an attempt that has lost its run may still write: what it has cost, and into files of its own."""


class Attempts:
    """Processes of `finetune train`, which are killed at the end of the test."""

    def __init__(self) -> None:
        self.all: list[subprocess.Popen[str]] = []

    def start(self, *words: str) -> subprocess.Popen[str]:
        environment = os.environ | {"FINETUNE_LEASE_SECONDS": str(LEASE_SECONDS), "FINETUNE_HEARTBEAT_SECONDS": "0.2"}
        command = [sys.executable, "-m", "finetune", "train", *words]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        self.all.append(process)
        return process


@pytest.fixture
def attempts() -> Iterator[Attempts]:
    made = Attempts()
    yield made
    for process in made.all:
        process.kill()
        process.wait()


def wait_for(held: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not held():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps(run: Path) -> int:
    if not (run / "run.json").is_file():
        return 0
    done = record_of(run).get("steps")
    return int(done["done"]) if done else 0


def untouched(run: Path) -> dict[str, bytes | str]:
    return {name: content for name, content in files_of(run).items() if not name.startswith(OWN)}


def test_one_of_two_attempts_trains_and_a_paused_one_that_was_taken_over_stops(
    tiny_config: Callable[..., Path], tmp_path: Path, attempts: Attempts
) -> None:
    config, run = tiny_config(training=LONG, budget={"usd_per_hour": 3600.0}), tmp_path / "runs" / "tiny-001"
    first = attempts.start(str(config))
    wait_for(lambda: steps(run) > 3, first)

    second = attempts.start("--resume", str(run))
    _, said = second.communicate(timeout=300)
    assert second.returncode == 2
    line = said.strip().splitlines()[-1]
    assert line.startswith(f"finetune: {run}: this run is being trained already (machine ")
    assert f"process {first.pid}, since 2" in line and "Traceback" not in said
    assert first.poll() is None and record_of(run)["attempts"] == 1

    first.send_signal(signal.SIGSTOP)
    third = attempts.start("--resume", str(run))
    before = steps(run)
    wait_for(lambda: record_of(run)["attempts"] == 2 and steps(run) > before + 3, third)
    third.send_signal(signal.SIGTERM)
    _, said = third.communicate(timeout=300)
    assert third.returncode == 75, said
    assert f"process {first.pid}" in said and "waiting up to 3 s for a sign of life" in said
    record, files = check_agrees(run), untouched(run)
    assert record["status"] == "interrupted"

    first.send_signal(signal.SIGCONT)
    _, said = first.communicate(timeout=300)
    assert first.returncode == 2
    assert said.strip().splitlines()[-1].startswith("finetune: another attempt has taken over this run (machine "), said
    assert f"process {third.pid}" in said and "Traceback" not in said
    assert untouched(run) == files
    reasons = [attempt.reason for attempt in Ledger(run / "ledger").account().attempts]
    assert reasons == ["taken over", "interrupted"]


def test_of_two_resumes_at_once_one_goes_on(
    tiny_config: Callable[..., Path], tmp_path: Path, attempts: Attempts
) -> None:
    config, run = tiny_config(training=LONG), tmp_path / "runs" / "tiny-001"
    first = attempts.start(str(config))
    wait_for(lambda: (run / "checkpoints" / "step-2" / "manifest.json").is_file(), first)
    first.kill()
    first.communicate()
    both = [attempts.start("--resume", str(run)) for _ in range(2)]
    deadline = time.monotonic() + 300
    while all(process.poll() is None for process in both):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (loser,) = (process for process in both if process.poll() is not None)
    (winner,) = (process for process in both if process is not loser)
    _, said = loser.communicate()
    assert (loser.returncode, f"process {winner.pid}" in said) == (2, True), said
    wait_for(lambda: record_of(run)["attempts"] == 2 and steps(run) > 4, winner)
    winner.send_signal(signal.SIGTERM)
    _, said = winner.communicate(timeout=300)
    assert winner.returncode == 75, said
    assert check_agrees(run)["attempts"] == 2
    claims = ClaimFolder(run / "lease")
    assert [claims.read(key).state for key in claims.listed()].count("ended") == 1
