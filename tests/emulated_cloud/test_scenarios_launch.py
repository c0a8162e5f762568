"""`sky launch` of our task YAMLs, typed in the root of the project, with its policy."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from finetune.cloud.catalog.offers import load_catalog
from tests.emulated_cloud.environment import CloudEnvironment
from tests.emulated_cloud.reconciliation import catalog_price, check_nothing_left, reconcile
from tests.emulated_cloud.table import record_metric
from tests.emulated_cloud.training import LONG_SAVE_STEPS, SHORT, STEPS, Run, launch, long_run, wait_for_tensorboard
from tests.emulated_cloud.whole import NAME, Whole

pytestmark = pytest.mark.cloud
MISTRAL = "configs/mistral_7b_qlora.yaml"
CEILING = 4.50
"""US dollars an hour: max_hourly_cost of sky/train_a100.yaml."""
LONG = 40 * STEPS
"""Optimizer steps of the run that is watched and stopped: TensorBoard takes a while to start."""
GONE = 2
"""How many kinds of machine, the first of the plan, are out of stock in scenario 3."""


@pytest.mark.cloud_short
@pytest.mark.xdist_group("whole")
def test_train_a100_as_typed(environment: CloudEnvironment, whole: Whole) -> None:
    """Scenario 1: policy, spot machine, bucket, data, set-up, training, checkpoints in the bucket, score, autodown."""
    record_metric(f"launch to the report: {whole.seconds:.0f} s")
    assert "finetune: of " in whole.output, "the policy has chosen"
    assert whole.machine.request.gpu == "A100" and whole.machine.request.spot
    assert (whole.record["status"], whole.record["steps"]["done"]) == ("done", STEPS)
    assert whole.committed[-1] == STEPS
    report = {f"runs/{NAME}/{name}" for name in ("eval.json", "report.html", "ledger/evaluation-001.jsonl")}
    assert report <= set(whole.objects), "on the same machine, and its cost is part of the comparison with the bill"
    assert "without vLLM: this machine may have no GPU" in whole.output
    assert any(name.startswith("data/") for name in whole.objects), "synced into a bucket that was not there before"


@pytest.mark.cloud_short
def test_out_of_stock(
    environment: CloudEnvironment, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenario 2: no spot A100 anywhere, none on demand in the two cheapest regions; the launch uses the next cheapest."""
    monkeypatch.setenv("HOME", str(environment.sky.home))  # for SkyPilot's catalog there
    offers = load_catalog().offers("A100", machine="a2-highgpu-1g", spot=False)
    trusted = [offer for offer in offers if not offer.anomalies]
    gone = list(dict.fromkeys(offer.region for offer in trusted))[:2]
    left = next(offer for offer in trusted if offer.region not in gone)
    environment.cloud.market.set_stock(0, gpu="A100", spot=True)
    for offer in offers:
        if offer.region in gone:
            code = "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS"
            environment.cloud.market.set_stock(0, gpu="A100", spot=False, zone=offer.zone, code=code)
    launched = environment.sky.run(
        *launch("train_a100", "-c", "stock", overrides=SHORT, RUN_NAME="stock"), cwd=project
    ).ok()
    requested, asked = environment.cloud.machine("stock").request, environment.asked_for()
    record_metric(f"launch to the end of training: {launched.seconds:.0f} s; asked {asked}")
    assert (requested.spot, requested.region) == (False, left.region)
    assert {zone.rpartition("-")[0] for _, spot, zone in asked if not spot} == {*gone, left.region}
    price = catalog_price(environment.cloud.prices)
    assert all(price(stretch) <= CEILING for stretch in environment.cloud.bill.stretches)
    environment.sky.run("down", "-y", "stock").ok()
    reconcile(Run(environment, "stock"), tmp_path)
    check_nothing_left(environment)


def test_the_cheapest_in_the_order_of_the_plan(environment: CloudEnvironment, project: Path) -> None:
    """Scenario 3: the first kinds of machine of `finetune plan` are out of stock; the launch uses the next one."""
    planned = environment.sky.program("finetune", "plan", MISTRAL, "--json", cwd=project).ok()
    rows = [row for row in json.loads(planned.out)["rows"] if row["chosen"]]
    rows.sort(key=lambda row: row["usd"])
    kinds = [(row["gpu"], row["spot"]) for row in rows]
    for gpu, spot in kinds[:GONE]:
        environment.cloud.market.set_stock(0, gpu=gpu, spot=spot)
    words = launch("train_cheapest", "-d", "-c", "cheap", RUN_NAME="cheap", CONFIG=MISTRAL)
    launched = environment.sky.run(*words, cwd=project).ok()
    requested = environment.cloud.machine("cheap").request
    asked = list(dict.fromkeys((gpu, spot) for gpu, spot, _ in environment.asked_for()))
    record_metric(f"launch {launched.seconds:.0f} s; planned {kinds}, asked {asked}")
    assert asked == kinds[: GONE + 1]
    assert (requested.gpu, requested.spot) == kinds[GONE]
    (stretch,) = environment.cloud.bill.stretches
    assert catalog_price(environment.cloud.prices)(stretch) == pytest.approx(rows[GONE]["usd_per_hour"], abs=1e-4)
    environment.sky.run("down", "-y", "cheap").ok()
    check_nothing_left(environment)


@pytest.mark.cloud_short
def test_a_ceiling_below_every_price(environment: CloudEnvironment, project: Path) -> None:
    """Scenario 6: refused before anything is requested that costs money."""
    task = (project / "sky" / "train_a100.yaml").read_text(encoding="utf-8")
    low = task.replace(f"max_hourly_cost: {CEILING:.2f}", "max_hourly_cost: 0.10")
    assert low != task
    (project / "sky" / "low.yaml").write_text(low, encoding="utf-8")
    refused = environment.sky.run(*launch("low", "-c", "low", BUCKET="ft-nobody"), cwd=project)
    print(refused.out)
    record_metric(f"refused after {refused.seconds:.0f} s")
    assert refused.code != 0
    assert "no machine is allowed" in refused.out and "max_hourly_cost" in refused.out
    assert not environment.asked_for()
    assert "ft-nobody" not in environment.buckets.names()
    check_nothing_left(environment)


def test_looking_stopping_and_starting(environment: CloudEnvironment, project: Path, tmp_path: Path) -> None:
    """Scenario 9: status, logs, TensorBoard through ssh, stop in mid-run, start, resume by the same launch, cancel, down."""
    words = launch("train_a100", "-d", "-c", "look", overrides=long_run(LONG), RUN_NAME="look", FT_STEP_SECONDS=0.1)
    environment.sky.run(*words, cwd=project).ok()
    run = Run(environment, "look")
    run.wait_for_step(LONG_SAVE_STEPS)
    assert "UP" in environment.sky.run("status", "look").ok().out
    with environment.sky.ssh("look", "-N", "-o", "ExitOnForwardFailure=yes", "-L", "6006:localhost:6006") as tunnel:
        wait_for_tensorboard("look/tensorboard", seconds=90)
        assert tunnel.poll() is None, "another TensorBoard answers: port 6006 of this computer is in use"
    environment.sky.run("stop", "-y", "look").ok()
    assert "STOPPED" in environment.sky.run("status", "--refresh", "look").ok().out
    stopped = max(run.committed())
    assert stopped < LONG
    environment.sky.run("start", "-y", "look").ok()
    environment.sky.run(*words, cwd=project).ok()
    run.wait_for_step(stopped + 1)
    logs = environment.sky.run("logs", "look", "--no-follow").ok().out
    resumed = re.search(r"resuming from /bucket/runs/look/checkpoints/step-(\d+)", logs)
    assert resumed and int(resumed[1]) >= stopped, (
        "a checkpoint that was saved only on the machine's disk is still there and may be used"
    )
    environment.sky.run("cancel", "-y", "-a", "look").ok()
    run.wait_for_status("interrupted")
    environment.sky.run("down", "-y", "look").ok()
    reconcile(run, tmp_path)
    check_nothing_left(environment)
