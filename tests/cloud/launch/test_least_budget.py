"""Budgets with which a job would end before it has begun, by its own rule: on offers made by hand, and by the real client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.budget.attempts import Account
from finetune.budget.meter import Meter
from finetune.cloud.catalog.offers import Offer
from finetune.cloud.launch.candidates import Candidate, Requirement
from finetune.cloud.launch.least_budget import Start, refuse_small_budgets, starts_of
from finetune.config.load import load_config
from finetune.machine.billed_time import MachineTime
from finetune.machine.price import Ceilings, MachinePrice
from tests.helpers.catalog_fixture import G4, lay_out_catalog
from tests.helpers.sky_home import SkyWorker, bucket_stand_in, fake_gcloud_home

ROOT = Path(__file__).resolve().parents[3]
POLICY = "finetune.cloud.launch.policy.CostPolicy"
CONFIG = load_config(ROOT / "configs" / "mistral_7b_qlora.yaml", [])
SET_UP, SAVE = 0.2, 10 / 60
"""Hours."""
Json = dict[str, Any]


def candidate(usd: float, *, spot: bool = True, refusal: str = "", nodes: int = 1, gpu: str = "L4") -> Candidate:
    requirement = Requirement(gpu, 1, "m", spot, None, None, 200, "medium", 5.0, 0, nodes)
    offer = Offer(gpu, 1, "m", "r1", "r1-a", spot, usd / 2, usd / 4, usd / 4)
    return Candidate(requirement, offer, None, refusal)


def refusals(usd: float, *found: Candidate, job: str = "train", begun: bool = False) -> list[str]:
    starts = starts_of(job, usd, None, 60 * SET_UP, None if begun else CONFIG)
    return [one.refusal for one in refuse_small_budgets(found, starts)]


def begins_on_the_machine(budget: float, usd_per_hour: float, dearest: float | None) -> bool:
    """Whether the meter of a run lets it begin when the machine is set up."""
    time = MachineTime(provisioned=False, age=lambda: 3600 * SET_UP)
    price, ceilings = MachinePrice(usd_per_hour, "catalog"), Ceilings(run_usd=budget)
    meter = Meter(Account(()), time, price, ceilings, restart_usd_per_hour=dearest)
    return meter.check_start(3600 * SAVE) is None


@pytest.mark.parametrize("spot", [True, False])
@pytest.mark.parametrize("budget", [0.01, 0.07, 0.10, 0.134, 0.135, 0.20, 0.208, 0.21, 0.25])
def test_a_budget_is_refused_where_the_run_itself_would_refuse_it(budget: float, spot: bool) -> None:
    """An L4 at $0.368 an hour: boot and set-up are $0.074, and as much is in reserve on spot."""
    (refusal,) = refusals(budget, candidate(0.368, spot=spot))
    assert (not refusal) == begins_on_the_machine(budget, 0.368, 0.368 if spot else None)
    least = 0.21 if spot else 0.14
    assert not refusal or f"MAX_RUN_USD={budget:g} would be used up before a checkpoint: {least} pays for" in refusal


@pytest.mark.parametrize("spot", [True, False])
def test_the_budget_that_is_named_would_do(spot: bool) -> None:
    for usd in (0.05, 0.1234, 0.368, 0.85, 3.7, 40.0):
        (refusal,) = refusals(0.001, candidate(usd, spot=spot))
        least = float(refusal.split(": ")[1].split()[0])
        assert refusals(least, candidate(usd, spot=spot)) == [""]
        assert refusals(least - 0.011, candidate(usd, spot=spot)) != [""]


def test_the_price_is_that_of_all_nodes() -> None:
    (alone,), (both,) = (refusals(0.25, candidate(0.368, nodes=nodes)) for nodes in (1, 2))
    assert not alone and "0.42 pays for" in both


def test_a_machine_that_is_too_dear_does_not_take_the_cheap_one_with_it() -> None:
    """A restart is reserved on the dearest machine of the launch, of which a refused one is none."""
    cheap, dear, above = candidate(0.368), candidate(3.7, spot=False, gpu="A100"), candidate(9.0, refusal="above")
    first, second, third = refusals(0.25, cheap, dear, above)
    assert not first and "1.36 pays for" in second and third == "above"
    assert refusals(1.40, cheap, dear) == ["", ""]
    assert begins_on_the_machine(1.40, 0.368, 3.7)


def test_a_restart_on_a_dearer_machine_is_reserved() -> None:
    spot, demand = candidate(0.7), candidate(0.9, spot=False)
    assert not begins_on_the_machine(0.42, 0.7, 0.9)
    first, second = refusals(0.42, spot, demand)
    assert "0.44 pays for" in first and not second


def test_a_run_that_is_there_may_have_its_score_left_alone() -> None:
    assert refusals(0.16, candidate(0.368)) != [""] and refusals(0.16, candidate(0.368), begun=True) == [""]
    assert refusals(0.10, candidate(0.368), begun=True) != [""]


@pytest.mark.parametrize("job", ["evaluate", "serve", "dev"])
def test_other_jobs_need_something_left_when_they_begin(job: str) -> None:
    (refusal,) = refusals(0.07, candidate(0.368), job=job)
    assert refusal == (
        "MAX_RUN_USD=0.07 would be used up before the job begins: 0.08 pays for 12.0 min of boot and set-up (estimated)"
    )
    assert refusals(0.08, candidate(0.368), job=job) == [""]


def test_serving_needs_two_minutes_of_its_day() -> None:
    def refused(daily: float) -> str:
        starts = starts_of("serve", 10.0, daily, 60 * SET_UP, None)
        (one,) = refuse_small_budgets([candidate(0.368)], starts)
        return one.refusal

    assert refused(0.08).startswith("MAX_USD_PER_DAY=0.08 would be used up before it serves: 0.09 pays for ")
    assert not refused(0.09)


def test_a_sweep_begins_as_its_trials_do_and_a_task_of_the_users_own_is_not_judged() -> None:
    assert "before a checkpoint" in refusals(0.10, candidate(0.368), job="sweep")[0]
    assert refusals(0.0001, candidate(0.368), job="") == [""]


def test_a_config_without_a_save_interval_in_minutes_counts_as_the_run_counts_it() -> None:
    steps_alone = load_config(ROOT / "configs" / "mistral_7b_qlora.yaml", ["checkpoint.every_minutes=null"])
    (start,) = starts_of("train", 1.0, None, 12, steps_alone)
    assert isinstance(start, Start) and start.seconds == 60


# by the real client


def ask(worker: SkyWorker, name: str, *, op: str = "reachable", request: str = "CLUSTER_LAUNCH", **envs: str) -> Json:
    task = yaml.safe_load((ROOT / "sky" / f"{name}.yaml").read_text(encoding="utf-8"))
    task["envs"] |= envs
    return worker.ask(op, task, policy=POLICY, request=request)


@pytest.mark.parametrize(
    ("name", "envs", "said"),
    [
        *((name, {"MAX_RUN_USD": "0.01"}, "before a checkpoint")
          for name in ("train_cheapest", "train_spot", "train_t4", "sweep", "smoke")),
        *((name, {"MAX_RUN_USD": "0.01"}, "before the job begins") for name in ("evaluate", "serve", "dev")),
        ("train_t4", {"MAX_RUN_USD": "0.1"}, "before a checkpoint"),
        ("serve", {"MAX_USD_PER_DAY": "0.02"}, "before it serves"),
    ],
)  # fmt: skip
def test_a_budget_that_no_machine_allows_is_refused_with_the_least_one(
    worker: SkyWorker, name: str, envs: dict[str, str], said: str
) -> None:
    answer = ask(worker, name, **envs)
    assert (answer["error"], answer["code"]) == ("UserRequestRejectedByPolicy", "launch.all_refused"), answer
    ((key, usd),) = envs.items()
    assert f"{key}={usd} would be used up {said}: 0." in answer["message"]
    assert " of boot and set-up (estimated" in answer["message"] and "nothing was launched" in answer["message"]


def test_a_small_budget_goes_to_the_machines_that_it_pays_for(worker: SkyWorker) -> None:
    answer = ask(worker, "train_cheapest", MAX_RUN_USD="0.4")
    kinds = {(machine["gpu"], machine["spot"]) for machine in answer["reachable"]}
    assert ("L4", True) in kinds and not kinds & {("A100", True), ("A100", False), ("H100", True)}, kinds
    assert "of A100 spot, MAX_RUN_USD=0.4 would be used up before a checkpoint\n" in answer["printed"]
    assert "it would stop at the budget, with a checkpoint" in answer["printed"]


def test_set_up_that_takes_less_allows_a_smaller_budget(worker: SkyWorker) -> None:
    quick = "plan.setup_minutes=1 checkpoint.every_minutes=0.2"
    assert "error" not in ask(worker, "train_t4", MAX_RUN_USD="0.05", OVERRIDES=quick)
    assert ask(worker, "train_t4", MAX_RUN_USD="0.05")["error"]


def test_on_a_machine_that_is_there_no_budget_is_judged(worker: SkyWorker) -> None:
    assert "error" not in ask(worker, "train_t4", op="optimize", request="CLUSTER_EXEC", MAX_RUN_USD="0.01")


def test_a_run_of_the_bucket_may_be_launched_for_its_score(tmp_path: Path) -> None:
    lay_out_catalog(tmp_path, more=G4)
    env = fake_gcloud_home(tmp_path)
    with bucket_stand_in() as (buckets, variables), SkyWorker(env | variables, ROOT) as running:
        buckets.objects |= {"runs/begun/run.json", "runs/sweeps/swept/sweep.json"}
        for name, run in (("train_t4", "begun"), ("sweep", "swept")):
            usd = "0.15" if name == "train_t4" else "0.17"
            assert "error" not in ask(running, name, MAX_RUN_USD=usd, RUN_NAME=run)
            assert ask(running, name, MAX_RUN_USD=usd, RUN_NAME="another")["code"] == "launch.all_refused"
