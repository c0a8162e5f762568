"""What a run costs on each GPU: the expected loss to preemption against a simulation of it, the order, and the refusals."""

from __future__ import annotations

import math
import random
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.cloud.catalog.disks import disk_usd_per_hour
from finetune.cloud.plan.on_gpu import VALIDATION_COST, OnGpu, run_on, save_interval
from finetune.cloud.plan.plan import Row, RunCost, ceiling_refusals, run_cost
from finetune.cloud.plan.workload import run_size, size_on
from finetune.config.schema import CheckpointSection, PlanSection
from finetune.estimate.speed import Speed
from finetune.estimate.speed_fused import FusedStep, fused_speed
from finetune.machine.gpus import GPUS, MACHINES
from finetune.machine.price import Ceilings
from finetune.models.architectures import SHAPES
from tests.helpers.catalog_fixture import gpu, host
from tests.helpers.errors import raises
from tests.helpers.plan_examples import (
    ALL,
    HOST_SPOT_USD,
    HOST_USD,
    catalog_of,
    machine,
    names,
    plan_of,
    priced,
    row_of,
    run_config,
    with_a_wrong_price,
)

SET_UP_HOURS = 0.2
BATCH_4 = {"per_device_train_batch_size": 4}


def on_gpu(work_hours: float, save_hours: float) -> OnGpu:
    return OnGpu(GPUS["T4"], 1.0, True, Speed(100.0, "estimated", ""), work_hours, save_hours)


def cost_of(
    work: float, save: float, rate: float, *, spot: bool = True, usd: float = 2.0, set_up: float = SET_UP_HOURS
) -> RunCost:
    section = PlanSection(setup_minutes=60 * set_up, spot_preemptions_per_hour=rate)
    return run_cost(on_gpu(work, save), usd, spot, section)


# expected cost, against a simulation


def one_run(work: float, save: float, rate: float, chance: random.Random) -> tuple[float, int]:
    """(billed hours, preemptions) of one run, machine after machine: each is set up, resumes from the last checkpoint, and is
    preempted after a random time of work."""
    billed, saved, preemptions = 0.0, 0, 0
    while True:
        left = work - saved * save
        life = chance.expovariate(rate)
        billed += SET_UP_HOURS + min(life, left)
        if life >= left:
            return billed, preemptions
        saved += int(life // save)
        preemptions += 1


SIMULATED = [(6.0, 0.5, 0.05), (6.0, 0.5, 2.0), (6.0, 3.0, 0.5), (3.0, 3.0, 1.0)]


def simulated(work: float, save: float, rate: float, runs: int = 20_000) -> tuple[list[float], list[int]]:
    chance = random.Random(20261122)
    pairs = [one_run(work, save, rate, chance) for _ in range(runs)]
    return [hours for hours, _ in pairs], [preemptions for _, preemptions in pairs]


def standard_error(values: list[float] | list[int]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


@pytest.mark.parametrize(("work", "save", "rate"), SIMULATED)
def test_the_expected_cost_is_the_mean_of_simulated_runs(work: float, save: float, rate: float) -> None:
    hours, preemptions = simulated(work, save, rate)
    cost = cost_of(work, save, rate)
    assert cost.hours == pytest.approx(statistics.fmean(hours), abs=4 * standard_error(hours))
    assert cost.preemptions == pytest.approx(statistics.fmean(preemptions), abs=4 * standard_error(preemptions))
    assert cost.lost_hours == pytest.approx(cost.hours - SET_UP_HOURS - work)
    assert (cost.usd, cost.lost_usd) == pytest.approx((2 * cost.hours, 2 * cost.lost_hours))


def test_a_shorter_last_interval_is_never_underestimated() -> None:
    hours, _ = simulated(5.0, 2.0, 0.5)
    mean = statistics.fmean(hours)
    assert mean - 4 * standard_error(hours) < cost_of(5.0, 2.0, 0.5).hours < 1.1 * mean


# expected cost, at its limits


@pytest.mark.parametrize(("spot", "rate"), [(False, 5.0), (True, 0.0)])
def test_without_preemption_a_run_costs_set_up_and_work(spot: bool, rate: float) -> None:
    cost = cost_of(6.0, 0.5, rate, spot=spot)
    assert cost == RunCost(6.2, cost.usd, 0.0, 0.0, 0.0) and cost.usd == pytest.approx(12.4)


def test_at_a_low_rate_each_preemption_costs_half_an_interval_and_a_set_up() -> None:
    cost = cost_of(6.0, 0.5, 1e-6)
    assert cost.preemptions == pytest.approx(6e-6, rel=1e-5)
    assert cost.lost_hours == pytest.approx(6e-6 * (0.25 + SET_UP_HOURS), rel=1e-3)


@pytest.mark.parametrize("varied", [
    [(6.0, 0.5, rate, SET_UP_HOURS) for rate in (0.0, 0.01, 0.1, 1.0, 5.0)],
    [(6.0, save, 0.5, SET_UP_HOURS) for save in (0.1, 0.5, 1.0, 3.0, 6.0)],
    [(6.0, 0.5, 0.5, set_up) for set_up in (0.0, 0.1, 0.5, 2.0)],
    [(work, 0.5, 0.5, SET_UP_HOURS) for work in (0.5, 1.0, 6.0, 60.0)],
])  # fmt: skip
def test_cost_and_loss_grow_with_rate_save_interval_set_up_and_work(varied: list[tuple[float, ...]]) -> None:
    costs = [cost_of(work, save, rate, set_up=set_up) for work, save, rate, set_up in varied]
    for name in ("hours", "usd", "lost_hours", "lost_usd"):
        values = [getattr(cost, name) for cost in costs]
        assert values == sorted(values) and len(set(values)) == len(values)


def test_a_rate_at_which_no_checkpoint_is_reached_is_refused_with_a_finite_cost(tmp_path: Path) -> None:
    assert math.isfinite(cost_of(1000.0, 1000.0, 10.0).usd)
    for checkpoint, key in (
        ({"every_minutes": None, "save_steps": 10**6}, "save_steps"),
        ({"every_minutes": 100 * 60.0}, "every_minutes"),
        ({"every_minutes": None}, "every_minutes"),
        ({"every_minutes": 10.0**6, "save_steps": 10**4}, "save_steps"),
    ):
        config = run_config(
            checkpoint=checkpoint,
            plan={"spot_preemptions_per_hour": 10.0, "gpus": ["T4"]},
            training={"num_train_epochs": 1000},
        )
        plan = plan_of(config, priced(tmp_path, T4=(0.5, 0.1)))
        assert names(plan) == ["T4 on-demand"]
        [refusal] = row_of(plan, "T4", spot=True).refusals
        assert re.fullmatch(
            rf"[\d.]+ h between checkpoints at 10 preemptions an hour: set a lower checkpoint\.{key}",
            refusal,
        )


# hours of one GPU


def test_hours_of_work_are_tokens_over_speed_and_are_divided_by_checkpoints() -> None:
    by_steps: dict[str, Any] = {"every_minutes": None, "save_steps": 50}
    config = run_config(training={"eval_steps": 100}, data={"val_fraction": 0.1}, checkpoint=by_steps)
    size = run_size(config)
    found = run_on(config, size, GPUS["L4"])
    assert size.validation_tokens > 0
    seconds = (size.tokens + size.validation_tokens * VALIDATION_COST) / found.speed.tokens_per_second
    assert found.work_hours == pytest.approx(seconds / 3600)
    assert found.save_hours == pytest.approx(found.work_hours * 50 / 250)


@pytest.mark.parametrize(
    ("every_minutes", "save_steps", "hours", "key"),
    [
        (10.0, None, 1 / 6, "every_minutes"),
        (None, 50, 0.5, "save_steps"),
        (10.0, 50, 1 / 6, "every_minutes"),
        (60.0, 50, 0.5, "save_steps"),
        (None, 9999, 4.0, "save_steps"),
        (600.0, 9999, 4.0, "every_minutes"),
        (None, None, 4.0, "every_minutes"),
        (0.01, None, 0.01, "every_minutes"),  # one step
        (0.01, 3, 0.01, "every_minutes"),
    ],
)
def test_a_checkpoint_comes_when_the_first_of_the_two_intervals_is_over(
    every_minutes: float | None, save_steps: int | None, hours: float, key: str
) -> None:
    found = save_interval(CheckpointSection(every_minutes, save_steps), work_hours=4.0, steps=400)
    assert found[0] == pytest.approx(hours) and found[1] == f"checkpoint.{key}"


def test_memory_depends_on_the_compute_dtype() -> None:
    four_bit_off: dict[str, Any] = {"quantization": {"load_in_4bit": False}, "training": {"kernels": "hf"} | BATCH_4}
    auto, single = run_config(**four_bit_off), run_config(**four_bit_off, model={"torch_dtype": "float32"})
    needed = [run_on(config, run_size(config), GPUS["A100"]).needed_gib for config in (auto, single)]
    assert needed[1] > needed[0] + 13  # 7.24e9 weights of four bytes, not two


@pytest.mark.parametrize("name", ["someone/new-model", "EleutherAI/pythia-160m"])
def test_a_model_of_unknown_shape_is_refused_with_the_known_names(name: str, tmp_path: Path) -> None:
    with raises(
        "model.unknown_shape", match=rf"^model\.name: the shape of {name} is not known.*mistralai/Mistral-7B-v0\.1"
    ):
        plan_of(run_config(model={"name": name}), priced(tmp_path, T4=(0.5, 0.1)))


# the order


def test_a_row_for_every_gpu_and_kind_ranked_by_dollars_of_the_run(tmp_path: Path) -> None:
    plan = plan_of(run_config(), priced(tmp_path, **ALL))
    assert len(plan.rows) == len(names(plan)) == 8
    dollars = [row.cost.usd for row in plan.rows if row.cost]
    assert dollars == sorted(dollars) and len(dollars) == 8


def test_a_fast_expensive_machine_is_best_for_a_long_run_and_a_slow_cheap_one_for_a_short_run(tmp_path: Path) -> None:
    config = run_config(plan={"gpus": ["T4", "A100"]}, training={"num_train_epochs": 20})
    size = run_size(config)
    slower = run_on(config, size, GPUS["T4"]).work_hours / run_on(config, size, GPUS["A100"]).work_hours
    assert slower > 2
    catalog = priced(tmp_path, T4=(1.0, ""), A100=(slower / 1.2, ""))
    hourly = [row_of(plan_of(config, catalog), name, spot=False).offer for name in ("T4", "A100")]
    assert hourly[0] and hourly[1] and hourly[1].usd_per_hour > 1.5 * hourly[0].usd_per_hour
    assert names(plan_of(config, catalog)) == ["A100 on-demand", "T4 on-demand"]
    short = run_config(plan={"gpus": ["T4", "A100"]}, training={"max_steps": 1})  # set-up is nearly all of it
    assert names(plan_of(short, catalog)) == ["T4 on-demand", "A100 on-demand"]


def test_the_price_is_host_gpu_and_disk_of_the_cheapest_zone(tmp_path: Path) -> None:
    lines = [line for zone, usd in (("us-west1-a", 0.42), ("us-central1-b", 0.40), ("us-central1-a", 0.40))
             for line in machine("T4", zone, usd, 0.1)]  # fmt: skip
    catalog = catalog_of(tmp_path, lines)
    for disk_gib in (100, 500):
        plan = plan_of(run_config(plan={"gpus": ["T4"], "disk_gib": disk_gib}), catalog)
        disk = disk_usd_per_hour(disk_gib, "medium", "us-central1", "n1-highmem-8")
        for spot, usd in ((False, HOST_USD + 0.40), (True, HOST_SPOT_USD + 0.1)):
            row = row_of(plan, "T4", spot=spot)
            assert row.offer and row.cost
            assert row.offer.usd_per_hour == pytest.approx(usd + disk)
            assert row.cost.usd == pytest.approx(row.cost.hours * (usd + disk))
        offer = row_of(plan, "T4", spot=False).offer
        assert offer and offer.zone == "us-central1-a"


@pytest.mark.parametrize("spot", [True, False])
def test_spot_or_on_demand_alone(spot: bool, tmp_path: Path) -> None:
    plan = plan_of(run_config(), priced(tmp_path, **ALL), spot=spot)
    assert [row.spot for row in plan.rows] == [spot] * 4


# refusals


def test_each_ceiling_refuses_with_both_numbers(tmp_path: Path) -> None:
    config, catalog = run_config(plan={"gpus": ["A100", "T4"]}), priced(tmp_path, A100=(3.0, ""), T4=(0.4, ""))
    free = plan_of(config, catalog, spot=False)
    costs = {row.on_gpu.gpu.name: row.cost for row in free.rows}
    a100, t4 = costs["A100"], costs["T4"]
    assert a100 and t4 and t4.hours > a100.hours
    hourly = plan_of(config, catalog, Ceilings(usd_per_hour=2.5), spot=False)
    assert row_of(hourly, "A100", spot=False).refusals == ("$3.13/h is above the ceiling of $2.50/h",)
    assert names(hourly) == ["T4 on-demand"]
    hours = plan_of(config, catalog, Ceilings(hours=a100.hours), spot=False)  # a cost equal to the ceiling is allowed
    assert row_of(hours, "T4", spot=False).refusals == (f"{t4.hours:.1f} h is above the ceiling of {a100.hours:g} h",)
    assert names(hours) == ["A100 on-demand"]
    limit = min(a100.usd, t4.usd) + 0.005
    highest = max(free.rows, key=lambda row: row.cost.usd if row.cost else 0)
    assert highest.cost
    dollars = plan_of(config, catalog, Ceilings(run_usd=limit), spot=False)
    refused = row_of(dollars, highest.on_gpu.gpu.name, spot=False)
    assert refused.refusals == (f"${highest.cost.usd:.2f} is above the ceiling of ${limit:g} for the run",)
    assert [row.chosen for row in dollars.rows] == [True, False]
    every = plan_of(config, catalog, Ceilings(0.01, 0.01, 0.01), spot=False)
    assert [len(row.refusals) for row in every.rows] == [3, 3] and not names(every)


@pytest.mark.parametrize(
    ("usd_per_hour", "usd", "hours", "said"),
    [
        (2.981, 1.0, 1.0, ["$2.981/h is above the ceiling of $2.98/h"]),
        (2.0, 5.6813, 1.0, ["$5.681 is above the ceiling of $5.68 for the run"]),
        (2.0, 1.0, 6.0004, ["6.0004 h is above the ceiling of 6 h"]),
        (2.98, 5.68, 6.0, []),
    ],
)
def test_a_refusal_by_a_small_margin_shows_enough_decimals(
    usd_per_hour: float, usd: float, hours: float, said: list[str]
) -> None:
    assert ceiling_refusals(usd_per_hour, RunCost(hours, usd, 0.0, 0.0, 0.0), Ceilings(5.68, 6.0, 2.98)) == said


def test_what_does_not_fit_is_refused_with_needed_and_available_memory(tmp_path: Path) -> None:
    config = run_config(training={"per_device_train_batch_size": 16, "gradient_checkpointing": True})
    plan = plan_of(config, priced(tmp_path, **ALL))
    found = {row.on_gpu.gpu.name: row for row in plan.rows if not row.spot}
    t4, a100 = found["T4"], found["A100"]
    assert a100.chosen and a100.on_gpu.needed_gib < a100.on_gpu.gpu.memory_gib
    there = GPUS["T4"].memory_gib
    assert t4.refusals == (f"does not fit: needs {t4.on_gpu.needed_gib:.1f} GiB of {there}",)
    assert t4.on_gpu.needed_gib > there
    assert t4.cost and a100.cost and t4.cost.usd < a100.cost.usd  # refused rows come last, however cheap
    assert [row.chosen for row in plan.rows] == sorted((row.chosen for row in plan.rows), reverse=True)


def test_a_small_lack_of_memory_is_visible_in_the_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(plan={"gpus": ["T4"]}, training={"kernels": "hf"} | BATCH_4)
    needed = run_on(config, run_size(config), GPUS["T4"]).needed_gib
    for gib in (needed - 1e-6, needed + 1e-6):
        assert run_on(config, run_size(config), replace(GPUS["T4"], memory_gib=gib)).fits == (gib > needed)
    there = math.floor(needed * 10) / 10
    monkeypatch.setitem(MACHINES, "T4", replace(MACHINES["T4"], gpu=replace(GPUS["T4"], memory_gib=there)))
    [refusal] = row_of(plan_of(config, priced(tmp_path, T4=(0.4, 0.1))), "T4", spot=True).refusals
    said = re.fullmatch(r"does not fit: needs ([\d.]+) GiB of ([\d.]+)", refusal)
    assert said and float(said[1]) > float(said[2]) == there


def test_with_the_fused_backend_the_smallest_config_decides_with_a_margin(tmp_path: Path) -> None:
    config = run_config(plan={"gpus": ["T4"]})
    fitting = run_on(config, run_size(config), GPUS["T4"])
    assert fitting.fits and fitting.micro_batch_config and fitting.micro_batch_config.tokens > 2048
    least = next(gib / 100 for gib in range(400, 1450)
                 if run_on(config, run_size(config), replace(GPUS["T4"], memory_gib=gib / 100)).fits)  # fmt: skip
    assert least < 7
    lacking = run_on(config, run_size(config), replace(GPUS["T4"], memory_gib=least - 0.01))
    assert lacking.needed_gib == pytest.approx(least, abs=0.011) and lacking.needed_gib > least - 0.01


def test_max_memory_gib_is_named_in_the_refusal(tmp_path: Path) -> None:
    config = run_config(plan={"gpus": ["A100"]}, training={"max_memory_gib": 5})
    [refusal] = row_of(plan_of(config, priced(tmp_path, A100=(3.0, 1.0))), "A100", spot=True).refusals
    assert re.fullmatch(r"does not fit: needs [56]\.\d GiB of 5", refusal)


@pytest.mark.parametrize(
    ("training", "lora", "gpu"),
    [
        ({}, {"lora_dropout": 0.0}, "A100"),
        ({"per_device_train_batch_size": 2, "effective_batch_size": 8}, {}, "L4"),
        ({"gradient_checkpointing": True}, {}, "T4"),
    ],
)
def test_speed_is_that_of_the_planned_step(training: dict[str, Any], lora: dict[str, Any], gpu: str) -> None:
    config = run_config(training=training, lora=lora)
    found = run_on(config, run_size(config), GPUS[gpu])
    chosen = found.micro_batch_config
    assert chosen
    step = FusedStep(
        training.get("effective_batch_size", 16), 300.0, chosen.tokens, chosen.uncheckpointed_layers,
        chosen.dequantized_layers, training.get("per_device_train_batch_size"), not lora,
    )  # fmt: skip
    assert found.speed == fused_speed(GPUS[gpu], SHAPES["mistralai/Mistral-7B-v0.1"], step)


def test_speed_follows_from_what_the_memory_allows() -> None:
    chosen, again, hf = (
        run_on(config, run_size(config), GPUS["A100"]).speed.tokens_per_second
        for config in (run_config(training=training) for training in (
            {}, {"gradient_checkpointing": True}, {"kernels": "hf", "gradient_checkpointing": True}))
    )  # fmt: skip
    assert chosen > 1.2 * again > 1.2 * hf


def test_a_gpu_that_is_not_sold_as_spot_is_refused_in_its_row(tmp_path: Path) -> None:
    plan = plan_of(run_config(plan={"gpus": ["T4", "L4"]}), priced(tmp_path, T4=(0.4, ""), L4=(0.7, 0.3)))
    row = row_of(plan, "T4", spot=True)
    assert (row.refusals, row.offer, row.cost) == (("not sold: the catalog has no price for it",), None, None)
    assert plan.rows[-1] == row and len(names(plan)) == 3


def test_a_gpu_unknown_to_the_catalog_is_out_and_an_error_only_if_there_is_no_other(tmp_path: Path) -> None:
    catalog = priced(tmp_path, T4=(0.4, 0.1))
    plan = plan_of(run_config(plan={"gpus": ["V100", "T4"]}), catalog)
    assert names(plan) == ["T4 spot", "T4 on-demand"]
    assert row_of(plan, "V100", spot=True).refusals == ("not sold: the catalog has no price for it",)
    with raises("price.unknown", match=r"^plan\.gpus: .*V100.*Google Cloud.*T4"):
        plan_of(run_config(plan={"gpus": ["V100"]}), catalog)


def test_several_gpus_cost_their_own_machine_and_are_faster(tmp_path: Path) -> None:
    lines = [line for count, host_usd in ((1, 0.3), (2, 0.9)) for line in (
        host("us-east1-b", host_usd, host_usd / 2, {1: "g2-standard-8", 2: "g2-standard-24"}[count]),
        gpu("us-east1-b", 0.6 * count, 0.2 * count, "L4", count))]  # fmt: skip
    plan = plan_of(run_config(plan={"gpus": ["L4", "L4:2"]}), catalog_of(tmp_path, lines), spot=False)
    one, two = sorted(plan.rows, key=lambda row: row.on_gpu.count)
    assert one.offer and two.offer and one.cost and two.cost
    assert (two.offer.machine, two.offer.gpu_usd, two.offer.host_usd) == ("g2-standard-24", 1.2, 0.9)
    assert two.on_gpu.speed.tokens_per_second == pytest.approx(1.6 * one.on_gpu.speed.tokens_per_second)
    assert two.on_gpu.work_hours == pytest.approx(one.on_gpu.work_hours / 1.6)
    assert two.on_gpu.speed.basis == "estimated" and two.on_gpu.needed_gib == one.on_gpu.needed_gib


FOUR_FOUR = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "effective_batch_size": None}


def l4_by_count(folder: Path, **training: Any) -> dict[int, Row]:
    """The rows of one, two and four L4 on demand."""
    machines = {1: "g2-standard-8", 2: "g2-standard-24", 4: "g2-standard-48"}
    hosts = [host("us-east1-b", 0.3 * count, 0.1 * count, name) for count, name in machines.items()]
    lines = [*hosts, *(gpu("us-east1-b", 0.6 * count, 0.2 * count, "L4", count) for count in machines)]
    config = run_config(plan={"gpus": ["L4", "L4:2", "L4:4"]}, training=training)
    return {row.on_gpu.count: row for row in plan_of(config, catalog_of(folder, lines), spot=False).rows}


@pytest.mark.parametrize(("effective", "right"), [(16, 1), (32, 2), (64, 4)])
def test_machines_whose_gpus_contradict_the_batch_size_are_refused(tmp_path: Path, effective: int, right: int) -> None:
    """There `finetune train` ends with exit code 2, after boot, set-up and loading."""
    rows = l4_by_count(tmp_path, **FOUR_FOUR | {"effective_batch_size": effective})
    for count, row in rows.items():
        says = (
            f"no run begins on {count} GPUs with these batch sizes: training.effective_batch_size: {effective} is not "
        )
        assert row.chosen == (count == right), row.refusals
        assert row.chosen or row.refusals[0].startswith(f"{says}{16 * count}, ")
        assert row.cost, "what it would be with that effective size"
        assert row.on_gpu.batch_size == effective


def test_a_batch_size_that_fits_no_machine_is_an_error(tmp_path: Path) -> None:
    with raises("config.conflicting_values", match="48 is not 64, the product of .* and 4 GPUs"):
        l4_by_count(tmp_path, **FOUR_FOUR | {"effective_batch_size": 48})


def test_the_examples_of_a_step_grow_with_the_gpus_where_the_config_fixes_each_ones(tmp_path: Path) -> None:
    rows = l4_by_count(tmp_path, **FOUR_FOUR, max_steps=50)
    assert {count: row.on_gpu.batch_size for count, row in rows.items()} == {1: 16, 2: 32, 4: 64}
    trained = {count: row.on_gpu.work_hours * row.on_gpu.speed.tokens_per_second for count, row in rows.items()}
    assert trained[4] == pytest.approx(4 * trained[1], rel=0.02), "in as many steps"
    size = run_size(run_config(training=FOUR_FOUR))
    assert [size_on(size, run_config(training=FOUR_FOUR).training, gpus).steps for gpus in (1, 2, 4)] == [250, 125, 63]


def test_nodes_take_part_in_a_step(tmp_path: Path) -> None:
    config = run_config(training=FOUR_FOUR)
    assert run_on(config, run_size(config), GPUS["L4"], None, 2, 3).batch_size == 96
    config = run_config(training=FOUR_FOUR | {"effective_batch_size": 32})
    conflicts = [run_on(config, run_size(config, 2), GPUS["L4"], None, 1, nodes).conflict for nodes in (1, 2)]
    assert "16, the product of" in conflicts[0] and not conflicts[1]


# price anomalies


def test_an_offer_with_a_price_anomaly_is_passed_over_and_shown(tmp_path: Path) -> None:
    row = row_of(plan_of(run_config(plan={"gpus": ["L4"]}), with_a_wrong_price(tmp_path)), "L4", spot=False)
    assert row.chosen and row.offer and row.offer.zone != "us-east1-a" and row.offer.gpu_usd == 0.7
    assert row.passed_over and row.passed_over.zone == "us-east1-a" and row.passed_over.anomalies
    spot = row_of(plan_of(run_config(plan={"gpus": ["L4"]}), with_a_wrong_price(tmp_path)), "L4", spot=True)
    assert spot.chosen and spot.passed_over is None


def test_a_machine_with_only_anomalous_prices_is_refused_with_the_anomaly(tmp_path: Path) -> None:
    plan = plan_of(run_config(plan={"gpus": ["L4", "T4"]}), with_a_wrong_price(tmp_path))
    row = row_of(plan, "T4", spot=True)
    assert row.refusals == ("price anomaly: GPU at $0.5000/h spot is above $0.4000/h on demand in the same zone",)
    assert row.offer and row.cost and row.passed_over is None
    assert names(plan) == ["L4 spot", "L4 on-demand"]


def test_trusted_prices_rank_and_keep_their_anomalies(tmp_path: Path) -> None:
    plan = plan_of(run_config(plan={"gpus": ["L4", "T4"]}), with_a_wrong_price(tmp_path), trust_prices=True)
    assert len(names(plan)) == 4
    row = row_of(plan, "L4", spot=False)
    assert row.offer and row.offer.zone == "us-east1-a" and row.offer.anomalies and row.passed_over is None
