"""Which machines a launch may land on: grouping, shortening and wording, on offers made by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from finetune.cloud.catalog.offers import Offer
from finetune.cloud.launch.candidates import (
    Candidate,
    CandidateGroup,
    Requirement,
    check_ceiling,
    groups,
    price_table,
    refusal_message,
    shorten,
    table,
)
from finetune.machine.price import Machine, price_in
from tests.helpers.errors import raises


def candidate(
    usd: float, gpu: str = "T4", region: str = "r1", zone: str = "a", *, spot: bool = True, refusal: str = "",
    only_zone: str | None = None, ceiling: float | None = 5.0, given: int | None = None,
) -> Candidate:  # fmt: skip
    requirement = Requirement(gpu, 1, "m", spot, None, only_zone, 200, "medium", ceiling, 0)
    offer = Offer(gpu, 1, "m", region, f"{region}-{zone}", spot, usd / 2, usd / 4, usd / 4)
    return Candidate(requirement, offer, None, refusal, given)


def named(found: list[CandidateGroup]) -> list[tuple[str, str | None, int]]:
    return [(entry.best.offer.region, entry.zone, len(entry.candidates)) for entry in found]


def test_the_zones_of_a_region_at_one_price_are_one_group() -> None:
    assert named(groups([candidate(1, zone="a"), candidate(1, zone="b")])) == [("r1", None, 2)]


def test_a_region_with_two_prices_is_listed_by_zone() -> None:
    """For the region alone, SkyPilot would try both."""
    assert named(groups([candidate(1, zone="a"), candidate(2, zone="b")])) == [("r1", "r1-a", 1), ("r1", "r1-b", 1)]


def test_a_region_with_a_refused_zone_is_listed_by_zone() -> None:
    found = groups([candidate(1, zone="a"), candidate(1, zone="b", refusal="price anomaly: x")])
    assert named(found) == [("r1", "r1-a", 1)]


def test_a_zone_that_the_task_names_stays_a_zone() -> None:
    assert named(groups([candidate(1, only_zone="r1-a")])) == [("r1", "r1-a", 1)]


def test_spot_and_on_demand_of_a_region_are_two_groups() -> None:
    found = groups([candidate(1, spot=False), candidate(1, spot=True)])
    assert [entry.best.offer.spot for entry in found] == [False, True]


def test_groups_come_cheapest_first_or_in_the_order_that_was_given() -> None:
    cheap, dear = candidate(1, region="r1"), candidate(2, region="r2")
    assert [entry.best.offer.region for entry in groups([dear, cheap])] == ["r1", "r2"]
    cheap, dear = candidate(1, region="r1", given=1), candidate(2, region="r2", given=0)
    assert [entry.best.offer.region for entry in groups([cheap, dear])] == ["r2", "r1"]


def test_a_short_list_keeps_a_share_for_every_kind() -> None:
    """A stock-out of all T4 on spot must leave something to fail over to."""
    t4 = [candidate(0.1 + n / 1000, region=f"t{n}") for n in range(50)]
    a100 = [candidate(3 + n / 1000, gpu="A100", region=f"a{n}") for n in range(50)]
    v100 = [candidate(9, gpu="V100", region="v", spot=False)]
    kept = shorten(groups([*t4, *a100, *v100]), limit=9)
    kinds = [entry.best.name for entry in kept]
    assert kinds == ["T4 spot"] * 7 + ["A100 spot"] + ["V100 on-demand"]
    assert [entry.best.offer.region for entry in kept[:2]] == ["t0", "t1"], "the best of each kind"


def test_with_many_kinds_the_best_ones_keep_several_regions_and_one_is_on_demand() -> None:
    """21 kinds, as in sky/train_cheapest.yaml, used to leave the cheapest one a single region."""
    many = [
        candidate(n + region / 100, gpu=f"G{n}", region=f"r{region}", spot=n < 20)
        for n in range(21)
        for region in range(6)
    ]
    kinds = Counter(entry.best.name for entry in shorten(groups(many), limit=24))
    assert [kinds[f"G{n} spot"] for n in range(12)] == [6, 6, 3] + [1] * 8 + [0]
    assert kinds["G20 on-demand"] == 1
    assert kinds.total() == 24


def test_a_list_that_is_short_stays_whole() -> None:
    found = groups([candidate(n, region=f"r{n}") for n in range(1, 6)])
    assert shorten(found, limit=9) == found


def test_the_price_table_says_what_the_job_may_cost() -> None:
    found = groups([candidate(1, zone="a"), candidate(1, zone="b"), candidate(2, region="r2", spot=False)])
    prices = price_table(found, "today's catalog")
    assert price_in(prices, Machine("r1-b", True, "T4")).usd_per_hour == 1.0
    assert price_in(prices, Machine("r2-a", False, "T4")).usd_per_hour == 2.0
    assert price_in(prices, Machine("elsewhere", True, "T4")).usd_per_hour == 5.0, "the ceiling"
    assert price_table(groups([candidate(1, ceiling=None)]), "")["ceiling_usd_per_hour"] is None


def test_the_refusal_names_the_nearest_of_each_kind_first() -> None:
    above = "above max_hourly_cost $0.5"
    found = [candidate(1 + n / 10, region=f"t{n}", refusal=above) for n in range(9)]
    found.append(candidate(4, gpu="A100", refusal=above))
    message = refusal_message(found, "today's catalog")
    assert message.index("t0-a") < message.index("t1-a") < message.index("A100 spot")
    assert (
        "1.000 = 0.500 host + 0.250 GPU + 0.250 disk" in message and "max_hourly_cost: 1.00 would allow it" in message
    )
    assert message.count("would allow it") == 6, "the nearest, not all"
    assert "no machine that this task allows has a price" in refusal_message([], "today's catalog")


def test_the_ceiling_that_is_named_does_admit() -> None:
    message = refusal_message([candidate(1.0001, refusal="above max_hourly_cost $0.5")], "")
    assert "max_hourly_cost: 1.01 would allow it" in message


def test_the_table_shows_the_first_and_counts_the_rest() -> None:
    found = groups([candidate(n, region=f"r{n}") for n in range(1, 6)])
    lines = table(found, shown=2).splitlines()
    assert len(lines) == 4 and lines[1].startswith("1.  T4 spot, m") and lines[-1] == "... and 3 more"


@pytest.mark.parametrize("ceiling", [0, -1, float("nan"), float("inf")])
def test_a_ceiling_is_a_positive_number(ceiling: float) -> None:
    with raises("launch.bad_value", match=r"^resources\.max_hourly_cost: expected a positive number"):
        check_ceiling(ceiling, "resources.max_hourly_cost")
    check_ceiling(None, "x")
    check_ceiling(0.01, "x")
