"""The plan as a table and as JSON."""

from __future__ import annotations

from typing import Any

from finetune.cloud.catalog.disks import LISTED
from finetune.cloud.catalog.offers import Offer
from finetune.cloud.plan.on_gpu import OnGpu
from finetune.cloud.plan.plan import Plan, Row
from finetune.machine.gpus import MACHINES
from finetune.runtime.table import aligned

HEADER = (
    "", "GPU", "bought as", "best zone", "memory GiB", "tokens/s", "hours", "score h", "$/h", "$ for the run", "score $", "lost",
    "",
)  # fmt: skip
ALIGN = "llllrrrrrrrrl"
SHOWN = 10
"""Rows of the table; the others follow in a line each."""


def render(plan: Plan, origin: str) -> str:
    """The table with its assumptions and sources; origin is the config file as the user typed it."""
    lines = [
        f"{origin}: {plan.size.records:,} examples x {plan.size.mean_tokens:.0f} tokens, {plan.size.steps:,} optimizer "
        f"steps, {plan.size.tokens / 1e6:.2f} M training tokens",
        f"tokens: {plan.size.basis}",
        f"score: {_evaluation(plan)}",
        f"prices: {plan.catalog.source}; host + GPU + {plan.assumptions.disk_gib} GiB disk "
        f"(Google's list price of {LISTED})",
        "",
        *aligned([HEADER, *(_cells(place, row) for place, row in enumerate(plan.rows[:SHOWN], start=1))], ALIGN),
        *_others(plan.rows[SHOWN:]),
        "",
        *_notes(plan),
    ]
    return "\n".join(lines)


def _cells(place: int, row: Row) -> tuple[str, ...]:
    on_gpu, cost = row.on_gpu, row.cost
    mark = "" if on_gpu.speed.basis == "measured" else " est."
    return (
        f"{place}." if row.chosen else "-",
        on_gpu.name,
        "spot" if row.spot else "on-demand",
        row.offer.zone if row.offer else "",
        f"{on_gpu.needed_gib:.1f} of {on_gpu.gpu.memory_gib:.1f}",
        f"{on_gpu.speed.tokens_per_second:,.0f}{mark}",
        f"{cost.hours:.1f}" if cost else "",
        f"{cost.score_hours:.2f}" if cost and on_gpu.scoring else "",
        f"{row.offer.usd_per_hour:.3f}" if row.offer else "",
        f"{cost.usd:.2f}" if cost else "",
        f"{cost.score_usd:.2f}" if cost and on_gpu.scoring else "",
        f"{cost.lost_usd:.2f}" if cost and row.spot else "",
        _verdict(row),
    )


def _others(rows: tuple[Row, ...]) -> list[str]:
    """What is not among the best: the dollars, or why not."""
    return ["not among the best:"] * bool(rows) + [
        f"  {_bought(row)}: {f'${row.cost.usd:.2f}' if row.chosen and row.cost else _verdict(row)}" for row in rows
    ]


def _bought(row: Row) -> str:
    return f"{row.on_gpu.name} {'spot' if row.spot else 'on-demand'}"


def _evaluation(plan: Plan) -> str:
    size = plan.evaluation
    if size is not None:
        return f"{size.questions:,} {size.basis}; {size.answers:,.0f} answers of base and tuned model"
    if not plan.executable:
        return "none, because no source has a database to execute SQL on"
    if not plan.scored:
        return "left out (--no-score, or EVALUATE=0 in the task)"
    return "not counted, because the number of questions with a database is unknown or 0; prepare the data, or set plan.questions"


def _generators(plan: Plan) -> list[str]:
    """The new tokens per second of each GPU and where they come from."""
    speeds = {row.on_gpu.name: row.on_gpu.scoring.speed for row in plan.rows[:SHOWN] if row.on_gpu.scoring}
    lines = [
        f"  {gpu}: {speed.tokens_per_second:,.0f} after {speed.loading_seconds:.0f} s of loading, {speed.basis} ({speed.source})"
        for gpu, speed in speeds.items()
    ]
    return ["new tokens/s of the score, which is part of the hours and of the dollars:", *lines] if lines else []


def _verdict(row: Row) -> str:
    if row.refusals:
        return "; ".join(row.refusals)
    anomalies = row.offer.anomalies if row.offer else ()
    return f"ok, despite a price anomaly: {'; '.join(anomalies)}" if anomalies else "ok"


def _step(on_gpu: OnGpu, with_examples: bool) -> str:
    """How the run computes a step on this GPU. with_examples: how many there are in it."""
    examples = f"{on_gpu.batch_size} examples a step, " if with_examples else ""
    chosen = on_gpu.micro_batch_config
    if chosen is None:
        return f"{examples}Hugging Face layers, padded micro-batches"
    layers = f"{chosen.uncheckpointed_layers} layers not recomputed, {chosen.dequantized_layers} dequantized"
    return f"{examples}micro-batches of up to {chosen.tokens:,} tokens; {layers}"


def _passed_over(row: Row, offer: Offer) -> str:
    return f"  {_bought(row)} in {offer.zone} at ${offer.usd_per_hour:.3f}/h: {'; '.join(offer.anomalies)}"


def _notes(plan: Plan) -> list[str]:
    """Where the figures of each column come from: measured, from the catalog, estimated or assumed."""
    assumed, shown = plan.assumptions, plan.rows[:SHOWN]
    sizes_differ = len({row.on_gpu.batch_size for row in plan.rows}) > 1
    sources = dict.fromkeys(f"{row.on_gpu.name}: {row.on_gpu.speed.source}" for row in shown)
    ceilings = [
        text
        for value, text in (
            (plan.ceilings.usd_per_hour, f"${plan.ceilings.usd_per_hour or 0:g} an hour"),
            (plan.ceilings.run_usd, f"${plan.ceilings.run_usd or 0:g} for the run"),
            (plan.ceilings.hours, f"{plan.ceilings.hours or 0:g} hours"),
        )
        if value is not None
    ]
    chosen = [_bought(row) for row in plan.rows if row.chosen]
    more = f", and {len(chosen) - SHOWN} more" if len(chosen) > SHOWN else ""
    passed_over = [_passed_over(row, row.passed_over) for row in shown if row.passed_over]
    return [
        f"order: {', then '.join(chosen[:SHOWN])}{more}"
        if chosen
        else "order: none; every machine is refused, for the reason in its row",
        f"ceilings: {', '.join(ceilings) or 'none (those of a task hold at its launch)'}",
        *(["cheaper, but with a price anomaly (--trust-prices accepts it):", *passed_over] if passed_over else []),
        "memory: estimated, with the settings that the run will choose (`finetune plan CONFIG --memory` shows the parts):",
        *dict.fromkeys(f"  {row.on_gpu.name}: {_step(row.on_gpu, sizes_differ)}" for row in shown),
        "hours and dollars: estimated, expected values,",
        f"  with {plan.set_up.minutes:.3g} min of boot and set-up ({plan.set_up.basis});",
        f"  lost: dollars of the run lost to preemptions, assumed {assumed.spot_preemptions_per_hour:g} an hour "
        "(plan.spot_preemptions_per_hour)",
        "tokens/s:",
        *(f"  {source}" for source in sources),
        *_generators(plan),
    ]


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON; dollars per hour come from the catalog, hours and dollars of the run are estimated."""
    size = plan.size
    return {
        "prices": {"source": plan.catalog.source, "snapshot": plan.catalog.is_snapshot},
        "run": {
            "records": size.records,
            "mean_tokens": round(size.mean_tokens, 1),
            "steps": size.steps,
            "tokens": round(size.tokens),
            "basis": size.basis,
        },
        "evaluation": vars(plan.evaluation) if plan.evaluation else None,
        "ceilings": {key: getattr(plan.ceilings, key) for key in ("usd_per_hour", "run_usd", "hours")},
        "assumptions": vars(plan.assumptions),
        "set_up": vars(plan.set_up),
        "basis": {
            "usd_per_hour": f"catalog: {plan.catalog.source}",
            "memory_gib": "estimated",
            "hours": "estimated",
            "usd": "estimated",
            "tokens_per_second": "of each row: tokens_per_second_basis",
        },
        "rows": [_row_json(row) for row in plan.rows],
    }


def _row_json(row: Row) -> dict[str, Any]:
    on_gpu, offer, cost = row.on_gpu, row.offer, row.cost
    return {
        "gpu": on_gpu.gpu.name,
        "count": on_gpu.count,
        "spot": row.spot,
        "chosen": row.chosen,
        "refusals": list(row.refusals),
        "machine": MACHINES[on_gpu.name].machine,
        "region": offer.region if offer else None,
        "zone": offer.zone if offer else None,
        "usd_per_hour": round(offer.usd_per_hour, 5) if offer else None,
        "usd_per_hour_parts": _parts(offer) if offer else None,
        "price_anomalies": list(offer.anomalies) if offer else [],
        "passed_over": _passed_over(row, row.passed_over).strip() if row.passed_over else None,
        "memory_gib": {"needed": round(on_gpu.needed_gib, 2), "there": on_gpu.gpu.memory_gib, "fits": on_gpu.fits},
        "step": {"layers": "fused", **vars(on_gpu.micro_batch_config)}
        if on_gpu.micro_batch_config
        else {"layers": "hf"},
        "examples_per_step": on_gpu.batch_size,
        "tokens_per_second": round(on_gpu.speed.tokens_per_second, 1),
        "tokens_per_second_basis": on_gpu.speed.basis,
        "tokens_per_second_source": on_gpu.speed.source,
        "generation": vars(on_gpu.scoring.speed) if on_gpu.scoring else None,
        "score_hours": round(cost.score_hours, 4) if cost and on_gpu.scoring else None,
        "score_usd": round(cost.score_usd, 4) if cost and on_gpu.scoring else None,
        "hours": round(cost.hours, 3) if cost else None,
        "usd": round(cost.usd, 3) if cost else None,
        "preemptions": round(cost.preemptions, 4) if cost else None,
        "lost_usd": round(cost.lost_usd, 3) if cost else None,
    }


def _parts(offer: Offer) -> dict[str, float]:
    return {"host": offer.host_usd, "gpu": offer.gpu_usd, "disk": round(offer.disk_usd, 5)}
