"""Hanging runs, each a process of its own, in real time: the watchdog ends them before or at their ceiling, wherever they
hang."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from finetune.budget.attempts import Attempt
from finetune.budget.ledger import Ledger
from finetune.budget.watchdog import HEARTBEAT_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
HEARTBEAT, CEILING = 0.5, 8.0
HANGS = ("sleeps", "spins", "holds the lock", "hook hangs", "ends")

PROGRAM = """
import ctypes, os, sys, threading, time
from pathlib import Path
from finetune.budget.ledger import Ledger
from finetune.budget.meter import Meter
from finetune.budget.watchdog import Watchdog
from finetune.machine.billed_time import MachineTime, process_age
from finetune.machine.price import Ceilings, MachinePrice

folder, how, ceiling = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])

def hard_stop(reason):
    print("hard stop:", reason, flush=True)
    if how == "hook hangs":
        time.sleep(60)
    os._exit(0)

ledger, price = Ledger(folder), MachinePrice(3600.0, "b")
meter = Meter(ledger.account(), MachineTime(provisioned=False), price, Ceilings(run_usd=ceiling))
log = ledger.new_attempt(1, machine={}, price=price, resumed_step=None)
watchdog = Watchdog(meter, log, say=print, time_to_save=lambda: 0.0, hard_stop=hard_stop,
                    ask_stop=lambda reason: print("asked:", reason, flush=True))
watchdog.start()
time.sleep(1.2)
if how == "sleeps":
    time.sleep(60)
elif how == "spins":
    while True: pass
elif how == "hook hangs":
    time.sleep(60)
elif how == "holds the lock":
    ctypes.PyDLL(None).sleep(60)
elif how == "ends":
    watchdog.close("done")
    time.sleep(max(0.0, ceiling - process_age()) + 1)
    print("still here")
"""


@dataclass(frozen=True)
class Ended:
    """seconds: how long the process really ran."""

    code: int
    seconds: float
    out: str
    err: str
    attempt: Attempt


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """One process for each of HANGS, all at once; each has CEILING dollars and costs one a second from its start."""
    folders = {how: tmp_path_factory.mktemp("run") for how in HANGS}
    environment = os.environ | {HEARTBEAT_VARIABLE: str(HEARTBEAT)}
    began, running = {}, {}
    for how, folder in folders.items():
        began[how] = time.monotonic()
        running[how] = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder), how, str(CEILING)],
            stdout=(folder / "out").open("w"), stderr=(folder / "err").open("w"), cwd=ROOT, env=environment,
        )  # fmt: skip
    took: dict[str, float] = {}
    while len(took) < len(HANGS):
        for how, process in running.items():
            if how not in took and process.poll() is not None:
                took[how] = time.monotonic() - began[how]
            if time.monotonic() - began[how] > 40:
                process.kill()
        time.sleep(0.01)
    return {
        how: Ended(
            running[how].returncode,
            took[how],
            (folder / "out").read_text(),
            (folder / "err").read_text(),
            Ledger(folder).account().attempts[0],
        )
        for how, folder in folders.items()
    }


@pytest.mark.parametrize("how", ["sleeps", "spins"])
def test_a_hanging_step_is_ended_before_the_ceiling(how: str, ended: dict[str, Ended]) -> None:
    run = ended[how]
    assert run.code == 0 and not run.err
    assert "asked: budget.max_run_usd" in run.out and "hard stop: budget.max_run_usd" in run.out
    assert CEILING - 6 < run.seconds <= CEILING
    assert run.attempt.reason == "budget_stop" and run.seconds - 1 < run.attempt.seconds < run.seconds + 0.2


@pytest.mark.parametrize("how", ["holds the lock", "hook hangs"])
def test_where_no_python_runs_the_last_resort_ends_it_at_the_ceiling(how: str, ended: dict[str, Ended]) -> None:
    run = ended[how]
    assert run.code == 1 and "Timeout" in run.err and '"<string>", line' in run.err  # where every thread hangs
    assert CEILING - 0.5 < run.seconds < CEILING + HEARTBEAT + 1  # one second for process start on a busy machine
    assert "hard stop" in run.out if how == "hook hangs" else "hard stop" not in run.out
    assert run.attempt.seconds > 0.4


def test_the_last_resort_leaves_an_ordinary_end_alone(ended: dict[str, Ended]) -> None:
    run = ended["ends"]
    assert run.code == 0 and "still here" in run.out and not run.err
    assert run.seconds > CEILING + 0.5 and run.attempt.reason == "done"
