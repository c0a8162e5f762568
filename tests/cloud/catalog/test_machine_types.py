"""Which machine types have which GPUs: the limits of N1, and what is not in the tables."""

from __future__ import annotations

import pytest

from finetune.cloud.catalog.machine_types import N1_LIMITS, NOT_ON_DEMAND, OWN_MACHINES, check_machine, fits
from finetune.machine.gpus import MACHINES
from tests.helpers.errors import raises


@pytest.mark.parametrize(("gpu", "count"), [(gpu, count) for gpu, rows in N1_LIMITS.items() for count in rows])
def test_an_n1_machine_may_be_as_large_as_its_gpus_allow_and_no_larger(gpu: str, count: int) -> None:
    vcpus, memory = N1_LIMITS[gpu][count]
    assert fits(gpu, count, "n1-custom", (vcpus, memory))
    assert not fits(gpu, count, "n1-custom", (vcpus + 1, memory))
    assert not fits(gpu, count, "n1-custom", (vcpus, memory + 0.25))
    assert not fits(gpu, count, "n2-standard-2", (2, 8))
    assert not fits(gpu, count, "n1-custom", None)
    refusal = f"{gpu}:{count} does not come with n1-custom; .* {vcpus} vCPUs and {memory} GB"
    with raises("cloud.machine_mismatch", match=refusal):
        check_machine(gpu, count, "n1-custom", (vcpus, memory + 1))


def test_the_machines_of_our_tasks_come_with_their_gpus() -> None:
    assert len(MACHINES) == 13
    for name, one in MACHINES.items():
        check_machine(one.gpu.name, one.count, one.machine, (16.0, 104.0) if one.count > 1 else (8.0, 52.0))
        assert name == (one.gpu.name if one.count == 1 else one.accelerators)


def test_what_is_not_sold_on_demand_are_machine_types_with_built_in_gpus() -> None:
    assert {
        machine for counts in OWN_MACHINES.values() for types in counts.values() for machine in types
    } >= NOT_ON_DEMAND
    assert "a3-highgpu-8g" not in NOT_ON_DEMAND


def test_what_the_tables_lack_does_not_fit() -> None:
    assert not fits("X9", 1, "n1-highmem-8", (8.0, 52.0))
    assert not fits("T4", 3, "n1-highmem-8", (8.0, 52.0))
    assert not fits("A100", 3, "a2-highgpu-1g", (12.0, 85.0))
