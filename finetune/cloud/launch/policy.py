"""The admin policy that SkyPilot applies to every launch typed in this folder (.sky.yaml names it): enforces the price ceiling.

SkyPilot 0.14 compares `max_hourly_cost` with the GPU's price alone and ignores it if no machine is left; on fail-over it does not
check prices again. So the policy replaces the resources of a task by an explicit `ordered` list of machines whose whole price is
known, best first, and rejects the task if the list is empty.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import sky
from sky import exceptions

from finetune.cloud.catalog.disks import disk_usd_per_hour
from finetune.cloud.catalog.offers import Catalog
from finetune.cloud.catalog.refresh import catalog_for_launch
from finetune.cloud.launch import candidates
from finetune.cloud.launch.bucket import fill_bucket
from finetune.cloud.launch.candidates import Candidate, CandidateGroup
from finetune.cloud.launch.sky_resources import (
    AUTOSTOP,
    asks_for_gpu_on_gcp,
    check_priceable,
    machine_requirements,
    pin_to_cluster,
    pinned,
    stops_by_itself,
)
from finetune.cloud.plan.plan import OnGpu, run_on
from finetune.cloud.plan.workload import run_size
from finetune.config.load import load_config
from finetune.config.schema import PlanSection
from finetune.errors import NotEstimated, UserError
from finetune.machine.gpus import GPUS
from finetune.machine.price import VARIABLE
from finetune.runtime.console import escape_unprintable
from finetune.runtime.files import unix_line_ends_command, with_carriage_returns

CONFIG, OVERRIDES, BUDGET, HOURS, TRUST = "CONFIG", "OVERRIDES", "MAX_RUN_USD", "MAX_HOURS", "FINETUNE_TRUST_PRICES"
"""Environment variables of our task YAMLs."""
DEFAULT_RUN_USD = 25.0
SHOWN = 12
CONTROLLER = ("n2-standard-4", 50)
"""Machine and disk (GB) that SkyPilot 0.14 takes for its jobs controller unless jobs.controller.resources says otherwise."""


class CostPolicy(sky.AdminPolicy):  # type: ignore[misc]
    """See the module. Rejects with `UserRequestRejectedByPolicy`; SkyPilot then launches nothing."""

    @classmethod
    def validate_and_mutate(cls, user_request: sky.UserRequest) -> sky.MutatedUserRequest:
        task = user_request.task
        say = print if user_request.at_client_side else _silent
        try:
            if user_request.at_client_side:
                escape_unprintable()
                _check_scripts(task)
            if asks_for_gpu_on_gcp(task):
                _apply(user_request, say)
            fill_bucket(task, say)
            _fill_secrets(task)
        except UserError as error:
            raise exceptions.UserRequestRejectedByPolicy(f"finetune: {error}") from None
        return sky.MutatedUserRequest(task, user_request.skypilot_config)


def _silent(*_: object) -> None:
    """For the API server, where the user does not see the output."""


def _check_scripts(task: sky.Task) -> None:
    """Raises UserError for Windows line ends, on which bash would fail on the cloud machine, in the scripts of `workdir` that the
    task names, and in those beside them."""
    if not isinstance(task.workdir, str):
        return
    workdir = Path(task.workdir).expanduser()
    commands = "\n".join(part for part in (task.setup, task.run) if isinstance(part, str))
    named = [workdir / word for word in re.findall(r"[\w./-]+\.sh\b", commands)]
    scripts = {path for folder in {one.parent for one in named if one.is_file()} for path in folder.glob("*.sh")}
    if bad := with_carriage_returns(sorted(scripts)):
        names = [path.relative_to(workdir) for path in bad]
        raise UserError(
            f"{', '.join(map(str, names))}: Windows line ends (CR LF), on which bash fails on the machine; fix them in "
            f"{workdir} with {unix_line_ends_command(names)}",
            code="launch.windows_line_ends",
        )


def _apply(request: sky.UserRequest, say: Any) -> None:
    task = request.task
    name = request.request_name.value
    check_priceable(task)
    if HOURS in task.envs:
        _positive(HOURS, task.envs[HOURS], "hours")
    exists = pin_to_cluster(request)
    budget = _run_budget(task, say)
    catalog = catalog_for_launch(say)
    requirements = machine_requirements(task, catalog)
    on_gpus, plan = _run(task, {one.gpu for one in requirements}, say)
    trusts = task.envs.get(TRUST) == "1"
    found = candidates.list_candidates(catalog, requirements, on_gpus, plan, trust_prices=trusts)
    if (
        VARIABLE in task.envs
    ):  # the client has applied this policy already; the server, on another machine, only checks again
        found = [replace(candidate, given=candidate.requirement.place) for candidate in found]
    groups = candidates.shorten(candidates.groups(found))
    runs_where_it_is = name == "exec"  # on an existing machine: nothing to choose or to refuse
    if groups:
        table = candidates.price_table(groups, catalog.source)
        task.update_envs({VARIABLE: json.dumps(table, separators=(",", ":"))})
    elif not runs_where_it_is:
        raise UserError(candidates.refusal_message(found, catalog.source), code="launch.all_refused")
    if runs_where_it_is:
        return
    managed = request.request_options is None or name.startswith("jobs.")
    if not managed and not all(stops_by_itself(resources) for resources in task.resources):
        say(
            "finetune: no autostop in resources: the machine is terminated after {idle_minutes} idle minutes".format(
                **AUTOSTOP
            )
        )
    task.set_resources(pinned(task, groups, catalog, managed, by_size=not exists))
    _report(groups, found, catalog, budget, say)
    if managed:
        _warn_of_controller(request, catalog, say)


def _run_budget(task: sky.Task, say: Any) -> float:
    """The budget of the run in US dollars; the default is added to the task if it names none."""
    text = task.envs.get(BUDGET)
    if text is None:
        task.update_envs({BUDGET: f"{DEFAULT_RUN_USD:g}"})
        say(f"finetune: no {BUDGET} in envs: the run gets a budget of ${DEFAULT_RUN_USD:g}")
        return DEFAULT_RUN_USD
    return _positive(BUDGET, text, "US dollars")


def _positive(name: str, text: str, unit: str) -> float:
    """Parsed as in finetune/job/settings.py, which would otherwise refuse the number on a machine that is already billed."""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text, re.ASCII) or not float(text) > 0:
        raise UserError(
            f"envs.{name}: expected a positive number of {unit}, found {text!r}; write it like 25 or 0.5",
            code="launch.bad_value",
        )
    return float(text)


def _run(task: sky.Task, names: set[str], say: Any) -> tuple[dict[str, OnGpu], PlanSection]:
    """Memory, speed and hours of the task's run on each GPU; empty if the task names no config of ours."""
    named = task.envs.get(CONFIG)
    if not named or (VARIABLE in task.envs and not Path(named).is_file()):  # the latter: on a server on another machine
        return {}, PlanSection()
    config = load_config(Path(named), task.envs.get(OVERRIDES, "").split())
    if not names <= set(GPUS):
        say(
            f"finetune: no speed is known for {', '.join(sorted(names - set(GPUS)))}: machines are ranked by price alone"
        )
        return {}, config.plan
    try:
        size = run_size(config)
        return {name: run_on(config, size, GPUS[name]) for name in names}, config.plan
    except NotEstimated as error:
        say(f"finetune: WARNING: {error}; so machines are ranked by price alone, and the run's memory is not checked")
        return {}, config.plan


def _report(groups: list[CandidateGroup], found: list[Candidate], catalog: Catalog, budget: float, say: Any) -> None:
    zones = sum(len(group.candidates) for group in groups)
    allowed = sum(not candidate.refusal for candidate in found)
    say(
        f"finetune: of {len(found)} offers (GPU, zone, spot or on-demand) {allowed} are allowed; SkyPilot tries {zones}:"
    )
    say(candidates.table(groups, SHOWN))
    say(f"finetune: $/h: whole machine, {catalog.source}; hours and dollars of the run: estimated")
    dropped = Counter(f"{c.name}, {c.refusal.split(':')[0]}" for c in found if c.refusal)
    for reason, count in dropped.items():
        say(f"finetune: not allowed: {count} zone{'s' * (count > 1)} of {reason}")
    best = groups[0].best
    if any(group.best.requirement.ceiling is None for group in groups):
        say("finetune: WARNING: no max_hourly_cost in resources: this launch has no ceiling on the hourly price")
    if best.cost and best.cost.usd > budget:
        say(
            f"finetune: WARNING: the run is estimated at ${best.cost.usd:.2f}, above its budget of ${budget:g} ({BUDGET}): "
            f"it would stop at the budget, with a checkpoint"
        )


def _warn_of_controller(request: sky.UserRequest, catalog: Catalog, say: Any) -> None:
    """A managed job needs a controller: a separate machine, unless it runs in the API server."""
    settings = request.skypilot_config
    if settings.get_nested(("jobs", "controller", "consolidation_mode"), False):
        return
    machine, disk = CONTROLLER
    host = catalog.cpu_machine_usd(machine)
    if settings.get_nested(("jobs", "controller", "resources"), None):
        what = "as set in jobs.controller.resources, at its price"
    elif host is None:
        what = f"{machine}, which has no price in the catalog"
    else:
        what = f"{machine}, from ${host + disk_usd_per_hour(disk, 'medium', ''):.3f}/h (catalog, its cheapest region)"
    say(
        f"finetune: WARNING: a managed job starts a controller machine unless one is already running: {what}; to run it "
        f"on this computer free of charge, put `jobs: {{controller: {{consolidation_mode: true}}}}` into ~/.sky/config.yaml"
    )


def _fill_secrets(task: sky.Task) -> None:
    """Fills empty secrets of the task from the environment of the user who types the command."""
    empty = {
        name: os.environ[name]
        for name, value in task.secrets.items()
        if not value.get_secret_value() and os.environ.get(name)
    }
    if empty:
        task.update_secrets(empty)
