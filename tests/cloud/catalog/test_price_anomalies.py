"""Which prices are anomalies: the known ones of the real catalog, and each rule by itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.cloud.catalog.offers import Catalog, load_catalog
from finetune.machine.gpus import MACHINES
from tests.helpers.catalog_fixture import gpu, host, lay_out_catalog, shared_catalog

A100 = "a2-highgpu-1g"
pytestmark = pytest.mark.usefixtures("home")


ANOMALIES = {
    ("A100", "europe-west4", False, "55% of the median $2.9339"),
    ("A100", "asia-southeast1", False, "58% of the median $2.9339"),
    ("A100-80GB", "us-central1", True, "spot is above"),
    ("A100-80GB", "europe-west4", True, "spot is above"),
    ("A100-80GB", "us-central1", False, "spot is above"),
    ("A100-80GB", "europe-west4", False, "spot is above"),
    ("A100-80GB", "us-central1", False, "42% of the median $4.4242"),
    ("A100-80GB", "europe-west4", False, "46% of the median $4.4242"),
    ("A100-80GB", "us-east4", False, "47% of the median $4.4242"),
}
"""The known anomalies of the snapshot and of the shared slice."""


def anomalies_of(catalog: Catalog) -> set[tuple[str, str, bool, str]]:
    """(GPU, region, spot, the anomaly without its first words) for every anomaly among the machines with one of these GPUs."""
    found = set()
    for name in ("A100", "A100-80GB", "L4", "T4", "V100"):
        for offer in catalog.offers(name, machine=MACHINES[name].machine):
            for anomaly in offer.anomalies:
                short = re.search(r"spot is above|\d+% of the median \$[\d.]+", anomaly)
                assert short, anomaly
                found.add((offer.gpu, offer.region, offer.spot, short[0]))
    return found


def test_the_known_anomalies_are_found_and_one_other(home: Path) -> None:
    lay_out_catalog(home)
    assert anomalies_of(load_catalog()) == ANOMALIES | {("T4", "me-west1", True, "57% of the median $0.1750")}


def test_the_known_anomalies_of_the_shared_slice_are_found(home: Path) -> None:
    source = shared_catalog()
    if source is None:
        pytest.skip("the shared catalog is not beside this checkout")
    lay_out_catalog(home, source=source)
    others = {("A100", region, False, "58% of the median $2.9339") for region in ("asia-northeast1", "asia-northeast3")}
    assert anomalies_of(load_catalog()) == ANOMALIES | others


def four_regions(**odd: Any) -> list[str]:
    """Lines of a machine in four regions, three of them equal: host 0.5 and 0.2, GPU 3 and 1; `odd` changes the fourth."""
    alike = [f"region{n}-a" for n in range(3)]
    hosts = [*map(host, alike), host("odd1-a", odd.get("host", 0.5), odd.get("host_spot", 0.2))]
    return [*hosts, *map(gpu, alike), gpu("odd1-a", odd.get("gpu", 3.0), odd.get("gpu_spot", 1.0))]


@pytest.mark.parametrize(
    ("odd", "on_demand", "spot"),
    [
        ({}, [], []),
        ({"gpu": 1.81}, [], []),
        ({"gpu": 1.8}, [], []),
        ({"gpu": 1.79}, ["GPU at $1.7900/h is 60% of the median $3.0000 of 4 regions"], []),
        ({"gpu": 30.0}, [], []),
        ({"gpu": 0.0, "gpu_spot": 0.0}, ["GPU at $0.0000/h is 0% of"], ["GPU at $0.0000/h is 0% of"]),
        ({"gpu_spot": 0.5}, [], ["GPU at $0.5000/h is 50% of the median $1.0000"]),
        ({"host": 0.29}, ["host at $0.2900/h is 58% of the median $0.5000"], []),
        ({"host_spot": 0.11}, [], []),  # spot prices of hosts really differ that much
        ({"gpu_spot": 0.7, "host_spot": 0.01}, [], ["machine at $0.7100/h is 59% of the median $1.2000"]),
        ({"gpu_spot": 3.0}, [], []),
        ({"gpu_spot": 3.01}, ["GPU at $3.0100/h spot is above $3.0000/h"], ["GPU at $3.0100/h spot is above"]),
        ({"host_spot": 0.6}, ["host at $0.6000/h spot is above $0.5000/h"], ["host at $0.6000/h spot is above"]),
    ],
)
def test_an_implausible_price_is_an_anomaly_with_its_numbers(
    made: Callable[..., Catalog], odd: dict[str, float], on_demand: list[str], spot: list[str]
) -> None:
    offers = made(*four_regions(**odd)).offers("A100", machine=A100)
    assert len(offers) == 8
    assert not [offer for offer in offers if offer.region != "odd1" and offer.anomalies]
    for kind, expected in ((False, on_demand), (True, spot)):
        (offer,) = [offer for offer in offers if offer.region == "odd1" and offer.spot == kind]
        assert len(offer.anomalies) == len(expected)
        assert all(text.startswith(start) for text, start in zip(offer.anomalies, expected, strict=True))


def test_a_region_counts_once_in_the_median_however_many_zones_it_has(made: Callable[..., Catalog]) -> None:
    cheap = [f"cheap1-{letter}" for letter in "abcdef"]
    dear = ["one1-a", "two1-a", "three1-a"]
    catalog = made(*map(host, cheap + dear), *(gpu(zone, 1.0, 0.9) for zone in cheap), *map(gpu, dear))
    anomalous = {offer.region for offer in catalog.offers("A100", machine=A100, spot=False) if offer.anomalies}
    assert anomalous == {"cheap1"}


def test_if_every_price_contradicts_itself_all_are_anomalies(made: Callable[..., Catalog]) -> None:
    catalog = made(*map(host, ("a1-a", "b1-a")), *(gpu(zone, 1.0, 2.0) for zone in ("a1-a", "b1-a")))
    assert all(offer.anomalies for offer in catalog.offers("A100", machine=A100))


def test_the_median_uses_the_cheapest_zone_of_each_region(made: Callable[..., Catalog]) -> None:
    zones = ["low1-a", "low1-b", "two1-a", "three1-a"]
    prices = [1.0, 9.0, 5.0, 9.0]  # by region 1, 5, 9
    for order in (1, -1):
        lines = [gpu(zone, usd, 0.5) for zone, usd in zip(zones, prices, strict=True)][::order]
        (low,) = [o for o in made(*map(host, zones), *lines).offers("A100", machine=A100, spot=False) if o.anomalies]
        assert low.anomalies == ("GPU at $1.0000/h is 20% of the median $5.0000 of 3 regions",)


def test_a_price_of_zero_is_an_anomaly_even_if_all_are_zero(made: Callable[..., Catalog]) -> None:
    catalog = made(*map(host, ("a1-a", "b1-a")), *(gpu(zone, 0.0, 0.0) for zone in ("a1-a", "b1-a")))
    for offer in catalog.offers("A100", machine=A100):
        assert offer.anomalies == ("GPU at $0.0000/h is at the median $0.0000 of 2 regions",)
