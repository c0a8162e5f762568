"""The scenarios on a real project: only `make cloud-test GCP_PROJECT=project` collects and runs them.

They are those of test_scenarios_*.py without what only the emulated cloud can do or observe; real_cost.py has their costs.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.budget.ledger import Ledger
from finetune.cloud.catalog.offers import load_catalog
from finetune.cloud.gcloud.config import bucket_name, local_login
from tests.emulated_cloud.gce_prices import published
from tests.emulated_cloud.machine_project import checkout
from tests.emulated_cloud.real import RealCloud, RealEnvironment
from tests.emulated_cloud.real_cost import SCENARIOS, admitted
from tests.emulated_cloud.real_gcloud import Gcloud, RealBuckets
from tests.emulated_cloud.real_run import LAUNCHED, NAMES, PROJECT
from tests.emulated_cloud.real_sky import RealSky
from tests.emulated_cloud.reconciliation import catalog_price, check_machine, idle
from tests.emulated_cloud.training import BUCKET, SAVE_STEPS, STEPS, Run, add_training, launch, wait_for_tensorboard

pytestmark = pytest.mark.cloud
MISTRAL = "configs/mistral_7b_qlora.yaml"
ON_A_GPU: dict[str, Any] = {"FINETUNE_ALLOW_CPU": 0, "FINETUNE_HEARTBEAT_SECONDS": 10}
"""A machine without its GPU is a failure here; and Google allows one write per second to an object."""
BOOT_SECONDS, SHARE = 30.0, 0.05
"""How far a machine's seconds may differ between bill and ledger (Google counts from before the kernel runs), plus a share of
them."""
STEP, JOB = 1500.0, 3600.0
"""Seconds to wait for a first checkpoint (a real set-up downloads 3 GB), and for a job's end."""
BUDGET_HOURS = 0.75
"""Of a machine: a start, some training, and the reserve for a restart, on the dearest machine."""
LONG = "training.max_steps=20000"
"""Enough steps to interrupt the run: a GPU computes those of the tiny training in less than a minute."""


@pytest.fixture(scope="session")
def session() -> RealEnvironment:
    assert PROJECT in os.environ, "run these with: make cloud-test GCP_PROJECT=project"
    gcloud, prefix = Gcloud(os.environ[PROJECT]), os.environ[NAMES]
    buckets = RealBuckets(gcloud, bucket_name(local_login()), BUCKET)
    return RealEnvironment(RealCloud(gcloud, prefix), buckets, RealSky(prefix, Path(os.environ[LAUNCHED])))


@pytest.fixture
def environment(session: RealEnvironment, request: pytest.FixtureRequest) -> Iterator[RealEnvironment]:
    """Its machines are taken down after the test, or when the test's minutes are over."""
    session.cloud.bill.stretches.clear()
    minutes = next(one.minutes for one in SCENARIOS if one.test == request.node.name)
    with session.scenario(minutes or 15):
        yield session
    print(session.cloud.bill.table(catalog_price(published(session.sky.home))))


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of the project with the tiny training in it."""
    folder = checkout(tmp_path_factory.mktemp("checkout") / "project")
    add_training(folder)
    return folder


def test_train_a100_as_typed(environment: RealEnvironment, project: Path, tmp_path: Path) -> None:
    """Policy, machine, bucket, data, set-up, training, checkpoints in the bucket; autodown takes the machine away."""
    name = environment.name("whole")
    words = launch("train_a100", "-c", name, "-i", "1", "--down", RUN_NAME=name, **ON_A_GPU)
    launched = environment.sky.run(*words, cwd=project).ok()
    print(f"launch to the end of training: {launched.seconds:.0f} s\n{launched.out}")
    assert "finetune: of " in launched.out, "the policy has chosen"
    assert environment.cloud.machine(name).request.gpu == "A100"
    run = Run(environment, name)  # type: ignore[arg-type]  # it uses only the buckets of the environment
    record = run.record()
    assert (record["status"], record["steps"]["done"]) == ("done", STEPS)
    assert run.committed()[-1] == STEPS
    environment.cloud.assert_empty(900)
    reconcile(environment, run, tmp_path)


def test_the_order_of_the_plan(environment: RealEnvironment, project: Path) -> None:
    """A dry run would try first what `finetune plan` ranks first; nothing starts."""
    planned = environment.sky.program("finetune", "plan", MISTRAL, "--json", cwd=project).ok()
    rows = [row for row in json.loads(planned.out)["rows"] if row["chosen"]]
    best = min(rows, key=lambda row: row["usd"])
    dry = environment.sky.run("launch", "-y", "--dryrun", "sky/train_cheapest.yaml", cwd=project).ok().out
    print(dry)
    first = re.search(r"\b1\. +(\S+) (spot|on-demand),", dry)
    assert first, "the policy prints its order"
    assert (first[1], first[2] == "spot") == (best["gpu"], best["spot"])
    assert not environment.cloud.machines()


def test_a_ceiling_below_every_price(environment: RealEnvironment, project: Path) -> None:
    """Refused with the nearest prices; nothing starts."""
    text = (project / "sky" / "train_a100.yaml").read_text(encoding="utf-8")
    (project / "sky" / "low.yaml").write_text(re.sub(r"max_hourly_cost: \S+", "max_hourly_cost: 0.10", text))
    refused = environment.sky.run(*launch("low", "-c", environment.name("low")), cwd=project)
    print(refused.out)
    assert refused.code != 0 and "no machine is allowed" in refused.out
    assert not environment.cloud.machines()


def test_preempted_twice(environment: RealEnvironment, project: Path, tmp_path: Path) -> None:
    """A managed job: Google's simulated preemption, then a machine that is deleted from outside."""
    name = environment.name("twice")
    words = launch("train_spot", "--jobs", "-d", "-n", name, RUN_NAME=name, overrides=LONG, MAX_RUN_USD=3, **ON_A_GPU)
    environment.sky.run(*words, cwd=project).ok()
    run = Run(environment, name)  # type: ignore[arg-type]
    first = environment.cloud.wait_for_machine(name)
    run.wait_for_step(2 * SAVE_STEPS, STEP)
    environment.cloud.preempt(first)
    second = environment.cloud.wait_for_machine(name, other_than=first)
    reached = max(run.committed())
    run.wait_for_step(reached + 2 * SAVE_STEPS, STEP)
    environment.cloud.crash(second)
    reached = max(run.committed())
    environment.cloud.wait_for_machine(name, other_than=second)
    run.wait_for_step(reached + 2 * SAVE_STEPS, STEP)
    attempts = run.record()["attempts"]
    assert attempts == 3, f"three attempts on three machines: {attempts}"
    queue = environment.sky.run("jobs", "queue", "--all").ok().out
    assert re.search(rf" {name} .*\s2\s+RUNNING", queue), queue
    environment.sky.run("jobs", "cancel", "-y", "-n", name).ok()
    environment.cloud.assert_empty(900)
    reconcile(environment, run, tmp_path)


def test_a_budget_that_runs_out(environment: RealEnvironment, project: Path, tmp_path: Path) -> None:
    """The run stops before its budget is used up and records that, and its machine goes down by itself."""
    text = (project / "sky" / "train_t4.yaml").read_text(encoding="utf-8")
    (project / "sky" / "budget.yaml").write_text(text.replace("    - {use_spot: false}\n", ""), encoding="utf-8")
    budget = round(BUDGET_HOURS * admitted(project / "sky" / "budget.yaml", load_catalog())[0].usd_per_hour, 3)
    name = environment.name("budget")
    often = f"{LONG} checkpoint.every_minutes=0.5"  # a budget that does not reach the next checkpoint is refused
    more = {"RUN_NAME": name, "MAX_RUN_USD": budget, **ON_A_GPU}
    launched = environment.sky.run(
        *launch("budget", "-c", name, "-i", "1", "--down", overrides=often, **more), cwd=project
    ).ok()
    print(launched.out)
    run = Run(environment, name)  # type: ignore[arg-type]
    assert run.record()["status"] == "budget_stop"
    assert run.committed(), "a checkpoint to resume from"
    environment.cloud.assert_empty(900)
    account = Ledger(environment.buckets.fetch(run.prefix, tmp_path) / "ledger").account()
    assert account.usd is not None and account.usd <= budget, (account.usd, budget)


def test_looking_stopping_and_starting(environment: RealEnvironment, project: Path) -> None:
    """status, TensorBoard through ssh, stop in mid-run, start, resume by the same launch, logs, down."""
    name = environment.name("look")
    words = launch("train_a100", "-d", "-c", name, overrides=LONG, RUN_NAME=name, **ON_A_GPU)
    environment.sky.run(*words, cwd=project).ok()
    run = Run(environment, name)  # type: ignore[arg-type]
    run.wait_for_step(SAVE_STEPS, STEP)
    assert "UP" in environment.sky.run("status", name).ok().out
    with environment.sky.ssh(name, "-N", "-L", "6006:localhost:6006"):
        wait_for_tensorboard(f"{name}/tensorboard")
    environment.sky.run("stop", "-y", name).ok()
    assert "STOPPED" in environment.sky.run("status", "--refresh", name).ok().out
    stopped = max(run.committed())
    environment.sky.run("start", "-y", name).ok()
    environment.sky.run(*words, cwd=project).ok()
    run.wait_for_step(stopped + SAVE_STEPS, STEP)
    logs = environment.sky.run("logs", name, "--no-follow").ok().out
    assert f"resuming from /bucket/runs/{name}/checkpoints/step-{stopped}" in logs
    environment.sky.run("down", "-y", name).ok()
    environment.cloud.assert_empty()


def reconcile(environment: RealEnvironment, run: Run, folder: Path) -> None:
    """Compares the observed seconds with the ledger, machine by machine, and prints both."""
    price = catalog_price(published(environment.sky.home))
    account = Ledger(environment.buckets.fetch(run.prefix, folder) / "ledger").account()
    stretches = [one for one in environment.cloud.bill.stretches if one.running]
    assert not account.problems, account.problems
    assert len(stretches) == len(account.attempts), (stretches, account.attempts)
    for stretch, attempt in zip(stretches, account.attempts, strict=True):
        check_machine(stretch, attempt, price(stretch))
        seen = stretch.seconds - idle(run, stretch, attempt)
        print(
            f"attempt {attempt.number}: {attempt.seconds:.0f} s in the ledger, {seen:.0f} s observed, idle time excluded"
        )
        assert abs(attempt.seconds - seen) < BOOT_SECONDS + SHARE * seen, (attempt, stretch)
