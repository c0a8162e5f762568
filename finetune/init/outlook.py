"""What lies ahead of a new project: whether its data can be prepared, and what the run would cost. Run in its folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from finetune.cloud.catalog.offers import load_catalog
from finetune.cloud.plan.plan import Plan, Row, plan_run
from finetune.config.load import load_config
from finetune.config.schema import RunConfig, SourceSection
from finetune.data.check import check
from finetune.data.limits import limits_of
from finetune.data.validate import LEFT_OUT
from finetune.errors import UserError
from finetune.init.config_text import CONFIG, Goal
from finetune.init.form import LEAST, rule_of_thumb
from finetune.init.origin import in_own_file
from finetune.machine.price import Ceilings
from finetune.runtime.installed import install_command
from finetune.stage_end.following import rounded_up

MARGIN = 3.0
"""The ceiling of a run is so much above its estimate: room for slower machines and preemptions, not for a mistake."""
LEAST_USD = 2.0
FAST = "H100"
SHOWN = 20
"""Rejected pairs that are listed; `finetune data check` lists all."""


@dataclass
class Outlook:
    """goal: the one that was asked for, unless the fast machine is no faster. figures: for the config's comment; "" without an
    estimate. run_usd: the ceiling of a run. rejected: how many pairs are. problems: why the data cannot be prepared yet.
    install_cloud, install_hub: commands for what is not installed here, else None."""

    goal: Goal
    figures: str = ""
    run_usd: float | None = None
    said: list[str] = field(default_factory=list)
    rejected: int = 0
    problems: list[str] = field(default_factory=list)
    install_cloud: str | None = None
    install_hub: str | None = None


def look_ahead(goal: Goal, *, checked: bool, places: Sequence[str] = (), folder: Path | None = None) -> Outlook:
    """places: where each record of PAIRS is in the user's own file, where faults are to be repaired. folder: where else files
    of the config may be, if the user has changed it.

    Raises UserError if there are too few usable pairs to split."""
    config = load_config(Path(CONFIG))
    if folder is not None:
        config.data.sources = [_found_in(folder, source) for source in config.data.sources]
    outlook = Outlook(
        goal,
        install_cloud=_install("sky", "cloud"),
        install_hub=_install("huggingface_hub", "train") or _install("datasets", "train"),
    )
    if checked:
        _check(config, outlook, places)
    try:
        plan = plan_run(config, load_catalog(), Ceilings(), ask_google=False)
    except UserError as error:
        outlook.said.append(f"no estimate: {error}")
        return outlook
    _estimate(plan, outlook)
    return outlook


def _found_in(folder: Path, source: SourceSection) -> SourceSection:
    """With the paths of what is only in the folder."""

    def found(path: str) -> str:
        return str(folder / path) if not Path(path).exists() and (folder / path).exists() else path

    databases = source.databases and found(source.databases)
    return replace(source, path=found(source.path), databases=databases)


def _check(config: RunConfig, outlook: Outlook, places: Sequence[str]) -> None:
    evaluation = config.evaluation
    findings = check(config.data, timeout_seconds=evaluation.timeout_seconds, limits=limits_of(evaluation))
    usable = sum(len(findings.records(split)) for split in findings.splits)
    rejected = [one for one in findings.rejections if one.reason != LEFT_OUT]
    outlook.rejected = len(rejected)
    if usable < LEAST and not rejected:
        raise UserError(
            f"--data: {usable} usable pairs, and fewer than {LEAST} cannot be split into train, val and test; {rule_of_thumb()}",
            code="init.too_few_pairs",
        )
    counts = ", ".join(f"{len(findings.records(split))} {split}" for split in findings.splits)
    outlook.said.append(f"usable: {counts}; {len(rejected)} rejected{':' if rejected else ''}")
    outlook.said += [f"  {in_own_file(str(one), places)}" for one in rejected[:SHOWN]]
    if len(rejected) > SHOWN:
        outlook.said.append(f"  and {len(rejected) - SHOWN} more")
    problems = [*findings.problems, *(str(one) for one in findings.hollow_databases())]
    outlook.problems = [in_own_file(one, places) for one in problems]
    outlook.said += [f"PROBLEM: {one}" for one in outlook.problems]


def _estimate(plan: Plan, outlook: Outlook) -> None:
    rows = [row for row in plan.rows if row.chosen and row.cost and row.offer]
    if not rows:
        outlook.said.append("no estimate: the plan refuses every machine (`finetune plan` says why)")
        return
    cheapest = rows[0]
    fast = next((row for row in rows if row.on_gpu.name == FAST), None)
    used = fast if outlook.goal == "fast" and fast else cheapest
    if used is fast and fast is not cheapest and _hours(fast) >= _hours(cheapest):
        outlook.goal, used = "cheap", cheapest
        outlook.said.append(
            f"for so few pairs the {FAST} would be no faster than the {cheapest.on_gpu.name} (estimated), so --goal fast has the "
            "task of cheap"
        )
    lines = [f"Estimated for this data (prices: {plan.catalog.source}; hours and dollars: estimated):"]
    others = [fast] if fast and fast is not cheapest else []
    lines += [f"  {_row(row)}{f' <- --goal {outlook.goal}' if row is used else ''}" for row in [cheapest, *others]]
    assert used.cost is not None
    outlook.run_usd = rounded_up(max(LEAST_USD, MARGIN * used.cost.usd))
    lines.append(
        f"MAX_RUN_USD in the task is {outlook.run_usd:g}: {MARGIN:g} times the estimate, and at least {LEAST_USD:g}."
    )
    outlook.figures = "\n".join(lines)
    outlook.said += lines


def _hours(row: Row) -> float:
    """As they are shown."""
    assert row.cost is not None
    return round(row.cost.hours, 1)


def _row(row: Row) -> str:
    assert row.cost is not None
    kind = "spot" if row.spot else "on-demand"
    return f"{row.on_gpu.name} {kind}: ${row.cost.usd:.2f} and {row.cost.hours:.1f} h for the run"


def _install(module: str, extra: str) -> str | None:
    return None if importlib.util.find_spec(module) is not None else install_command(extra)
