"""`sky jobs launch sky/sweep.yaml`: twelve trials under one budget, two preemptions, and a budget that ends it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from finetune.budget.attempts import Account
from finetune.budget.ledger import Ledger
from tests.emulated_cloud.environment import CloudEnvironment
from tests.emulated_cloud.pace import paid_seconds, wait_until
from tests.emulated_cloud.reconciliation import check_nothing_left, reconcile
from tests.emulated_cloud.table import record_metric
from tests.emulated_cloud.test_scenarios_preemption import cheapest_l4, wait_for_job
from tests.emulated_cloud.training import BUCKET, HEARTBEAT_SECONDS, SET_UP, Run, launch

pytestmark = pytest.mark.cloud
NAME, TRIALS, STEPS = "swept", 12, 100
STEP_SECONDS = 1.0
"""Pause after each step: a trial takes half a minute to the first comparison, after a quarter of the steps."""
PREEMPTIONS = 2
TRAINING_SECONDS = 110
"""Scaled by pace.py: what the budget pays for besides the starts. They take less than the budget assumes, which leaves room for
the one in reserve. The whole sweep would take 900, more than starts that are
faster than the pace says can leave."""
OVERRIDES = (
    f"training.max_steps={STEPS} training.eval_steps=1000 training.logging_steps=5 "
    f"checkpoint.save_steps=1000 checkpoint.every_minutes=0.15 {SET_UP}"
)
SWEEP = "training.learning_rate=1e-3,3e-3,1e-2 lora.r=2,4,8,16"


@dataclass
class Swept(Run):
    """A sweep in the bucket, as one run whose ledger is that of all trials and of the sweep itself."""

    @property
    def prefix(self) -> str:
        return f"runs/sweeps/{self.name}/"

    def compared(self) -> set[str]:
        """Names of the results that are there."""
        names = self.environment.buckets.objects(BUCKET, f"{self.prefix}results/")
        return {Path(name).stem for name in names if name.endswith(".json")}

    def results(self) -> dict[str, dict[str, Any]]:
        return {name: json.loads(self.read(f"results/{name}.json")) for name in sorted(self.compared())}

    def wait_for_result(self, count: int, seconds: float = 300) -> None:
        """Asks for names alone and seldom: the bucket serves the machine, too."""
        self._wait(lambda: len(self.compared()) >= count, seconds, f"not {count} results", every=2)

    def trial(self, number: int) -> Run:
        return Run(self.environment, f"{self.name}-t{number:02d}")

    def account(self, folder: Path) -> Account:
        """The files of the attempts are named by their place below the bucket's runs/, where `updated` finds them."""
        own = Ledger(self.fetch(folder) / "ledger", "sweep").account()
        accounts = [(f"sweeps/{self.name}", own)]
        for number in range(TRIALS):
            run = self.trial(number)
            if run.objects():
                accounts.append((run.name, run.account(folder)))
        attempts = [
            replace(attempt, file=f"{place}/ledger/{attempt.file}")
            for place, one in accounts
            for attempt in one.attempts
        ]
        problems = [problem for _, one in accounts for problem in one.problems]
        return Account(tuple(sorted(attempts, key=lambda attempt: attempt.began_at or "")), tuple(problems))

    def updated(self, name: str) -> float:
        return self.environment.buckets.updated(BUCKET, f"runs/{name.removeprefix('ledger/')}")


def test_a_sweep(environment: CloudEnvironment, project: Path, tmp_path: Path) -> None:
    region, usd_per_hour = cheapest_l4(environment, project)
    seconds = paid_seconds(PREEMPTIONS + 1, TRAINING_SECONDS)
    budget = round(seconds * usd_per_hour / 3600, 4)
    record_metric(f"budget ${budget}, for {seconds:.0f} s")
    machine = ("--gpus", "L4:1", "--instance-type", "g2-standard-8", "--infra", f"gcp/{region}")
    begin = ("sweep", "--jobs", "-d", "-n", NAME, *machine)
    settings: dict[str, Any] = {
        "SWEEP": SWEEP,
        "RUN_NAME": NAME,
        "MAX_RUN_USD": budget,
        "FT_STEP_SECONDS": STEP_SECONDS,
    }
    words = launch(*begin, overrides=OVERRIDES, **settings)
    environment.sky.run(*words, cwd=project).ok()
    sweep = Swept(environment, NAME)

    first = environment.cloud.wait_for_machine(NAME, 180)
    sweep.wait_for_result(1)
    wait_until(
        lambda: bool(sweep.trial(1).committed()), 120, lambda waited: f"no second trial; {sweep.diagnostics()}", every=2
    )
    environment.cloud.preempt(first)
    second = environment.cloud.wait_for_machine(NAME, 300, other_than=first)
    sweep.wait_for_result(2)
    wait_until(
        lambda: bool(sweep.trial(2).committed()), 120, lambda waited: f"no third trial; {sweep.diagnostics()}", every=2
    )
    environment.cloud.crash(second)
    environment.cloud.wait_for_machine(NAME, 300, other_than=second)

    line = wait_for_job(environment, NAME, "SUCCEEDED", 600)
    log = environment.sky.run("jobs", "logs", line.split()[0], "--no-follow").ok().out
    print(log[-4000:])
    assert "the budget ends the sweep: " in log and "with a higher MAX_RUN_USD goes on" in log
    results = sweep.results()
    assert 2 <= len(results) < 21, f"12 + 6 + 3 would be all: {sorted(results)}"
    assert all(result["loss"] is not None for result in results.values())
    check_money(sweep, budget, tmp_path)

    words[words.index(f"MAX_RUN_USD={budget}")] = "MAX_RUN_USD=5"
    environment.sky.run(*words, cwd=project).ok()
    sweep.wait_for_result(len(results) + 1)
    environment.sky.run("jobs", "cancel", "-y", "-n", NAME).ok()
    environment.cloud.assert_empty(120)
    assert {name: sweep.results()[name] for name in results} == results, "what was decided stays"
    check_nothing_left(environment)


def check_money(sweep: Swept, budget: float, folder: Path) -> None:
    """The ledgers of all trials and of the sweep itself agree with the bill, and with the budget."""
    reconciliation = reconcile(sweep, folder)
    account = sweep.account(folder / "again")
    trials = sum(attempt.usd or 0.0 for attempt in account.of("train").attempts)
    reasons = [
        (attempt.file.split("/")[0].rpartition("-")[2], attempt.reason) for attempt in account.of("train").attempts
    ]
    record_metric(
        f"{len(sweep.results())} results; ${trials:.4f} on the trials' ledgers, "
        f"${reconciliation.ledger_usd - trials:.4f} on the sweep's own; {reasons}"
    )
    assert budget / 3 < reconciliation.ledger_usd <= budget
    heartbeat = HEARTBEAT_SECONDS / reconciliation.ledger_seconds * reconciliation.ledger_usd
    assert reconciliation.bill_usd - reconciliation.tail_usd < budget + heartbeat
    cut_off = [trial for trial, reason in reasons if reason is None]
    # SkyPilot's controller deletes a preempted machine once it looks, which may be before the run has closed its ledger
    assert cut_off in (["t02"], ["t01", "t02"]), "the crash, and perhaps the preemption"
