"""A disk costs its list price if that is known, and otherwise at least what it may cost."""

from __future__ import annotations

import pytest

from finetune.cloud.catalog.disks import DEAREST, TIERS, USD_PER_MONTH, disk_type, disk_usd_per_hour
from tests.helpers.errors import raises


def test_the_hourly_price_is_the_monthly_one_by_730_hours() -> None:
    assert disk_usd_per_hour(200, "medium", "us-central1") * 730 == pytest.approx(20.0)
    assert disk_usd_per_hour(200, "high", "us-central1") * 730 == pytest.approx(34.0)  # the example on Google's page
    assert disk_usd_per_hour(200, "low", "us-central1", "n1-highmem-8") * 730 == pytest.approx(8.0)
    assert disk_usd_per_hour(100, "medium", "europe-west4") * 730 == pytest.approx(11.0)


def test_all_43_regions_are_priced_once_and_faster_disks_cost_more() -> None:
    assert len(USD_PER_MONTH) == 43
    for region, prices in USD_PER_MONTH.items():
        assert 0.04 <= prices["pd-standard"] < prices["pd-balanced"] < prices["pd-ssd"] <= 0.272, region


@pytest.mark.parametrize("region", ["", "us-central2", "mars-north1"])
def test_an_unlisted_region_costs_as_much_as_the_most_expensive(region: str) -> None:
    assert DEAREST == {"pd-standard": 0.064, "pd-balanced": 0.16, "pd-ssd": 0.272}
    for tier in ("low", "medium", "high"):
        usd = disk_usd_per_hour(200, tier, region, "a2-highgpu-1g")
        assert usd == max(disk_usd_per_hour(200, tier, known, "a2-highgpu-1g") for known in USD_PER_MONTH)


def test_region_names_are_case_insensitive() -> None:
    assert disk_usd_per_hour(200, "medium", "US-Central1") == disk_usd_per_hour(200, "medium", "us-central1")


def test_without_a_machine_a_tier_costs_its_most_expensive_disk() -> None:
    machines = ("n1-highmem-8", "g2-standard-8", "a2-highgpu-1g", "n2-standard-8", "a3-highgpu-1g", "e2-standard-4")
    for tier in ("low", "medium", "high", "none"):
        dearest = max(disk_usd_per_hour(200, tier, "us-central1", machine) for machine in machines)
        assert disk_usd_per_hour(200, tier, "us-central1") == dearest


@pytest.mark.parametrize(
    ("tier", "machine"),
    [("ultra", ""), ("best", ""), ("ultra", "n2-standard-64"), ("best", "a3-highgpu-1g")],
)
def test_a_disk_that_is_charged_by_more_than_its_size_is_refused(tier: str, machine: str) -> None:
    with raises("price.unknown", match="is not known here"):
        disk_usd_per_hour(200, tier, "us-central1", machine)


@pytest.mark.parametrize("machine", ["g4-standard-48", "a3-ultragpu-8g", "a4-highgpu-8g"])
def test_a_hyperdisk_costs_at_least_its_size_and_its_default_operations(machine: str) -> None:
    """An example of July 2024 for us-east1: 10 GiB $0.90, 3,060 operations $18.36, 155 MiB/s $6.98, of which 3,000 and 140 are
    free by now."""
    for gib in (100, 200, 1000):
        month = gib * 0.09 + 6 * gib * 18.36 / 3060 + 1.5 * gib * 6.98 / 155
        assert month < disk_usd_per_hour(gib, "medium", "us-east1", machine) * 730 < 1.1 * month


def test_an_unknown_tier_is_refused_with_the_known_ones() -> None:
    with raises("cloud.unknown_disk_tier", match=f"'Medium' is unknown; expected one of {', '.join(TIERS)}"):
        disk_type("Medium")


@pytest.mark.parametrize("gib", [0, -1, 1.5, True, "200", float("nan")])
def test_a_size_that_is_not_a_positive_whole_number_is_refused(gib: object) -> None:
    with raises("cloud.bad_disk_size", match="expected a positive whole number of GiB"):
        disk_usd_per_hour(gib, "medium", "us-central1")  # type: ignore[arg-type]
