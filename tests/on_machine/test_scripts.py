"""on_machine/train.sh, evaluate.sh and dev.sh, run for real on a machine whose expensive programs are stand-ins."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.machine_fixture import CONFIG, CloudMachine, begin_run, gone, rent, wait_for

SLOW_TO_STOP = """
import os, signal, subprocess, sys, time
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
helper = subprocess.Popen(["sleep", "30"])
open(os.environ["CALLS"] + ".ready", "w").close()
while not signals:
    time.sleep(0.02)
time.sleep(0.6)
with open(os.environ["CALLS"] + ".signals", "w") as file:
    file.write(f"{len(signals)} {helper.poll()}")
helper.kill()
sys.exit(75)
"""
"""Like `finetune train`: SIGTERM lets it save, for which it needs its helper process, then it exits 75."""
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


def prices(usd_per_hour: float) -> str:
    """A launch's price table with one machine."""
    offer = {"gpu": "T4", "zone": "us-central1-a", "spot": True, "usd_per_hour": usd_per_hour}
    return json.dumps({"basis": "a test", "ceiling_usd_per_hour": None, "offers": [offer]})


@pytest.fixture
def machine(tmp_path: Path) -> CloudMachine:
    return rent(tmp_path)


# --- start, resume, done ---------------------------------------------------------------------------------------------------


def test_a_new_run_begins_in_the_bucket_under_its_ceiling(machine: CloudMachine) -> None:
    code, said = machine.run("train.sh", MAX_RUN_USD="7.5", OVERRIDES="lora.r=4 training.seed=1")
    assert code == 0, said
    assert machine.calls()[-1] == (
        f"train config.yaml lora.r=4 training.seed=1 training.output_dir={machine.bucket}/runs training.run_name=run "
        "budget.max_run_usd=7.5"
    )
    assert "training for at most 24.0000 hours" in said


def test_the_first_job_of_a_boot_goes_on_with_the_log_of_set_up(machine: CloudMachine) -> None:
    log = machine.home / ".finetune" / "set-up.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text("0.1 boot\n= packages_from bucket\n0.2 gpu_check\n")
    assert machine.run("train.sh")[0] == 0
    lines = log.read_text().splitlines()[3:]
    assert [line.split()[-1] for line in lines if not line.startswith("=")] == ["job_start", "data", "model_files"]
    assert "= model_from hub" in lines
    assert not (machine.home / ".finetune" / "set-up.json").exists(), "a stand-in trains no step, so nothing is kept"
    assert not (machine.bucket / "set-up").exists() and not (machine.bucket / "models").exists()
    assert machine.run("train.sh")[0] == 0
    assert not log.exists(), "a second job does not begin with the machine"


@pytest.mark.parametrize("status", ["interrupted", "running", "failed", "budget_stop"])
def test_an_interrupted_run_resumes_under_the_ceiling_typed_last(machine: CloudMachine, status: str) -> None:
    folder = begin_run(machine, status)
    before = (folder / "config.yaml").read_text()
    code, said = machine.run("train.sh", MAX_RUN_USD="40")
    assert code == 0, said
    assert machine.called("train") == [f"train --resume {folder} --max-run-usd 40"]
    assert (folder / "config.yaml").read_text() == before, (
        "`finetune train` writes the ceiling, once nothing is in its way"
    )
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "run.json"]


def test_a_finished_run_is_left_alone(machine: CloudMachine) -> None:
    begin_run(machine, "done")
    code, said = machine.run("train.sh")
    assert (code, machine.calls()) == (0, [])
    assert "run is done" in said


def test_an_attempt_killed_before_its_first_record_is_started_again(machine: CloudMachine) -> None:
    folder = begin_run(machine, "running")
    (folder / "run.json").unlink()
    (folder / ".run.json.x1.tmp").touch()
    code, said = machine.run("train.sh")
    assert code == 0, said
    assert machine.called("train config.yaml")
    assert not folder.exists(), "`finetune train` refuses a name that is taken"


def test_a_folder_of_something_else_is_not_touched(machine: CloudMachine) -> None:
    folder = begin_run(machine, "running")
    (folder / "run.json").unlink()
    (folder / "thesis.txt").touch()
    code, said = machine.run("train.sh")
    assert (code, machine.calls()) == (2, [])
    assert str(folder) in said
    assert (folder / "config.yaml").exists()


# --- names -----------------------------------------------------------------------------------------------------------------


def test_without_a_name_the_run_is_named_after_the_job_also_on_the_next_machine(machine: CloudMachine) -> None:
    task = "sky-managed-2026-11-22-15-12-31-123456_train spot/a:b_12-0"
    name = "sky-managed-2026-11-22-15-12-31-123456_train-spot-a-b_12-0"
    machine.run("train.sh", RUN_NAME="", SKYPILOT_TASK_ID=task)
    assert f"training.run_name={name}" in machine.called("train")[0]
    assert {f"WANDB_RUN_ID={name}", f"WANDB_NAME={name}", "WANDB_RESUME=allow"} <= set(machine.seen_environment())
    begin_run(machine, "interrupted", name)
    machine.run("train.sh")
    assert machine.called("train")[1] == f"train --resume {machine.run_folder(name)} --max-run-usd 25"


@pytest.mark.parametrize("name", ["a/b", "../up", ".hidden", "two words", "a" * 101, "-flag"])
def test_a_name_that_is_not_a_valid_folder_is_refused(machine: CloudMachine, name: str) -> None:
    code, said = machine.run("train.sh", RUN_NAME=name)
    assert (code, machine.calls()) == (2, [])
    assert "RUN_NAME" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MAX_RUN_USD", "-3"),
        ("MAX_RUN_USD", "all"),
        ("MAX_HOURS", "0"),
        ("MAX_HOURS", "0.0"),
        ("GRACE_SECONDS", "soon"),
        ("CONFIG", ""),
        ("RUN_NAME", ""),
    ],
)
def test_an_invalid_setting_is_refused(machine: CloudMachine, variable: str, value: str) -> None:
    code, said = machine.run("train.sh", **{variable: value})
    assert (code, machine.called("train")) == (2, [])
    assert variable in said


def test_empty_secrets_are_dropped_and_others_passed_on(machine: CloudMachine) -> None:
    machine.run("train.sh", WANDB_API_KEY="", HF_TOKEN="token-of-mine")
    seen = machine.seen_environment()
    assert "HF_TOKEN=token-of-mine" in seen
    assert not [line for line in seen if line.startswith("WANDB_API_KEY")]


def test_without_a_bucket_nothing_starts(machine: CloudMachine) -> None:
    machine.bucket.rmdir()
    code, said = machine.run("train.sh")
    assert (code, machine.calls()) == (2, [])
    assert "no bucket" in said


def test_an_invalid_config_is_a_user_error(machine: CloudMachine) -> None:
    (machine.checkout / "config.yaml").write_text(CONFIG + "trainnig: {}\n")
    code, said = machine.run("train.sh")
    assert (code, machine.calls()) == (2, [])
    assert "trainnig" in said
    assert not (machine.bucket / "runs").exists()


# --- limits, signals, exit codes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 2, 75, 137])
def test_the_job_has_the_exit_code_of_training(machine: CloudMachine, code: int) -> None:
    assert machine.run("train.sh", FAKE_CODE=str(code))[0] == code


@pytest.mark.parametrize("work", [SLOW_TO_STOP, DEAF], ids=["saves", "hangs"])
def test_when_the_hours_are_over_the_job_succeeds_and_is_not_restarted(machine: CloudMachine, work: str) -> None:
    code, said = machine.run("train.sh", MAX_HOURS="0.0004", FAKE_WORK=work)
    assert code == 0, said
    assert "0.0004 hours are over" in said
    assert "RUN_NAME=run" in said


def test_a_preemption_notice_is_sent_once_and_only_to_training(machine: CloudMachine) -> None:
    machine.env["FAKE_WORK"] = SLOW_TO_STOP
    process = machine.start("train.sh")
    wait_for(machine.folder / "calls.ready")
    wait_for(machine.folder / "calls.tensorboard")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 75
    assert (machine.folder / "calls.signals").read_text() == "1 None"
    assert gone(int((machine.folder / "calls.tensorboard").read_text()))


def test_tensorboard_shows_all_runs_on_localhost_only(machine: CloudMachine) -> None:
    machine.env["FAKE_WORK"] = "import time; time.sleep(1)"
    code, said = machine.run("train.sh", SKYPILOT_CLUSTER_INFO='{"cluster_name": "mine"}')
    assert code == 0, said
    call = next(line for line in (machine.folder / "calls").read_text().splitlines() if line.startswith("tensorboard"))
    assert call.startswith(f"tensorboard --logdir {machine.bucket}/runs --host 127.0.0.1 --port 6006")
    assert "ssh -L 6006:localhost:6006 mine" in said
    assert gone(int((machine.folder / "calls.tensorboard").read_text()))


def test_with_an_unknown_price_only_max_hours_applies(machine: CloudMachine) -> None:
    code, said = machine.run("train.sh", FINETUNE_PRICES="{torn", MAX_HOURS="3")
    assert code == 0, said
    assert "FINETUNE_PRICES" in said and "only MAX_HOURS=3 limits its time" in said
    assert "at most 3.0000 hours" in said


def test_a_budget_that_the_machine_has_used_up_starts_nothing(machine: CloudMachine) -> None:
    code, said = machine.run("train.sh", FINETUNE_PRICES=prices(usd_per_hour=9e5))
    assert (code, machine.called("train")) == (2, [])
    assert "MAX_RUN_USD" in said


# --- evaluation, development -----------------------------------------------------------------------------------------------


def test_a_named_run_is_scored_and_reported(machine: CloudMachine) -> None:
    begin_run(machine, "done")
    code, said = machine.run("evaluate.sh", BUCKET="my-bucket")
    assert code == 0, said
    assert machine.calls()[-2:] == [f"evaluate {machine.run_folder()}", f"report {machine.run_folder()}"]
    assert "gs://my-bucket/runs/run/report.html" in said


def test_without_a_name_the_newest_trained_run_is_scored_or_that_of_this_job(machine: CloudMachine) -> None:
    for age, name in enumerate(["new", "old", "untrained"]):
        adapter = begin_run(machine, "done", name) / "adapter" / "adapter_config.json"
        if name != "untrained":
            adapter.parent.mkdir()
            adapter.touch()
            os.utime(adapter, (10_000 - age, 10_000 - age))
    machine.run("evaluate.sh", RUN_NAME="", SKYPILOT_TASK_ID="job")
    assert machine.called("evaluate") == [f"evaluate {machine.run_folder('new')}"]
    begin_run(machine, "done", "job")
    machine.run("evaluate.sh")
    assert machine.called("evaluate")[1:] == [f"evaluate {machine.run_folder('job')}"]


def test_a_missing_run_is_reported_with_the_existing_ones(machine: CloudMachine) -> None:
    begin_run(machine, "done", "other")
    code, said = machine.run("evaluate.sh")
    assert (code, machine.calls()) == (2, [])
    assert "other/" in said


def test_a_failed_evaluation_is_not_reported(machine: CloudMachine) -> None:
    begin_run(machine, "done")
    assert machine.run("evaluate.sh", FAKE_CODE="2")[0] == 2
    assert not machine.called("report")


def test_an_evaluation_that_takes_too_long_fails_and_says_how_to_go_on(machine: CloudMachine) -> None:
    begin_run(machine, "done")
    code, said = machine.run("evaluate.sh", MAX_HOURS="0.0004", FAKE_WORK="import time; time.sleep(30)")
    assert code == 2
    assert "not scored in 0.0004 hours" in said and "--env RUN_NAME=run, which goes on" in said
    assert not machine.called("report")


def test_an_evaluation_that_was_interrupted_exits_as_it_does_so_that_it_is_run_again(machine: CloudMachine) -> None:
    begin_run(machine, "done")
    assert machine.run("evaluate.sh", FAKE_CODE="75")[0] == 75
    assert not machine.called("report")
    assert machine.run("evaluate.sh", FAKE_CODE="0")[0] == 0
    assert machine.called("evaluate") == [f"evaluate {machine.run_folder()}"] * 2


def test_jupyter_listens_on_localhost_keeps_its_token_and_ends_when_idle(machine: CloudMachine) -> None:
    code, said = machine.run("dev.sh", SKYPILOT_CLUSTER_INFO='{"cluster_name": "dev"}')
    assert code == 0, said
    (call,) = machine.called("jupyter")
    assert {"--ip=127.0.0.1", "--port=8888", "--no-browser", "--ServerApp.shutdown_no_activity_timeout=1800"} <= set(
        call.split()
    )
    assert "token" not in call.lower()
    assert "password" not in call.lower()
    assert "ssh -L 8888:localhost:8888 -L 6006:localhost:6006 dev" in said
    assert (machine.checkout / "notebooks").resolve() == machine.bucket / "notebooks"


# --- several GPUs

TWO = "GPU 0: NVIDIA L4 (UUID: GPU-1)\nGPU 1: NVIDIA L4 (UUID: GPU-2)"
PYTHON = """\
#!/usr/bin/env bash
case "$*" in
  "-m finetune.runtime.torchrun "*) echo "$*" >>"$CALLS"; exit "${FAKE_CODE:-0}" ;;
esac
exec %s "$@"
"""
ENDS = "training.output_dir={bucket}/runs training.run_name=run budget.max_run_usd=25"


def with_gpus(machine: CloudMachine, listed: str) -> None:
    """Stand-ins for nvidia-smi, and for python when it starts several processes."""
    programs = machine.home / "finetune-env" / "bin"
    machine.program(programs, "nvidia-smi", f"#!/bin/sh\n[ \"$1\" = --list-gpus ] && printf '%s\\n' '{listed}'\n")
    machine.program(programs, "python", PYTHON % sys.executable)


def test_several_gpus_train_with_one_process_each(machine: CloudMachine) -> None:
    with_gpus(machine, TWO)
    code, said = machine.run("train.sh", FAKE_CODE="75")
    assert code == 75, said
    assert machine.calls()[-1] == (
        "-m finetune.runtime.torchrun --nproc-per-node 2 -m finetune train config.yaml "
        + ENDS.format(bucket=machine.bucket)
    )
    folder = begin_run(machine, "interrupted")
    machine.run("train.sh")
    assert machine.calls()[-1] == (
        f"-m finetune.runtime.torchrun --nproc-per-node 2 -m finetune train --resume {folder} --max-run-usd 25"
    )


@pytest.mark.parametrize(("listed", "visible"), [(TWO.partition("\n")[0], ""), (TWO, "1"), ("", "")])
def test_one_gpu_or_none_needs_one_process(machine: CloudMachine, listed: str, visible: str) -> None:
    with_gpus(machine, listed)
    code, said = machine.run("train.sh", CUDA_VISIBLE_DEVICES=visible)
    assert code == 0, said
    assert machine.calls()[-1] == "train config.yaml " + ENDS.format(bucket=machine.bucket)


def node(rank: int) -> dict[str, str]:
    return {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5", "SKYPILOT_NODE_RANK": str(rank)}


@pytest.mark.parametrize(("listed", "processes"), [(TWO, 2), (TWO.partition("\n")[0], 1)])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_nodes_of_a_task_connect_to_the_first(
    machine: CloudMachine, listed: str, processes: int, rank: int
) -> None:
    """The words of the first are those of all: finetune/cli/train.py."""
    with_gpus(machine, listed)
    code, said = machine.run("train.sh", **node(rank))
    assert code == 0, said
    words = "config.yaml" if rank else "config.yaml " + ENDS.format(bucket=machine.bucket)
    assert machine.calls()[-1] == (
        f"-m finetune.runtime.torchrun --nnodes 2 --node-rank {rank} --master-addr 10.0.0.4 --master-port 29500 "
        f"--nproc-per-node {processes} -m finetune train {words}"
    )


@pytest.mark.parametrize(("ended", "code"), [(0, 0), (75, 0), (2, 2), (1, 1)])
def test_another_node_leaves_it_to_the_first_to_report_an_interruption(
    machine: CloudMachine, ended: int, code: int
) -> None:
    """SkyPilot kills every node as soon as one ends with another code than 0, also one that copies its last checkpoint."""
    with_gpus(machine, TWO)
    found, said = machine.run("train.sh", FAKE_CODE=str(ended), **node(1))
    assert (found, "next:" in said) == (code, False), said
    assert machine.run("train.sh", FAKE_CODE=str(ended), **node(0))[0] == ended


def test_another_node_leaves_the_run_alone_and_does_nothing_for_one_that_is_done(machine: CloudMachine) -> None:
    with_gpus(machine, TWO)
    unfinished = machine.run_folder()
    (unfinished / "lease").mkdir(parents=True)
    (unfinished / "config.yaml").touch()  # the first node is just starting it
    assert machine.run("train.sh", **node(1))[0] == 0
    assert (unfinished / "config.yaml").exists() and machine.called("-m finetune.runtime.torchrun")
    (machine.folder / "calls").unlink()
    shutil.rmtree(unfinished)
    begin_run(machine, status="done")
    assert machine.run("train.sh", **node(1))[0] == 0
    assert machine.calls() == []
