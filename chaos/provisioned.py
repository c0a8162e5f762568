"""A run on a provisioned machine, which is billed from boot, whether or not a process runs on it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

from chaos.attempt import Kill, Machine
from chaos.checks import Spend
from chaos.environment import USD_PER_HOUR, Kind
from chaos.observe import booked
from chaos.soak import Harness, Run, last_line
from finetune.errors import EXIT_OK
from finetune.machine.billed_time import machine_age

OFFER = {"gpu": "L4", "zone": "us-central1-a", "spot": True, "usd_per_hour": USD_PER_HOUR}
PRICES = json.dumps({"basis": "made up", "ceiling_usd_per_hour": None, "offers": [OFFER]})
IDLE_SECONDS = 1.0


def on_a_provisioned_machine(harness: Harness, kind: Kind, folder: Path, name: str) -> tuple[Run, Spend] | None:
    """Kill a run three times, the first time before it is in the ledger, with idle time in between. Returns the run, and the
    seconds from its first start to its end with those booked. None if the system does not report the machine's age."""
    age = machine_age()
    if age is None:
        return None
    harness = replace(harness, machine=Machine(folder, PRICES))
    run = Run(name, kind, harness.folder(name))
    began = time.monotonic()
    kills = (Kill("start", delay=2.0), Kill("step", count=kind.interval + 3), Kill("place", "manifest"))
    for kill in kills:
        harness.one_attempt(run, kill)
        time.sleep(IDLE_SECONDS)
    made = harness.one_attempt(run, None)
    if made.code != EXIT_OK or len(run.kills) < len(kills):
        run.fault = f"{len(run.kills)} of {len(kills)} kills, then exit code {made.code}: {last_line(made.output)}"
    harness.close(run)
    real = time.monotonic() - began - made.teardown
    mine = sum(booked(run.folder).values()) - age
    return run, Spend(real, mine, unbooked=0.0, teardown=made.teardown, kills=len(run.kills))
