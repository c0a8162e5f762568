"""What a run would cost on each GPU: whether it fits, its hours, its dollars, and whether they are below the ceilings.

Hours are billed hours of one machine: boot and set-up, training, validation, the score, and for spot the work lost to preemptions
and the set-up of each replacement. Waiting for capacity is not billed and not included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from finetune.cloud.catalog.machine_types import NOT_ON_DEMAND
from finetune.cloud.catalog.offers import Catalog, Offer
from finetune.cloud.plan.set_up import ASSUMED, SetUpMinutes, with_set_up
from finetune.cloud.plan.workload import EvaluationSize, RunSize, evaluation_size, run_size, size_on
from finetune.config.load import examples_per_step, gpus_that_agree
from finetune.config.schema import CheckpointSection, PlanSection, RunConfig
from finetune.errors import NotEstimated, UserError
from finetune.estimate.fit import Fitted, MicroBatchConfig, fit_on, usual_step_tokens
from finetune.estimate.generation import GenerationSpeed, answering_speed
from finetune.estimate.speed import Speed, data_parallel, micro_batch_seconds, training_speed
from finetune.estimate.speed_fused import FusedStep, fused_speed, fused_step_seconds
from finetune.machine.gpus import MACHINES, GpuSpec, machine_name
from finetune.machine.price import Ceilings
from finetune.models.architectures import SHAPES, ModelShape, shape_of

VALIDATION_COST = 1 / 3
"""Cost of a validation token relative to a training token: the forward pass alone, of a forward pass and two backward products
(one with a 4-bit base), so 1/3 is on the safe side. Estimated."""


NOT_PRICED = ("cloud.unknown_gpu", "cloud.gpu_not_offered", "cloud.machine_mismatch", "price.unknown")
"""Codes of the errors of a GPU, or a machine type, that is not in the catalog."""
MAX_PREEMPTIONS = 5.0
"""Expected preemptions between two checkpoints above which a run is refused: it would need e^5 = 148 attempts on average to reach
the next checkpoint."""


@dataclass(frozen=True)
class Scoring:
    """The score of a run on one type of GPU: base and tuned model. hours: with loading."""

    speed: GenerationSpeed
    hours: float


@dataclass(frozen=True)
class OnGpu:
    """A run on one type of GPU, without prices. Memory in GiB; hours of training and validation only. scoring: None if the run is
    not scored, or if it is unknown how many questions there are.

    micro_batch_config: how the fused backend computes a step on this GPU; None with the Hugging Face backend. available_gib: GPU
    memory that the run may use, None for all of it. batch_size: examples in a step, over all GPUs. conflict: why no run begins on
    so many GPUs, whose figures are then those with training.effective_batch_size alone; "" if one does.
    """

    gpu: GpuSpec
    needed_gib: float
    fits: bool
    speed: Speed
    work_hours: float
    save_hours: float  # work between two checkpoints
    save_key: str = "checkpoint.every_minutes"  # the config key that determines save_hours
    count: int = 1  # GPUs in the machine, each of which needs needed_gib; speed is that of all
    micro_batch_config: MicroBatchConfig | None = None
    available_gib: float | None = None
    scoring: Scoring | None = None
    batch_size: int = 0
    conflict: str = ""

    @property
    def possible(self) -> bool:
        """Whether the run fits, and begins."""
        return self.fits and not self.conflict

    @property
    def name(self) -> str:
        return machine_name(self.gpu.name, self.count)


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


def run_on(
    config: RunConfig,
    size: RunSize,
    gpu: GpuSpec,
    evaluation: EvaluationSize | None = None,
    count: int = 1,
    nodes: int = 1,
) -> OnGpu:
    """Memory, speed and hours of the run on one GPU, or on `count` in one machine, of which one answers when it is scored.

    size: on any number of GPUs. evaluation: of the score with which it ends. nodes: such machines that train together; how much
    faster that is, is not estimated. Raises NotEstimated if the model's shape is unknown.
    """
    shape = shape_of(config.model.name)
    if shape is None:
        raise NotEstimated(
            f"model.name: the shape of {config.model.name} is not known here, so its memory and time cannot be estimated; "
            f"known: {', '.join(SHAPES)}, and every local folder with a config.json",
            code="model.unknown_shape",
        )
    gpus = count * nodes
    conflict = _conflict(config, gpus)
    if conflict:
        config = replace(config, training=replace(config.training, gradient_accumulation_steps=None))
    size, batch_size = size_on(size, config.training, gpus), examples_per_step(config.training, gpus)
    fitted = fit_on(config, shape, gpu, usual_step=usual_step_tokens(batch_size, size.mean_tokens), gpus=gpus)
    speed = _speed(config, size, gpu, shape, fitted, count, batch_size)
    seconds = (size.tokens + size.validation_tokens * VALIDATION_COST) / speed.tokens_per_second
    work_hours = seconds / 3600
    save_hours, save_key = save_interval(config.checkpoint, work_hours, size.steps)
    return OnGpu(
        gpu=gpu,
        needed_gib=fitted.needed_gib,
        fits=fitted.fits,
        speed=speed,
        work_hours=work_hours,
        save_hours=save_hours,
        save_key=save_key,
        count=count,
        micro_batch_config=fitted.limits,
        available_gib=fitted.memory_gib,
        scoring=_scoring(config, gpu, shape, evaluation) if evaluation else None,
        batch_size=batch_size,
        conflict=conflict,
    )


def _conflict(config: RunConfig, gpus: int) -> str:
    """Why no run of this config begins on so many GPUs; "" if one does."""
    try:
        examples_per_step(config.training, gpus)
    except UserError as error:
        return f"no run begins on {gpus} GPUs with these batch sizes: {error}"
    return ""


def _scoring(config: RunConfig, gpu: GpuSpec, shape: ModelShape, size: EvaluationSize) -> Scoring:
    """Judging is left out: it runs beside generating, on the CPU."""
    speed = answering_speed(config, gpu, shape)
    return Scoring(speed, (speed.loading_seconds + size.new_tokens / speed.tokens_per_second) / 3600)


def save_interval(section: CheckpointSection, work_hours: float, steps: int) -> tuple[float, str]:
    """Hours of work between two checkpoints, and the config key that determines them: the shorter interval of the two.

    A checkpoint is saved at the end of a step, so the interval is at least one step. It is at most the whole run, which is
    also the interval if neither key is set.
    """
    step_hours = work_hours / steps
    found = [(work_hours, "checkpoint.every_minutes")]
    if section.save_steps is not None:
        found.insert(0, (section.save_steps * step_hours, "checkpoint.save_steps"))
    if section.every_minutes is not None:
        found.insert(0, (max(section.every_minutes / 60, step_hours), "checkpoint.every_minutes"))
    hours, key = min(found[:-1] or found, key=lambda each: each[0])
    return min(hours, work_hours), key


def _speed(
    config: RunConfig, size: RunSize, gpu: GpuSpec, shape: ModelShape, fitted: Fitted, count: int, batch_size: int
) -> Speed:
    """Of `count` GPUs together; a step takes at least as long as the host needs for one example."""
    if fitted.limits is None:
        assert fitted.micro_batch_size is not None
        one = training_speed(
            gpu,
            shape,
            micro_batch_size=fitted.micro_batch_size,
            mean_tokens=size.mean_tokens,
            checkpointing=fitted.checkpointing,
        )
        least = micro_batch_seconds(gpu, shape, size.mean_tokens, checkpointing=fitted.checkpointing)
        return data_parallel(one, count, batch_size, batch_size * size.mean_tokens, least)
    step = FusedStep(
        batch_size=batch_size,
        mean_tokens=size.mean_tokens,
        tokens=fitted.limits.tokens,
        uncheckpointed_layers=fitted.limits.uncheckpointed_layers,
        dequantized_layers=fitted.limits.dequantized_layers,
        micro_batch_size=fitted.micro_batch_size,
        dropout=config.lora.lora_dropout > 0,
        four_bit=config.quantization.load_in_4bit,
    )
    least = fused_step_seconds(gpu, shape, size.mean_tokens, replace(step, batch_size=1))
    return data_parallel(fused_speed(gpu, shape, step), count, batch_size, batch_size * size.mean_tokens, least)


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
