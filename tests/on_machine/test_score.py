"""Training that ends with the score, in one job under one budget: on_machine/train.sh with EVALUATE=1, and what is written into
the ledger meanwhile. Only the expensive programs are stand-ins."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from finetune.budget.attempts import Account
from finetune.budget.ledger import Ledger
from finetune.machine.billed_time import MARKER, machine_age, machine_identity
from finetune.machine.price import MachinePrice
from tests.helpers.machine_fixture import SET, CloudMachine, begin_run, lay_out_set, rent, wait_for

TRAINS = """
import os, pathlib, shutil, sys
run = pathlib.Path(os.environ["FINETUNE_MOUNT"]) / "runs" / "run"
shutil.copytree(os.environ["TRAINED"], run, dirs_exist_ok=True)
"""
"""Training that is done: the run is there afterwards."""
SLEEPS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(os.environ.get("STOPPED_WITH", "75"))))
open(os.environ["CALLS"] + ".ready", "w").close()
time.sleep(60)
"""
"""An evaluation that keeps its answers when it is stopped."""


def prices(usd_per_hour: float, spot: bool = False) -> str:
    offer = {"gpu": "T4", "zone": "us-central1-a", "spot": spot, "usd_per_hour": usd_per_hour}
    return json.dumps({"basis": "a test", "ceiling_usd_per_hour": None, "offers": [offer]})


@pytest.fixture
def machine(tmp_path: Path) -> CloudMachine:
    """Its training ends with the status done, at once."""
    machine = rent(tmp_path)
    lay_out_set(machine.checkout / SET, "on the laptop")
    trained = rent(tmp_path / "other")
    trained.env["FINETUNE_MOUNT"] = str(machine.bucket)
    folder = begin_run(trained, "done")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").touch()
    machine.env |= {"EVALUATE": "1", "FAKE_WORK": TRAINS, "FAKE_EVALUATION": "pass", "TRAINED": str(folder)}
    machine.env |= {"FINETUNE_PRICES": prices(0.36)}
    mark_as_billed(machine)
    return machine


SCORE_IT = "machine: next: finetune launch sky/evaluate.yaml --env RUN_NAME=run   ("
WRITES_A_SCORE = """
import os, pathlib
run = pathlib.Path(os.environ["FINETUNE_MOUNT"], "runs", "run")
for name in ("eval.json", "summary.json"):
    (run / name).write_text("{}")
"""


def mark_as_billed(machine: CloudMachine) -> None:
    """All the seconds of this computer so far, which otherwise would be part of the first attempt's price."""
    path = machine.home / MARKER
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine_identity(), "seconds": machine_age()}))


def account(machine: CloudMachine) -> Account:
    return Ledger(machine.run_folder() / "ledger").account()


def reasons(machine: CloudMachine) -> list[tuple[str, str | None]]:
    return [(attempt.name, attempt.reason) for attempt in account(machine).attempts]


def trained(machine: CloudMachine, **record: Any) -> Path:
    """A run whose training is over, without a score."""
    folder = begin_run(machine, **({"status": "done"} | record))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").touch()
    return folder


def score_files(folder: Path, seconds_after: float) -> None:
    at = (folder / "adapter" / "adapter_config.json").stat().st_mtime + seconds_after
    for name in ("eval.json", "summary.json"):
        (folder / name).write_text("{}")
        os.utime(folder / name, (at, at))


def test_training_ends_with_score_and_report_and_their_cost_in_the_ledger(machine: CloudMachine) -> None:
    code, said = machine.run("train.sh", BUCKET="mine", FAKE_EVALUATION=WRITES_A_SCORE)
    assert code == 0, said
    assert [call.split()[0] for call in machine.calls()] == ["train", "evaluate", "report"]
    assert "machine: next: gcloud storage cp gs://mine/runs/run/report.html .   (the report)\n" in said
    assert "machine:   or: finetune launch sky/serve.yaml --env RUN_NAME=run   (" in said
    assert re.search(
        r"machine: run: score \$\S+ \(measured hours, price: .+\) for \d+ s in 1 attempt \(measured\)\n", said
    )
    (attempt,) = account(machine).attempts
    assert (attempt.work, attempt.reason, attempt.usd_per_hour) == ("evaluate", "scored", 0.36)
    assert 0 < attempt.seconds < 60, "not the time before it, which training has paid for"
    assert attempt.usd == account(machine).of("evaluate").usd
    assert account(machine).of("train").usd is None


def test_it_is_off_unless_it_is_asked_for(machine: CloudMachine) -> None:
    code, said = machine.run("train.sh", EVALUATE="0")
    assert (code, machine.called("evaluate")) == (0, []), said
    assert SCORE_IT in said


@pytest.mark.parametrize("text", ["yes", "2", "true"])
def test_another_value_than_1_or_0_is_refused(machine: CloudMachine, text: str) -> None:
    code, said = machine.run("train.sh", EVALUATE=text)
    assert (code, machine.calls()) == (2, [])
    assert f"EVALUATE: expected 1 or 0, found '{text}'" in said


@pytest.mark.parametrize("code", [2, 75, 137])
def test_training_that_did_not_end_well_is_not_scored(machine: CloudMachine, code: int) -> None:
    assert machine.run("train.sh", FAKE_WORK=f"raise SystemExit({code})")[0] == code
    assert not machine.called("evaluate")


def test_training_that_ran_out_of_time_is_not_scored(machine: CloudMachine) -> None:
    code, said = machine.run("train.sh", MAX_HOURS="0.0004", FAKE_WORK="import time; time.sleep(30)")
    assert (code, machine.called("evaluate")) == (0, []), said


def test_a_finished_run_without_a_score_is_scored_and_not_trained_again(machine: CloudMachine) -> None:
    folder = trained(machine)
    code, said = machine.run("train.sh")
    assert code == 0, said
    assert machine.calls() == [f"evaluate {folder}", f"report {folder}"]


def test_a_finished_run_with_a_score_needs_nothing(machine: CloudMachine) -> None:
    folder = trained(machine)
    score_files(folder, 5)
    code, said = machine.run("train.sh", MAX_RUN_USD="0.0001")
    assert (code, machine.calls()) == (0, []), said
    assert "run is done and scored" in said
    score_files(folder, -5)
    machine.run("train.sh", MAX_RUN_USD="25")
    assert machine.called("evaluate"), "that was the score of an earlier adapter"


def test_an_interrupted_evaluation_is_run_again_and_goes_on_without_training(machine: CloudMachine) -> None:
    machine.env["FAKE_EVALUATION"] = SLEEPS
    process = machine.start("train.sh")
    wait_for(machine.folder / "calls.ready")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    machine.env["FAKE_EVALUATION"] = "pass"
    code, said = machine.run("train.sh")
    assert code == 0, said
    assert [call.split()[0] for call in machine.calls()] == ["train", "evaluate", "evaluate", "report"]
    assert reasons(machine) == [("evaluation 1", "interrupted"), ("evaluation 2", "scored")]


def test_an_evaluation_that_was_stopped_before_its_first_answer_is_run_again_too(machine: CloudMachine) -> None:
    trained(machine)
    machine.env |= {"FAKE_EVALUATION": SLEEPS, "STOPPED_WITH": "143"}
    process = machine.start("train.sh")
    wait_for(machine.folder / "calls.ready")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert reasons(machine) == [("evaluation 1", "interrupted")]


def test_a_job_that_is_stopped_while_it_waits_for_vllm_is_run_again(machine: CloudMachine) -> None:
    trained(machine)
    with being_built(machine):
        process = machine.start("train.sh")
        said = until(process, "waiting")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 75, said
    assert "waiting up to 15.0 minutes for vLLM's environment (VLLM_MINUTES)" in said
    assert not machine.called("evaluate")
    assert reasons(machine) == [("evaluation 1", "interrupted")]


@pytest.mark.parametrize("code", [1, 2, 137])
def test_a_failed_evaluation_fails_the_job_and_keeps_the_run(machine: CloudMachine, code: int) -> None:
    ended, said = machine.run("train.sh", FAKE_EVALUATION=f"raise SystemExit({code})")
    assert ended == code
    assert f"trained, but its score failed with exit code {code}\n" in said and SCORE_IT in said
    assert not machine.called("report")
    assert reasons(machine) == [("evaluation 1", "failed")]


def test_data_without_databases_are_no_failure(machine: CloudMachine) -> None:
    folder = machine.checkout / SET / "databases" / "shop"
    (folder / "shop.sqlite").unlink()
    folder.rmdir()
    code, said = machine.run("train.sh")
    assert (code, machine.called("evaluate")) == (0, []), said
    assert "not scored, because its data come without databases" in said


def test_data_without_questions_are_no_failure(machine: CloudMachine) -> None:
    manifest = machine.checkout / SET / "manifest.json"
    manifest.write_text('{"counts": {"train": 5, "val": 1, "test": 0}}')
    code, said = machine.run("train.sh")
    assert (code, machine.called("evaluate")) == (0, []), said
    assert "not scored, because its data have no questions in the split test" in said


def test_a_run_without_an_adapter_is_not_scored(machine: CloudMachine) -> None:
    begin_run(machine, "done")
    code, said = machine.run("train.sh")
    assert (code, machine.calls()) == (0, []), said
    assert "there is no adapter yet" in said


# --- one budget


def paid(machine: CloudMachine, usd_per_hour: float, spot: bool = False) -> float:
    """Sets the price of the machine. Returns what it has cost since its boot, which MAX_RUN_USD is compared with, too."""
    machine.env["FINETUNE_PRICES"] = prices(usd_per_hour, spot)
    return usd_per_hour * (machine_age() or 0.0) / 3600


def spend(machine: CloudMachine, usd: float, start: float = 0.0) -> None:
    """An attempt of training, of an hour on an earlier machine, with a start of this many seconds."""
    log = Ledger(machine.run_folder() / "ledger").new_attempt(
        1, machine={}, price=MachinePrice(usd, "b"), resumed_step=None
    )
    log.begin(start)
    log.end(3600.0, "done", 9)


def patched(machine: CloudMachine, code: str) -> None:
    """The job's Python begins with this code."""
    (machine.folder / "site").mkdir()
    (machine.folder / "site" / "sitecustomize.py").write_text(code)
    machine.env["PYTHONPATH"] = os.pathsep.join([str(machine.folder / "site"), *filter(None, sys.path)])


def test_too_little_money_left_keeps_the_run_and_says_so(machine: CloudMachine) -> None:
    """$0.36 an hour: 100 s are one cent."""
    trained(machine)
    spend(machine, 4.99)
    code, said = machine.run("train.sh", MAX_RUN_USD="5")
    assert (code, machine.calls()) == (0, []), said
    assert "not scored, too little is left for it (MAX_HOURS=24, MAX_RUN_USD=5; $4.99 of $5.00" in said
    assert "the run is kept\n" in said and SCORE_IT in said
    code, said = machine.run("train.sh", MAX_RUN_USD="5.5")
    assert code == 0 and machine.called("evaluate"), said


def test_the_budget_counts_what_an_evaluation_has_cost_before(machine: CloudMachine) -> None:
    trained(machine)
    log = Ledger(machine.run_folder() / "ledger", "evaluate").new_attempt(
        1, machine={}, price=MachinePrice(4.99, "b"), resumed_step=None
    )
    log.begin(3600.0)
    code, said = machine.run("train.sh", MAX_RUN_USD="5")
    assert (code, machine.calls()) == (0, []), said
    assert "$4.99 of $5.00" in said


def test_too_little_time_left_keeps_the_run(machine: CloudMachine) -> None:
    code, said = machine.run("train.sh", MAX_HOURS="0.03")
    assert (code, machine.called("evaluate")) == (0, []), said
    assert "not scored, too little is left for it (MAX_HOURS=0.03" in said


def test_on_a_spot_machine_a_restart_is_kept_in_reserve(machine: CloudMachine) -> None:
    """The longest start so far, of 600 s, would cost 6 cents again: 7 cents leave 100 s, 10 cents leave 400."""
    trained(machine)
    used = paid(machine, 0.36, spot=True)
    spend(machine, used, start=600.0)
    machine.env["SKYPILOT_CLUSTER_INFO"] = '{"zone": "us-central1-a"}'
    patched(machine, "from finetune.machine import metadata\nmetadata.value = lambda key: 'TRUE'\n")
    code, said = machine.run("train.sh", MAX_RUN_USD=f"{used + 0.07:.4f}")
    assert (code, machine.calls()) == (0, []), said
    code, said = machine.run("train.sh", MAX_RUN_USD=f"{used + 0.10:.4f}")
    assert code == 0 and machine.called("evaluate"), said


def test_an_evaluation_is_stopped_at_the_budget_and_the_job_succeeds(machine: CloudMachine) -> None:
    """$36 an hour: 40 s are 40 cents, and the last 20 s are the watchdog's reserve."""
    trained(machine)
    used = paid(machine, 36.0)
    spend(machine, used)
    machine.env |= {"FAKE_EVALUATION": SLEEPS}
    patched(machine, "from finetune.job import score\nscore.LEAST_SECONDS = 1.0\n")
    code, said = machine.run("train.sh", MAX_RUN_USD=f"{used + 0.40:.4f}")
    assert code == 0, said
    assert "not scored to the end (MAX_RUN_USD: $" in said and "the answers so far are kept" in said
    assert reasons(machine) == [("attempt 1", "done"), ("evaluation 1", "budget_stop")]
    usd = account(machine).usd
    assert usd is not None and used + 0.1 < usd <= used + 0.40


def test_several_machines_are_not_kept_waiting_for_a_score(machine: CloudMachine) -> None:
    nodes = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5", "SKYPILOT_NODE_RANK": "0"}
    trained(machine)
    code, said = machine.run("train.sh", **nodes)
    assert (code, machine.called("evaluate")) == (0, []), said
    assert "not scored here, where the other machines of the task would wait" in said


def test_a_machine_without_a_price_table_is_scored_and_writes_no_ledger(machine: CloudMachine) -> None:
    trained(machine)
    code, said = machine.run("train.sh", FINETUNE_PRICES="")
    assert code == 0 and machine.called("evaluate"), said
    assert not (machine.run_folder() / "ledger").exists()


# --- vLLM's environment


@contextmanager
def being_built(machine: CloudMachine) -> Iterator[None]:
    lock = machine.home / ".finetune" / "vllm.lock"
    lock.touch()
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def until(process: subprocess.Popen[str], word: str) -> str:
    """What the job says up to the first line with the word."""
    assert process.stderr
    said = ""
    while word not in said and (line := process.stderr.readline()):
        said += line
    return said


def test_why_there_is_no_vllm_is_said_in_one_line(machine: CloudMachine) -> None:
    trained(machine)
    (machine.home / ".finetune" / "vllm.missing").write_text("the disk has 3 GiB left,\nand vLLM needs 20\n")
    (machine.home / ".finetune" / "vllm.lock").touch()
    code, said = machine.run("train.sh")
    assert code == 0, said
    assert "machine: without vLLM: the disk has 3 GiB left, and vLLM needs 20\n" in said
    assert machine.called("evaluate")


def test_a_wait_for_vllm_has_an_end(machine: CloudMachine) -> None:
    trained(machine)
    with being_built(machine):
        code, said = machine.run("train.sh", VLLM_MINUTES="0.02")
        assert code == 0 and machine.called("evaluate"), said
        assert "vLLM's environment is not complete after 0.0 minutes (VLLM_MINUTES); going on without it" in said
        code, said = machine.run("evaluate.sh", VLLM_MINUTES="0")
        assert code == 0 and "waiting" not in said, said


def test_vllm_that_comes_in_time_ends_the_wait(machine: CloudMachine) -> None:
    trained(machine)
    with being_built(machine):
        process = machine.start("train.sh")
        assert "waiting" in until(process, "waiting")
        machine.program(machine.home / "finetune-vllm" / "bin", "python", "#!/bin/sh\n")
        _, said = process.communicate(timeout=30)
    assert process.returncode == 0 and "vLLM's environment came after" in said, said


def test_the_hf_generator_waits_for_no_vllm(machine: CloudMachine) -> None:
    config = machine.checkout / "config.yaml"
    config.write_text(config.read_text() + "evaluation: {generator: hf}\n")
    trained(machine)
    with being_built(machine):
        code, said = machine.run("train.sh")
    assert code == 0 and machine.called("evaluate") and "vLLM" not in said, said
