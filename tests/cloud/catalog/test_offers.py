"""Offers and their price parts, what is refused, and the source of the prices."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from finetune.cloud.catalog.csv_file import VMS
from finetune.cloud.catalog.disks import disk_usd_per_hour
from finetune.cloud.catalog.offers import SNAPSHOT, Catalog, Offer, load_catalog
from tests.helpers.catalog_fixture import CATALOG, gpu, host, lay_out_catalog, price_rows, shared_catalog, write_prices
from tests.helpers.errors import raises

A100 = "a2-highgpu-1g"
pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def catalog(home: Path) -> Catalog:
    lay_out_catalog(home)
    return load_catalog()


def message(code: str, call: Callable[[], object]) -> str:
    with raises(code) as caught:
        call()
    return str(caught.value)


def zones(offers: list[Offer]) -> list[str]:
    return [offer.zone for offer in offers]


def test_a_machine_costs_its_host_its_gpu_and_its_disk(catalog: Catalog) -> None:
    (offer,) = catalog.offers("A100", machine=A100, spot=False, zone="us-central1-f", disk_gib=300)
    assert (offer.host_usd, offer.gpu_usd) == (0.73948, 2.93391)
    assert offer.disk_usd == pytest.approx(300 * 0.1 / 730)
    assert offer.usd_per_hour == pytest.approx(0.73948 + 2.93391 + 300 * 0.1 / 730)
    assert (offer.gpu, offer.count, offer.machine, offer.region, offer.spot) == ("A100", 1, A100, "us-central1", False)
    assert offer.anomalies == ()


def test_the_disk_is_priced_by_tier_region_and_machine(catalog: Catalog) -> None:
    (offer,) = catalog.offers("L4", machine="g2-standard-8", spot=True, zone="us-east4-a", disk_tier="low")
    assert offer.disk_usd == disk_usd_per_hour(200, "medium", "us-east4")  # a G2 takes no pd-standard
    (offer,) = catalog.offers("T4", machine="n1-highmem-8", spot=True, zone="us-east4-a", disk_tier="best")
    assert offer.disk_usd == disk_usd_per_hour(200, "high", "us-east4")
    assert "fast" in message("cloud.unknown_disk_tier", lambda: catalog.offers("A100", machine=A100, disk_tier="fast"))


def test_every_zone_with_a_price_is_offered_once_for_each_kind_cheapest_first(catalog: Catalog, home: Path) -> None:
    sold = {row["AvailabilityZone"] for row in price_rows(home / CATALOG) if row["AcceleratorName"] == "A100"}
    both = catalog.offers("A100", machine=A100)
    assert len(sold) == 12
    assert {(offer.zone, offer.spot) for offer in both} == {(zone, spot) for zone in sold for spot in (True, False)}
    assert [offer.usd_per_hour for offer in both] == sorted(offer.usd_per_hour for offer in both)
    assert catalog.offers("A100", machine=A100, spot=True) == [offer for offer in both if offer.spot]
    assert catalog.offers("A100", machine=A100, spot=False) == [offer for offer in both if not offer.spot]


def test_a_region_or_a_zone_narrows_the_offers_but_not_the_anomalies(catalog: Catalog) -> None:
    everywhere = catalog.offers("A100", machine=A100, spot=False)
    low = catalog.offers("a100", machine=A100, spot=False, region="EUROPE-west4")
    assert low == [offer for offer in everywhere if offer.region == "europe-west4"]
    assert zones(low) == ["europe-west4-a", "europe-west4-b"] and all(offer.anomalies for offer in low)
    assert zones(catalog.offers("A100", machine=A100, spot=True, zone="us-east1-B")) == ["us-east1-b"]


@pytest.mark.parametrize("name", ["a100-80gb", "A100-80GB", " A100-80gb "])
def test_names_of_gpus_are_found_in_any_case_and_come_back_canonical(catalog: Catalog, name: str) -> None:
    assert {offer.gpu for offer in catalog.offers(name, machine="a2-ultragpu-1g")} == {"A100-80GB"}


def test_a_missing_price_is_a_missing_offer(made: Callable[..., Catalog]) -> None:
    catalog = made(
        host("us-east1-b"), gpu("us-east1-b", spot=""), host("us-east1-c", usd=""), gpu("us-east1-c"), gpu("us-east1-d"),
        host("us-east1-e"),
    )  # fmt: skip
    found = catalog.offers("A100", machine=A100)
    assert {(offer.zone, offer.spot) for offer in found} == {("us-east1-b", False), ("us-east1-c", True)}
    assert catalog.offers("A100", machine=A100, zone="us-east1-d") == []
    assert made(host("us-east1-b", "", ""), gpu("us-east1-b")).offers("A100", machine=A100) == []


def test_two_gpus_are_not_priced_as_one(made: Callable[..., Catalog]) -> None:
    double = "a2-highgpu-2g"
    single = [host("us-east1-b"), gpu("us-east1-b")]
    catalog = made(*single, host("us-east1-b", 1.5, machine=double), gpu("us-east1-b", 6.0, count=2))
    (offer,) = catalog.offers("A100", machine=double, count=2, spot=False)
    assert (offer.host_usd, offer.gpu_usd, offer.count) == (1.5, 6.0, 2)


REFUSED = [
    ({"machine": "n1-highmem-8"}, "cloud.machine_mismatch",
     "A100:1 does not come with n1-highmem-8; on Google Cloud A100:1 comes only with a2-highgpu-1g"),
    ({"machine": "a2-ultragpu-1g"}, "cloud.machine_mismatch", "comes only with a2-highgpu-1g"),
    ({"gpu": "T4", "machine": "g2-standard-8"}, "cloud.machine_mismatch",
     "T4:1 does not come with g2-standard-8; .* N1 machine of at most 48 vCPUs"),
    ({"gpu": "V100", "machine": "n1-highmem-16"}, "cloud.machine_mismatch",
     "V100:1 does not come with n1-highmem-16; .* at most 12 vCPUs and 78 GB"),
    ({"gpu": "L4", "machine": "g2-standard-4"}, "price.unknown", "g2-standard-4: SkyPilot's catalog has no price for it"),
    ({"gpu": "T4", "machine": "n1-highmem-32"}, "cloud.machine_mismatch", "machine n1-highmem-32 is not in the catalog"),
    ({"gpu": "L4", "machine": "g2-standard-96", "count": 8}, "price.unknown", "L4:8: SkyPilot's catalog has no price for it"),
    ({"count": 3}, "cloud.machine_mismatch", "A100:3: no machine .* has 3 of them; possible: 1, 2, 4, 8, 16"),
    ({"count": 0}, "cloud.bad_gpu_count", "A100: expected a positive whole number of GPUs, found 0"),
    ({"count": True}, "cloud.bad_gpu_count", "found True"),
    ({"gpu": "A1000"}, "cloud.unknown_gpu",
     "unknown GPU 'A1000'; did you mean A100 or A100-80GB?; .* has A100, A100-80GB, B200, H100, H200, L4, T4, V100"),
    ({"gpu": "RTX4091"}, "cloud.unknown_gpu", "did you mean RTX4090"),
    ({"gpu": "quantum"}, "cloud.unknown_gpu", "unknown GPU 'quantum'; for Google Cloud"),
    ({"gpu": ""}, "cloud.unknown_gpu", "unknown GPU ''; for Google Cloud"),
    ({"gpu": "a10"}, "cloud.gpu_not_offered", "A10 is not on Google Cloud, only on Azure, Lambda, OCI"),
    ({"gpu": "p100"}, "price.unknown", "P100 is on Google Cloud, but its price is not known here"),
    ({"region": "asia-east1"}, "cloud.gpu_not_in_place",
     "region asia-east1: no A100 there; the regions that have it: asia-southeast1, europe-west4, me"),
    ({"zone": "us-east1-z"}, "cloud.gpu_not_in_place",
     "zone us-east1-z: no A100 there; the regions that have it: asia-southeast1"),
    ({"zone": "us-east1-c", "region": "us-east1"}, "cloud.gpu_not_in_place",
     "zone us-east1-c: no A100 there; in region us-east1 it is in us-east1-b$"),
    ({"zone": "us-west1-b", "region": "us-east1"}, "cloud.zone_outside_region", "zone us-west1-b is not in region us-east1"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "code", "text"), REFUSED, ids=[str(wrong) for wrong, *_ in REFUSED])
def test_what_is_not_sold_is_refused_with_what_is(
    catalog: Catalog, wrong: dict[str, Any], code: str, text: str
) -> None:
    with raises(code, match=text.replace("?;", r"\?;")):
        catalog.offers(**{"gpu": "A100", "machine": A100} | wrong)


def test_a_machine_whose_gpus_have_no_price_is_refused(made: Callable[..., Catalog]) -> None:
    catalog = made(host("us-east1-b", machine="a2-highgpu-2g"), gpu("us-east1-b"))
    refusal = message("price.unknown", lambda: catalog.offers("A100", machine="a2-highgpu-2g", count=2))
    assert refusal == "A100:2: SkyPilot's catalog has no price for it"


def test_a_catalog_of_prices_alone_still_knows_the_gpus_of_other_clouds(made: Callable[..., Catalog]) -> None:
    catalog = made(host("us-east1-b"), gpu("us-east1-b"))
    assert message("cloud.gpu_not_offered", lambda: catalog.offers("A10", machine=A100)).startswith("A10 ")


def test_a_gpu_of_the_catalog_whose_machine_is_unknown_is_refused(made: Callable[..., Catalog]) -> None:
    catalog = made(host("us-east1-b"), gpu("us-east1-b", name="X9"), gpu("us-east1-b", name="tpu-v9-8"))
    assert message("cloud.gpu_not_offered", lambda: catalog.offers("x9", machine=A100)).startswith(
        "X9: its machine types on Google Cloud"
    )
    assert "has X9" in message("cloud.unknown_gpu", lambda: catalog.offers("tpu-v9-8", machine=A100))  # and no TPU


def test_machines_for_a_gpu_are_those_with_a_price_smallest_first(home: Path, catalog: Catalog) -> None:
    assert catalog.machines_for("a100") == [A100]
    assert catalog.machines_for("T4") == catalog.machines_for("V100", 8) == ["n1-highmem-8", "n1-highmem-16"]
    assert catalog.machines_for("V100") == ["n1-highmem-8"] and catalog.machines_for("L4", 2) == ["g2-standard-24"]
    assert catalog.machines_for("L4", 8) == []
    lines = [host("us-east1-b", machine=name) for name in ("g2-standard-16", "g2-standard-8", "g2-standard-24")]
    write_prices(home, [lines[0].replace("12.0,85.0", "16.0,64.0"), *lines[1:], gpu("us-east1-b", name="L4")])
    assert load_catalog().machines_for("L4") == ["g2-standard-8", "g2-standard-16"]


def test_a_machine_without_gpu_costs_its_cheapest_zone(catalog: Catalog) -> None:
    assert catalog.cpu_machine_usd("n2-standard-4") == 0.19424
    assert catalog.cpu_machine_usd("n2-standard-4", region="europe-west4") == 0.21383
    assert catalog.cpu_machine_usd("n2-standard-4", spot=True) == min(
        float(row["SpotPrice"]) for row in price_rows(SNAPSHOT) if row["InstanceType"] == "n2-standard-4"
    )
    assert catalog.cpu_machine_usd("n2-standard-4", region="asia-east1") is None
    assert catalog.cpu_machine_usd("n9-standard-4") is None


def test_without_a_catalog_our_snapshot_is_used_with_a_warning(home: Path) -> None:
    catalog = load_catalog()
    assert catalog.is_snapshot and catalog.fetched is None
    assert "OUR OLD SNAPSHOT" in catalog.source and "PRICES MAY HAVE CHANGED" in catalog.source
    assert "copied on 2026-11-22" in catalog.source
    assert "our old snapshot" in message(
        "price.unknown", lambda: catalog.offers("H100", machine="a3-highgpu-8g", count=8)
    )
    refusal = message("catalog.missing", lambda: load_catalog(allow_snapshot=False))
    assert refusal.startswith(f"{home / CATALOG / VMS}: no price catalog yet")


def test_a_corrupt_catalog_is_not_replaced_by_the_snapshot(home: Path) -> None:
    path = write_prices(home, [host("us-east1-b", "free")])
    assert message("catalog.corrupt", load_catalog).startswith(f"{path}: line 2: Price is 'free'")


@pytest.mark.parametrize(("days", "text"), [(0, "today"), (1, "1 day ago"), (2, "2 days ago"), (400, "400 days ago")])
def test_the_source_says_when_the_prices_were_fetched(home: Path, days: int, text: str) -> None:
    then = datetime.now(UTC) - timedelta(days=days)
    lay_out_catalog(home, fetched=then)
    catalog = load_catalog()
    assert catalog.source == f"SkyPilot's catalog, fetched {then.astimezone():%Y-%m-%d} ({text})"
    assert not catalog.is_snapshot and catalog.fetched is not None
    assert abs((catalog.fetched - then).total_seconds()) < 1


def test_a_catalog_of_unknown_age_says_so(catalog: Catalog) -> None:
    assert catalog.source == "SkyPilot's catalog, put there by hand, age unknown"
    assert catalog.fetched is None and not catalog.is_snapshot


def test_the_snapshot_holds_real_rows_of_the_shared_slice() -> None:
    source = shared_catalog()
    if source is None:
        pytest.skip("the shared catalog is not beside this checkout")
    ours, theirs = price_rows(SNAPSHOT), price_rows(source)
    kinds = {(row["InstanceType"], row["AcceleratorName"], row["AcceleratorCount"]) for row in theirs}
    shared = [row for row in ours if (row["InstanceType"], row["AcceleratorName"], row["AcceleratorCount"]) in kinds]
    assert len(shared) == 170 and all(row in theirs for row in shared)
    regions = {row["Region"] for row in ours}
    gpus = [row for row in theirs if row["AcceleratorName"] and row["Region"] in regions]
    assert [row for row in shared if row["AcceleratorName"]] == gpus


def test_rows_that_the_slice_lacks_cost_as_much_more_as_they_are_larger() -> None:
    """SkyPilot multiplies the price of one GPU, of a vCPU and of a GB of memory, so several L4 or T4 and their hosts show slips
    of the pen."""
    rows = {
        (row["InstanceType"] or row["AcceleratorName"], row["AcceleratorCount"], row["AvailabilityZone"]): row
        for row in price_rows(SNAPSHOT)
    }
    pairs = [("L4", "2", "L4", "1", 2), ("L4", "4", "L4", "1", 4), ("T4", "2", "T4", "1", 2), ("T4", "4", "T4", "1", 4),
             ("g2-standard-24", "", "g2-standard-8", "", 3), ("g2-standard-48", "", "g2-standard-8", "", 6),
             ("n1-highmem-16", "", "n1-highmem-8", "", 2)]  # fmt: skip
    for large, count, small, one, times in pairs:
        found = [(row, rows[small, one, key[2]]) for key, row in rows.items() if key[:2] == (large, count)]
        assert len(found) == sum(key[:2] == (small, one) for key in rows)
        for row, base in found:
            for column in ("Price", "SpotPrice"):
                assert float(row[column]) == pytest.approx(times * float(base[column]), abs=6e-5), (large, column)
