"""What a run would cost on each GPU: whether it fits, its hours, its dollars, and whether they are below the ceilings.

Hours are billed hours of one machine: boot and set-up, training, validation, the score, and for spot the work lost to preemptions
and the set-up of each replacement. Waiting for capacity is not billed and not included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from finetune.cloud.catalog.machine_types import NOT_ON_DEMAND
from finetune.cloud.catalog.offers import Catalog, Offer
from finetune.cloud.plan.on_gpu import OnGpu, run_on
from finetune.cloud.plan.set_up import ASSUMED, SetUpMinutes, with_set_up
from finetune.cloud.plan.workload import EvaluationSize, RunSize, evaluation_size, run_size
from finetune.config.load import gpus_that_agree
from finetune.config.schema import PlanSection, RunConfig
from finetune.errors import UserError
from finetune.machine.gpus import MACHINES
from finetune.machine.price import Ceilings

NOT_PRICED = ("cloud.unknown_gpu", "cloud.gpu_not_offered", "cloud.machine_mismatch", "price.unknown")
"""Codes of the errors of a GPU, or a machine type, that is not in the catalog."""
MAX_PREEMPTIONS = 5.0
"""Expected preemptions between two checkpoints above which a run is refused: it would need e^5 = 148 attempts on average to reach
the next checkpoint."""


@dataclass(frozen=True)
class RunCost:
    """Expected billed hours and US dollars of the whole run; lost_* is the part caused by preemptions, score_* that of the score
    without preemptions."""

    hours: float
    usd: float
    preemptions: float
    lost_hours: float
    lost_usd: float
    score_hours: float = 0.0
    score_usd: float = 0.0


@dataclass(frozen=True)
class Row:
    """One row of the plan: a GPU, spot or on-demand, in its best zone. offer and cost are None if it is not sold.

    passed_over: the cheapest offer, if it was skipped for a price anomaly; else None.
    """

    on_gpu: OnGpu
    spot: bool
    offer: Offer | None
    cost: RunCost | None
    refusals: tuple[str, ...]  # why it is not chosen; empty if it is
    passed_over: Offer | None = None

    @property
    def chosen(self) -> bool:
        return not self.refusals


@dataclass(frozen=True)
class Plan:
    """size: on the smallest machine on which the run begins. rows: the chosen ones by expected dollars, then the refused ones.
    evaluation: None if the run is not scored, or if the number of questions is unknown; scored tells the two apart. executable:
    whether any source may have a database to score on."""

    size: RunSize
    ceilings: Ceilings
    assumptions: PlanSection
    catalog: Catalog
    rows: tuple[Row, ...]
    evaluation: EvaluationSize | None = None
    scored: bool = True
    set_up: SetUpMinutes = ASSUMED
    executable: bool = True


def plan_run(
    config: RunConfig,
    catalog: Catalog,
    ceilings: Ceilings,
    *,
    spot: bool | None = None,
    trust_prices: bool = False,
    scored: bool = True,
    ask_google: bool = False,
) -> Plan:
    """Price the run on every GPU of plan.gpus. spot: True for spot only, False for on-demand only, None for both. scored: whether
    the run ends with its score, as the task YAMLs have it. ask_google: about earlier launches, for the minutes of set-up.

    Raises UserError for a model of unknown shape, data of unknown size, if the catalog has a price for none of the GPUs, and if
    the keys of the batch size contradict each other on each of them.
    """
    size = run_size(config, gpus_that_agree(config.training, (MACHINES[name].count for name in config.plan.gpus)))
    evaluation = evaluation_size(config) if scored else None
    rows = []
    assumptions, set_up = with_set_up(config, ask_google=ask_google)
    priced = priced_machines(catalog, config.plan)
    for name in config.plan.gpus:
        machine = MACHINES[name]
        on_gpu = run_on(config, size, machine.gpu, evaluation, machine.count)
        for kind in (True, False) if spot is None else (spot,):
            of_kind = [offer for offer in priced.get(name, []) if offer.spot == kind]
            row = _row(on_gpu, kind, _best(of_kind, trust_prices), assumptions, ceilings, trust_prices)
            rows.append(replace(row, passed_over=of_kind[0] if of_kind and of_kind[0] != row.offer else None))
    rows.sort(key=lambda row: (not row.chosen, row.cost.usd if row.cost else math.inf))
    executable = any(source.databases is not None or source.kind == "spider" for source in config.data.sources)
    return Plan(size, ceilings, assumptions, catalog, tuple(rows), evaluation, scored, set_up, executable)


def run_cost(on_gpu: OnGpu, usd_per_hour: float, spot: bool, assumptions: PlanSection) -> RunCost:
    """Expected billed hours and dollars of the run.

    Preemptions come as a Poisson process of rate `spot_preemptions_per_hour`; each loses the work since the last
    checkpoint and adds the set-up of another machine. An interval of s hours between two checkpoints then takes
    (1/rate + set-up) x (exp(rate x s) - 1) hours (J. T. Daly, 2006, "A higher order estimate of the optimum checkpoint
    interval for restart dumps", without its cost of a save). While the run is scored a preemption costs another set-up and
    loading, because answers are kept as they come.
    """
    minutes = assumptions.setup_minutes
    set_up = (ASSUMED.minutes if minutes is None else minutes) / 60
    rate = assumptions.spot_preemptions_per_hour if spot else 0.0
    stretches = on_gpu.work_hours / on_gpu.save_hours
    exponent = min(rate * on_gpu.save_hours, 10 * MAX_PREEMPTIONS)  # larger exponents overflow a float
    preemptions = stretches * math.expm1(exponent)
    lost = preemptions * (1 / rate + set_up) - on_gpu.work_hours if rate else 0.0
    scoring = on_gpu.scoring
    score = scoring.hours if scoring else 0.0
    if scoring:
        preemptions += rate * score
        lost += rate * score * (set_up + scoring.speed.loading_seconds / 3600)
    hours = set_up + on_gpu.work_hours + score + lost
    return RunCost(hours, hours * usd_per_hour, preemptions, lost, lost * usd_per_hour, score, score * usd_per_hour)


def _row(
    on_gpu: OnGpu, spot: bool, offer: Offer | None, assumptions: PlanSection, ceilings: Ceilings, trust_prices: bool
) -> Row:
    if offer is None:
        not_so = not spot and MACHINES[on_gpu.name].machine in NOT_ON_DEMAND
        why = " on demand; spot or flex-start (--flex)" if not_so else ": the catalog has no price for it"
        return Row(on_gpu, spot, None, None, (f"not sold{why}",))
    cost = run_cost(on_gpu, offer.usd_per_hour, spot, assumptions)
    refusals = [
        *_memory_refusal(on_gpu),
        *filter(None, [on_gpu.conflict]),
        *ceiling_refusals(offer.usd_per_hour, cost, ceilings),
    ]
    rate = assumptions.spot_preemptions_per_hour
    if spot and rate * on_gpu.save_hours > MAX_PREEMPTIONS:
        interval = f"{on_gpu.save_hours:.1f} h between checkpoints"
        refusals.append(f"{interval} at {rate:g} preemptions an hour: set a lower {on_gpu.save_key}")
    if offer.anomalies and not trust_prices:
        refusals.append(f"price anomaly: {'; '.join(offer.anomalies)}")
    return Row(on_gpu, spot, offer, cost, tuple(refusals))


def _memory_refusal(on_gpu: OnGpu) -> list[str]:
    if on_gpu.fits:
        return []
    available = on_gpu.available_gib or on_gpu.gpu.memory_gib
    return [f"does not fit: needs {_above(on_gpu.needed_gib, available, 1)} GiB of {available:g}"]


def ceiling_refusals(usd_per_hour: float, cost: RunCost, ceilings: Ceilings) -> list[str]:
    """One clause, with both numbers, for each ceiling that the machine exceeds."""
    refusals = []
    if ceilings.usd_per_hour is not None and usd_per_hour > ceilings.usd_per_hour:
        price = _above(usd_per_hour, ceilings.usd_per_hour, 2)
        refusals.append(f"${price}/h is above the ceiling of ${_cents(ceilings.usd_per_hour)}/h")
    if ceilings.run_usd is not None and cost.usd > ceilings.run_usd:
        usd = _above(cost.usd, ceilings.run_usd, 2)
        refusals.append(f"${usd} is above the ceiling of ${_cents(ceilings.run_usd)} for the run")
    if ceilings.hours is not None and cost.hours > ceilings.hours:
        refusals.append(f"{_above(cost.hours, ceilings.hours, 1)} h is above the ceiling of {ceilings.hours:g} h")
    return refusals


def _above(value: float, limit: float, digits: int) -> str:
    """A value above a limit, with enough decimals to show the difference."""
    while digits < 9 and round(value, digits) <= limit:
        digits += 1
    return f"{value:.{digits}f}"


def _cents(usd: float) -> str:
    return f"{usd:.2f}" if round(usd, 2) == usd else f"{usd:g}"


def _best(offers: list[Offer], trust_prices: bool) -> Offer | None:
    """The cheapest offer without a price anomaly; if there is none, the cheapest, so that its row can name the anomaly."""
    plausible = [offer for offer in offers if trust_prices or not offer.anomalies]
    return min(plausible or offers, key=lambda offer: (offer.usd_per_hour, offer.zone), default=None)


def regions_for_plan(catalog: Catalog, assumptions: PlanSection) -> list[str]:
    """The regions that sell any of plan.gpus without a price anomaly, the region of the cheapest machine first."""
    found = [
        offer for offers in priced_machines(catalog, assumptions).values() for offer in offers if not offer.anomalies
    ]
    return list(dict.fromkeys(offer.region for offer in sorted(found, key=lambda offer: offer.usd_per_hour)))


def priced_machines(catalog: Catalog, assumptions: PlanSection) -> dict[str, list[Offer]]:
    """The offers of each of plan.gpus in every zone, cheapest first, without the GPUs that the catalog has no price for. Raises
    UserError if it has a price for none."""
    found: dict[str, list[Offer]] = {}
    for name in assumptions.gpus:
        gpu, machine, count = MACHINES[name].gpu.name, MACHINES[name].machine, MACHINES[name].count
        try:
            found[name] = catalog.offers(gpu, machine=machine, count=count, disk_gib=assumptions.disk_gib)
        except UserError as error:
            last = name == assumptions.gpus[-1]
            if error.code not in NOT_PRICED or (last and not found):
                raise UserError(f"plan.gpus: {error}", code=error.code) from error
    return found
