"""The machines that a launch may use: every offer that the task allows and that is not above its ceiling, cheapest run first.

Independent of SkyPilot: `policy` converts between SkyPilot's resources and the classes here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.cloud.catalog.machine_types import NOT_ON_DEMAND
from finetune.cloud.catalog.offers import Catalog, Offer
from finetune.cloud.plan.on_gpu import OnGpu
from finetune.cloud.plan.plan import RunCost, run_cost
from finetune.config.schema import PlanSection
from finetune.errors import UserError
from finetune.machine.gpus import machine_name
from finetune.runtime.table import aligned

LIMIT = 24
"""Candidates that are passed to SkyPilot: with a hundred its optimizer takes seconds, again at every fail-over, and prints all of
them."""
NEAREST = 6


@dataclass(frozen=True)
class Requirement:
    """One alternative of a task's resources.

    nodes: machines of one job, which pays for all of them. machines: those of the whole task, more than nodes for a service or
    a pool.
    ceiling: US dollars per hour for all `machines` together; None for no ceiling.
    """

    gpu: str
    count: int
    machine: str
    spot: bool
    region: str | None
    zone: str | None
    disk_gib: int
    disk_tier: str
    ceiling: float | None
    place: int  # index among the task's alternatives
    nodes: int = 1
    machines: int = 1


@dataclass(frozen=True)
class Candidate:
    """An offer that matches a task. cost is None if the size of the run is unknown; then it is ranked by price alone."""

    requirement: Requirement
    offer: Offer
    cost: RunCost | None = None
    refusal: str = ""
    given: int | None = None  # its place in an order that is already fixed; None: ranked by dollars

    @property
    def job_usd_per_hour(self) -> float:
        """Of all machines of the job."""
        return self.offer.usd_per_hour * self.requirement.nodes

    @property
    def rank(self) -> tuple[float, float, str, bool]:
        usd = self.offer.usd_per_hour
        first = float(self.given) if self.given is not None else self.cost.usd if self.cost else usd
        return (first, usd, self.offer.zone, self.offer.spot)

    @property
    def name(self) -> str:
        return f"{machine_name(self.offer.gpu, self.offer.count)} {'spot' if self.offer.spot else 'on-demand'}"


@dataclass(frozen=True)
class CandidateGroup:
    """Candidates that SkyPilot may treat as one: all zones of a region at one price, or a single zone (then zone is set)."""

    candidates: tuple[Candidate, ...]
    zone: str | None

    @property
    def best(self) -> Candidate:
        return self.candidates[0]


def list_candidates(
    catalog: Catalog,
    requirements: Sequence[Requirement],
    on_gpus: dict[str, OnGpu],
    plan: PlanSection,
    *,
    trust_prices: bool,
) -> list[Candidate]:
    """Every offer for every alternative, each with the reason if it is refused, best first.

    on_gpus: memory, speed and hours of the run by `machine_name`; empty if the task names no config of ours.
    Raises UserError for a GPU, machine or region that cannot be priced, and if every alternative is a machine type on demand that
    Google does not sell so.
    """
    if all(not one.spot and one.machine in NOT_ON_DEMAND for one in requirements):
        machine = requirements[0].machine
        raise UserError(
            f"resources: {machine} is not sold on demand, whatever the catalog's price: use_spot: true, or flex-start, which "
            f"`finetune plan CONFIG --flex` explains; nothing was launched",
            code="launch.not_on_demand",
        )
    found: dict[tuple[str, int, str, bool, float], Candidate] = {}
    for one in requirements:
        offers = catalog.offers(
            one.gpu, machine=one.machine, count=one.count, spot=one.spot, disk_gib=one.disk_gib, disk_tier=one.disk_tier,
            region=one.region, zone=one.zone,
        )  # fmt: skip
        for offer in offers:
            on_gpu = on_gpus.get(machine_name(offer.gpu, offer.count))
            cost = run_cost(on_gpu, offer.usd_per_hour * one.nodes, offer.spot, plan) if on_gpu else None
            candidate = Candidate(one, offer, cost, _refusal(one, offer, on_gpu, trust_prices))
            key = (offer.machine + offer.gpu, offer.count, offer.zone, offer.spot, offer.usd_per_hour)
            if key not in found or found[key].refusal:
                found[key] = candidate
    return sorted(found.values(), key=lambda candidate: candidate.rank)


def _refusal(requirement: Requirement, offer: Offer, on_gpu: OnGpu | None, trust_prices: bool) -> str:
    if requirement.ceiling is not None and offer.usd_per_hour * requirement.machines > requirement.ceiling:
        return f"above max_hourly_cost ${requirement.ceiling:g}" + (
            f" with {requirement.machines} machines" if requirement.machines > 1 else ""
        )
    if offer.anomalies and not trust_prices:
        return f"price anomaly: {'; '.join(offer.anomalies)}"
    if on_gpu and not on_gpu.fits:
        available = on_gpu.available_gib or on_gpu.gpu.memory_gib
        return f"does not fit: needs {on_gpu.needed_gib:.1f} GiB of {available:.1f} (estimated)"
    return on_gpu.conflict if on_gpu else ""


def groups(candidates: Sequence[Candidate]) -> list[CandidateGroup]:
    """The allowed candidates in order, with the zones of a region as one group if that adds no other zone.

    For a region without a zone, SkyPilot tries every zone that sells the machine. So a region forms one group only if all of
    those zones are allowed, at one price; otherwise each allowed zone is a group of its own.
    """
    regions: dict[tuple[str, str, int, str, bool], list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        offer = candidate.offer
        regions[(offer.machine, offer.gpu, offer.count, offer.region, offer.spot)].append(candidate)
    found = []
    for members in regions.values():
        allowed = [candidate for candidate in members if not candidate.refusal]
        one_price = len({candidate.offer.usd_per_hour for candidate in members}) == 1
        one_zone = any(candidate.requirement.zone for candidate in members)
        if one_price and len(allowed) == len(members) and not one_zone:
            found.append(CandidateGroup(tuple(members), None))
        else:
            found += [CandidateGroup((candidate,), candidate.offer.zone) for candidate in allowed]
    return sorted(found, key=lambda group: group.best.rank)


def shorten(found: Sequence[CandidateGroup], limit: int = LIMIT) -> list[CandidateGroup]:
    """At most `limit` groups in their order. Half of the places are shared equally by the best kinds of machine (GPU and number
    of them, spot or on-demand), at least one of them on-demand, so that something is left if a kind is out of stock everywhere.
    The rest are the best of all others, so that the best kinds can be tried in more than one region."""
    kinds: dict[str, list[CandidateGroup]] = defaultdict(list)
    for group in found:
        kinds[group.best.name].append(group)
    chosen = list(kinds.values())[: max(1, limit // 2)]
    on_demand = next((members for members in kinds.values() if not members[0].best.offer.spot), None)
    if on_demand and on_demand not in chosen:
        chosen[-1] = on_demand
    share = max(1, limit // 2 // max(1, len(chosen)))
    kept = [group for members in chosen for group in members[:share]]
    rest = [group for group in found if group not in kept]
    kept += rest[: max(0, limit - len(kept))]
    return sorted(kept, key=lambda group: group.best.rank)


def check_ceiling(ceiling: float | None, place: str) -> None:
    """Raises UserError for a ceiling that is not a positive, finite number; a NaN would allow everything."""
    if ceiling is not None and not 0 < ceiling < float("inf"):
        raise UserError(f"{place}: expected a positive number of US dollars, found {ceiling}", code="launch.bad_value")


def refusal_message(candidates: Sequence[Candidate], source: str) -> str:
    """Why every candidate is refused, with the price parts of the nearest one of each kind, and the ceiling that allows it."""
    if not candidates:
        return f"no machine that this task allows has a price in {source}"
    by_price = sorted(candidates, key=lambda c: (not c.refusal.startswith("above"), c.offer.usd_per_hour))
    kinds: dict[str, Candidate] = {}
    prices: dict[tuple[str, float], Candidate] = {}
    for candidate in by_price:
        kinds.setdefault(candidate.name, candidate)
        prices.setdefault((candidate.name, candidate.offer.usd_per_hour), candidate)
    nearest = list(dict.fromkeys([*kinds.values(), *prices.values()]))[:NEAREST]
    lines = [
        "no machine is allowed: each is above its ceiling or refused for another reason; nothing was launched.",
        f"US dollars per hour of the whole machine, from {source}; disk at list price. Nearest:",
    ]
    for candidate in sorted(nearest, key=by_price.index):
        offer = candidate.offer
        parts = f"{offer.host_usd:.3f} host + {offer.gpu_usd:.3f} GPU + {offer.disk_usd:.3f} disk"
        lines.append(f"  {candidate.name:<20} {offer.machine} {offer.zone:<18} {offer.usd_per_hour:.3f} = {parts}")
        lines.append(f"  {'':<20} {candidate.refusal}{_remedy(candidate)}")
    return "\n".join(lines)


def _remedy(candidate: Candidate) -> str:
    if candidate.refusal.startswith("above"):
        usd = candidate.offer.usd_per_hour * candidate.requirement.machines
        return f"; max_hourly_cost: {rounded_up(usd):.2f} would allow it"
    if candidate.refusal.startswith("price"):
        return "; if the price is right, launch with --env FINETUNE_TRUST_PRICES=1"
    return ""


def rounded_up(usd: float) -> float:
    """To cents."""
    return -(-round(usd * 1e6) // 10_000) / 100


def table(found: Sequence[CandidateGroup], shown: int) -> str:
    """The groups in their order, as aligned plain text: price per hour from the catalog, dollars of the run estimated."""
    rows = [("", "machine", "where", "$/h", "hours", "$ for the run")]
    for place, group in enumerate(found[:shown], start=1):
        best = group.best
        where = group.zone or f"{best.offer.region} ({len(group.candidates)} zone{'s' * (len(group.candidates) > 1)})"
        hours, usd = (f"{best.cost.hours:.1f}", f"{best.cost.usd:.2f}") if best.cost else ("", "")
        rows.append(
            (f"{place}.", f"{best.name}, {best.offer.machine}", where, f"{best.offer.usd_per_hour:.3f}", hours, usd)
        )
    lines = aligned(rows, "lllr")
    if len(found) > shown:
        lines.append(f"... and {len(found) - shown} more")
    return "\n".join(lines)


def price_table(found: Sequence[CandidateGroup], basis: str, *, trust_prices: bool = False) -> dict[str, object]:
    """The price table that is passed to the job, from which it reads its own price (`machine.price.price_in`).

    kinds: what the machines are made of, by which the job prices them again from a newer catalog (budget/newest_prices.py); each
    offer names its own by its place in that list.
    """
    asked = [group.best.requirement for group in found]
    known = [requirement.ceiling for requirement in asked if requirement.ceiling is not None]
    kinds: list[dict[str, object]] = []
    offers = []
    for candidate in (candidate for group in found for candidate in group.candidates):
        offer, kind = candidate.offer, _kind(candidate)
        if kind not in kinds:
            kinds.append(kind)
        offers.append(
            {
                "gpu": offer.gpu,
                "count": offer.count,
                "zone": offer.zone,
                "spot": offer.spot,
                "usd_per_hour": round(candidate.job_usd_per_hour, 5),
                "kind": kinds.index(kind),
            }
        )
    return {
        "basis": basis,
        "ceiling_usd_per_hour": max(known) if known else None,
        "trust_prices": trust_prices,
        "kinds": kinds,
        "offers": offers,
    }


def _kind(candidate: Candidate) -> dict[str, object]:
    asked = candidate.requirement
    return {
        "machine": candidate.offer.machine,
        "disk_gib": asked.disk_gib,
        "disk_tier": asked.disk_tier,
        "nodes": asked.nodes,
        "machines": asked.machines,
        "ceiling": asked.ceiling,
    }
