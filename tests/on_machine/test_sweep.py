"""on_machine/sweep.sh: a sweep in the bucket, its budget on a paid machine, and its end. Training is a stand-in."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from finetune.budget.attempts import Account
from finetune.budget.lease import Lease
from finetune.budget.ledger import Ledger
from finetune.sweep.folder import SweepFolder
from tests.helpers.machine_fixture import SET, CloudMachine, lay_out_set, rent, wait_for
from tests.on_machine.test_score import mark_as_billed, prices

TRAINS = """
import json, os, pathlib, sys, time
from finetune.budget.ledger import Ledger
from finetune.config.load import load_config, to_yaml
from finetune.machine.billed_time import MachineTime
from finetune.machine.price import machine_price
words = open(os.environ["CALLS"]).read().splitlines()[-1].split()
if words[0] != "train":
    sys.exit()
name = os.environ["WANDB_RUN_ID"]
run = pathlib.Path(os.environ["FINETUNE_MOUNT"]) / "runs" / name
step = int(words[words.index("--stop-after-step") + 1]) if "--stop-after-step" in words else 8
if "--resume" not in words:
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(load_config(pathlib.Path(words[1]), [w for w in words[2:] if "=" in w])))
r = load_config(run / "config.yaml").lora.r
record = json.loads((run / "run.json").read_text()) if (run / "run.json").exists() else {"history": []}
record["history"].append({"step": step, "eval_loss": 1 / r + 1 / step})
record |= {"status": "done" if step == 8 else "paused", "steps": {"done": step, "planned": 8}, "attempts": 1}
clock, ledger = MachineTime(provisioned=True), Ledger(run / "ledger")
log = ledger.new_attempt(ledger.next_attempt(), machine={}, price=machine_price(), resumed_step=None)
time.sleep(float(os.environ.get("TAKES", "0")))
extra = float(os.environ.get("SPENDS", "0"))
log.begin(extra + clock.take())
log.end(extra + clock.take(), record["status"], step)
clock.mark()
(run / "adapter").mkdir(exist_ok=True)
(run / "adapter" / "adapter_config.json").touch()
(run / "run.json").write_text(json.dumps(record))
"""
CONFIG = """\
model: {name: some/model}
data:
  sources: [{kind: jsonl, path: data/built/train.jsonl}]
  output_dir: data/prepared/shop
training: {max_steps: 8, eval_steps: 4}
checkpoint: {every_minutes: 10}
"""
SLEEPS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open(os.environ["CALLS"] + ".ready", "w").close()
time.sleep(60)
"""


@pytest.fixture
def machine(tmp_path: Path) -> CloudMachine:
    machine = rent(tmp_path)
    (machine.checkout / "config.yaml").write_text(CONFIG, encoding="utf-8")
    lay_out_set(machine.checkout / SET, "on the laptop")
    (machine.checkout / SET / "manifest.json").write_text('{"counts": {"train": 9, "val": 3, "test": 3}}')
    machine.env |= {"FINETUNE_PRICES": prices(0.36), "FAKE_WORK": TRAINS, "SWEEP": "lora.r=2,4,8", "EVALUATE": "0"}
    machine.env |= {"MAX_RUN_USD": "5", "RUN_NAME": "s", "SKYPILOT_TASK_ID": "job-1"}
    mark_as_billed(machine)
    return machine


def account(machine: CloudMachine) -> Account:
    folders = [*machine.bucket.glob("runs/s-t*/ledger"), machine.bucket / "runs" / "sweeps" / "s" / "ledger"]
    return Account(tuple(attempt for folder in folders for attempt in Ledger(folder).account().attempts))


def results(machine: CloudMachine) -> dict[str, float]:
    folder = machine.bucket / "runs" / "sweeps" / "s" / "results"
    return {path.stem: json.loads(path.read_text())["loss"] for path in sorted(folder.glob("*.json"))}


def test_trials_one_after_the_other(machine: CloudMachine) -> None:
    code, said = machine.run("sweep.sh")
    assert code == 0, said
    assert "the sweep is done" in said and "s-t02 " in said and "best so far" in said
    assert list(results(machine)) == ["t00-r0", "t01-r0", "t01-r1", "t02-r0", "t02-r1", "t02-r2"]
    calls = machine.called("train")
    assert len(calls) == 6 and calls[0].startswith(f"train {machine.bucket}/runs/sweeps/s/config.yaml lora.r=2 ")
    assert (
        f"training.output_dir={machine.bucket}/runs training.run_name=s-t00 --stop-after-step 2 --max-run-usd"
        in calls[0]
    )
    assert calls[-1].startswith(f"train --resume {machine.bucket}/runs/s-t02 --max-run-usd")
    assert (machine.bucket / "runs" / "sweeps" / "s" / "report" / "sweep.html").is_file()
    assert [attempt.work for attempt in account(machine).attempts].count("sweep") == 1, "its own time, at the end"


def test_every_second_of_the_machine_is_on_a_ledger(machine: CloudMachine) -> None:
    marked = json.loads((machine.home / ".finetune" / "metered.json").read_text())["seconds"]
    assert machine.run("sweep.sh", TAKES="0.3")[0] == 0
    now = json.loads((machine.home / ".finetune" / "metered.json").read_text())["seconds"]
    assert sum(attempt.seconds for attempt in account(machine).attempts) == pytest.approx(now - marked, abs=0.05)


def test_a_budget_that_ends_it(machine: CloudMachine) -> None:
    """Two trials have spent 3.60 each, and 10 minutes, those between two checkpoints, cost 6 cents."""
    code, said = machine.run("sweep.sh", MAX_RUN_USD="7.23", SPENDS="36000")
    assert code == 0 and list(results(machine)) == ["t00-r0", "t01-r0"]
    assert re.search(
        r"the budget ends the sweep: \$7\.20[0-9]+ of \$7\.23 are spent .* too little is left for s-t02, which takes 1\.0 min to "
        r"start and 10\.0 min to a checkpoint; the same launch with RUN_NAME=s with a higher MAX_RUN_USD goes on",
        said,
    ), said
    code, said = machine.run("sweep.sh", MAX_RUN_USD="10.83", SPENDS="36000")
    assert code == 0 and list(results(machine)) == ["t00-r0", "t01-r0", "t02-r0"]


def test_an_interruption_ends_with_75_and_the_next_machine_goes_on(machine: CloudMachine) -> None:
    machine.env["FAKE_WORK"] = SLEEPS
    process = machine.start("sweep.sh")
    wait_for(machine.folder / "calls.ready")
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=30)
    assert process.returncode == 75, said
    code, more = machine.run("sweep.sh", FAKE_WORK=TRAINS)
    assert code == 0 and len(results(machine)) == 6, more


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"SWEEP": ""}, "CONFIG and SWEEP: expected a config, and what is varied"),
        ({"SWEEP_ETA": "1"}, "SWEEP_ETA: expected 2 or more"),
        ({"SWEEP_RUNGS": "-1"}, "SWEEP_RUNGS: expected a whole number"),
        ({"SWEEP_SEARCH": "random"}, "SWEEP_SEARCH: expected grid or optuna, found 'random'"),
        ({"SWEEP_TRIALS": "4"}, "SWEEP_TRIALS: expected with SWEEP_SEARCH=optuna"),
        ({"SWEEP_WORKERS": "0"}, "SWEEP_WORKERS: 1 or more"),
        ({"SWEEP": "lora.q=1,2"}, "unknown key lora.q"),
        ({"MAX_RUN_USD": "0"}, "MAX_RUN_USD: expected a number above 0"),
        ({"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "a b"}, "a sweep's machines do not wait for each other"),
    ],
)
def test_a_mistake_ends_with_2_and_trains_nothing(machine: CloudMachine, env: dict[str, str], said: str) -> None:
    code, found = machine.run("sweep.sh", **env)
    assert code == 2 and said in found
    assert not machine.called("train")


def test_the_best_trial_is_scored(machine: CloudMachine) -> None:
    """With what is left of the budget, and once."""
    code, said = machine.run("sweep.sh", EVALUATE="1", FAKE_EVALUATION="pass")
    assert code == 0, said
    assert machine.called("evaluate") == [f"evaluate {machine.bucket}/runs/s-t02"]
    grants = [json.loads(path.read_text()) for path in (machine.bucket / "runs/sweeps/s/grants").glob("*.json")]
    assert not any(grant["is_open"] for grant in grants)
    (score,) = [grant for grant in grants if grant["rung"] == 3]
    spent = sum(attempt.usd or 0 for attempt in account(machine).attempts)
    assert score["trial"] == 2 and score["ceiling_usd"] == pytest.approx(5 - spent, abs=0.1)


def test_an_interruption_between_two_trials_ends_with_75(machine: CloudMachine) -> None:
    """Here while it waits for another worker's decision."""
    folder = SweepFolder(machine.bucket / "runs", "s")
    folder.path.mkdir(parents=True)
    with Lease(print) as other:
        other.acquire(folder.as_run, lambda: ({}, 0))
        process = machine.start("sweep.sh")
        assert process.stderr is not None
        for line in process.stderr:
            if "goes on with it" in line:
                break
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 75 and not machine.called("train"), said
