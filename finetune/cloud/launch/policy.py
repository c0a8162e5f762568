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

from finetune.cloud.catalog.offers import Catalog
from finetune.cloud.catalog.refresh import catalog_for_launch, newest_catalog
from finetune.cloud.launch import candidates
from finetune.cloud.launch.bucket import fill_bucket, holds
from finetune.cloud.launch.candidates import Candidate, CandidateGroup
from finetune.cloud.launch.controller import settings_to_copy, warn_of_controller
from finetune.cloud.launch.least_budget import refuse_small_budgets, starts_of
from finetune.cloud.launch.our_job import SWEEP, TRAIN, check_variables, job_of
from finetune.cloud.launch.sky_resources import (
    BUDGET,
    asks_for_gpu_on_gcp,
    autostop_changes,
    check_priceable,
    machine_requirements,
    machines_at_once,
    pin_to_cluster,
    pinned,
    refuse_ceilings,
)
from finetune.cloud.launch.task_file import DEFAULT_CEILING_USD, DEFAULT_RUN_USD, refuse_task_as_command
from finetune.cloud.launch.travel import (
    check_config_travels,
    check_databases_travel,
    check_inputs_travel,
    check_program_travels,
    check_scripts_travel,
    check_trackers_travel,
    luggage_of,
)
from finetune.cloud.plan.on_gpu import OnGpu, run_on
from finetune.cloud.plan.set_up import ASSUMED, with_set_up
from finetune.cloud.plan.workload import evaluation_size, run_size
from finetune.config.load import data_key, gpus_that_agree, load_config
from finetune.config.schema import PlanSection, RunConfig
from finetune.errors import LONGEST_LIST, NotEstimated, UserError
from finetune.machine.gpus import GPUS
from finetune.machine.price import LARGEST_LIMIT, VARIABLE, parse_limit
from finetune.runtime.console import escape_unprintable
from finetune.runtime.files import unix_line_ends_command, with_carriage_returns
from finetune.runtime.overrides import split_overrides

CONFIG, OVERRIDES, HOURS, TRUST = "CONFIG", "OVERRIDES", "MAX_HOURS", "FINETUNE_TRUST_PRICES"
EVALUATE, DAILY, DATABASES = "EVALUATE", "MAX_USD_PER_DAY", "DATABASES"
"""Environment variables of our task YAMLs."""
SETTINGS = {CONFIG, OVERRIDES, HOURS, TRUST, EVALUATE, DAILY, DATABASES, BUDGET, "RUN_NAME", "BUCKET", "VLLM_MINUTES"}
"""Of these, and of the names that begin with SWEEP, what is in envs counts."""
SHOWN = 12


class CostPolicy(sky.AdminPolicy):  # type: ignore[misc]
    """See the module. Rejects with `UserRequestRejectedByPolicy`; SkyPilot then launches nothing."""

    @classmethod
    def validate_and_mutate(cls, user_request: sky.UserRequest) -> sky.MutatedUserRequest:
        task = user_request.task
        say = print if user_request.at_client_side else _silent
        try:
            if user_request.at_client_side:
                escape_unprintable()
                refuse_task_as_command(task.run)
                _check_scripts(task)
            _settings_in_envs(task)
            # a controller has no working directory
            on_laptop = user_request.at_client_side and VARIABLE not in task.envs
            if on_laptop:
                check_variables(task)  # before the login is asked for
            fill_bucket(task, say)
            if on_laptop:
                _check_travels(task, say)
            if asks_for_gpu_on_gcp(task):
                _apply(user_request, say)
            else:
                refuse_ceilings(task)
            _fill_secrets(task, say)
        except UserError as error:
            raise exceptions.UserRequestRejectedByPolicy(f"finetune: {error}") from None
        return sky.MutatedUserRequest(task, settings_to_copy(user_request))


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


def _check_travels(task: sky.Task, say: Any) -> None:
    """Raises UserError for what the job would miss on the machine. A run that the bucket has already needs only the scripts."""
    luggage = luggage_of(task)
    check_scripts_travel(task, luggage)
    check_program_travels(luggage, say)
    check_databases_travel(task.envs.get(DATABASES, ""), luggage)
    named, bucket, run = (task.envs.get(name, "") for name in (CONFIG, "BUCKET", "RUN_NAME"))
    if not named or (run and holds(bucket, f"runs/{run}/run.json")):
        return
    check_config_travels(named, luggage)
    if luggage.from_git and not Path(named).is_file():
        return
    config = _config_of(task)
    check_trackers_travel(config.tracking, {name: _secret(task, name) for name in task.secrets})
    check_inputs_travel(task, config, luggage, lambda: holds(bucket, f"data/by-config/{data_key(config)}"))


def _config_of(task: sky.Task) -> RunConfig:
    """The config as the job will read it, in workdir."""
    folder = Path(task.workdir).expanduser() if isinstance(task.workdir, str) else Path()
    return load_config(folder / task.envs[CONFIG], split_overrides(task.envs.get(OVERRIDES, "")))


def _apply(request: sky.UserRequest, say: Any) -> None:
    task = request.task
    name = request.request_name.value
    check_priceable(task)
    for limit, unit in ((HOURS, "hours"), (DAILY, "US dollars")):
        if limit in task.envs:
            _positive(limit, task.envs[limit], unit)
    if task.envs.get(EVALUATE) not in (None, "", "0", "1"):
        raise UserError(
            f"envs.{EVALUATE}: expected 1 or 0, found {task.envs[EVALUATE][:40]!r}", code="launch.bad_value"
        )
    exists = pin_to_cluster(request)
    budget = _run_budget(task, say)
    placing = VARIABLE in task.envs  # a job that was launched before, to be placed, perhaps again, days later
    catalog = newest_catalog(say) if placing else catalog_for_launch(say)
    machines = machines_at_once(task, updating=name == "serve.update")
    requirements = machine_requirements(task, catalog, machines, say)
    on_gpus, plan, config = _run(task, {(one.gpu, one.count) for one in requirements}, say)
    trusts = task.envs.get(TRUST) == "1"
    if any(resources.max_hourly_cost is None for resources in task.resources):
        say(
            f"finetune: no max_hourly_cost in resources: the ceiling is ${DEFAULT_CEILING_USD:g}/h for all machines of the task"
        )
    found = candidates.list_candidates(catalog, requirements, on_gpus, plan, trust_prices=trusts)
    if placing:  # the client has applied this policy already; the server, on another machine, only checks again
        found = [replace(candidate, given=candidate.requirement.place) for candidate in found]
    runs_where_it_is = name == "exec"  # on an existing machine: nothing to choose or to refuse
    begins = not (placing or exists or runs_where_it_is)  # on a machine whose boot and set-up it pays
    if begins:
        found = _with_budgets(task, found, budget, plan, config)
    groups = candidates.shorten(candidates.groups(found))
    if groups:
        table = candidates.price_table(groups, catalog.source, trust_prices=trusts)
        task.update_envs({VARIABLE: json.dumps(table, separators=(",", ":"))})
    elif not runs_where_it_is:
        raise UserError(
            candidates.refusal_message(found, catalog.source), code="launch.all_refused", longest=LONGEST_LIST
        )
    if runs_where_it_is:
        return
    managed = request.request_options is None or name.startswith("jobs.")
    if not managed:
        for change in sorted({autostop_changes(resources) for resources in task.resources} - {""}):
            say(f"finetune: {change}")
    task.set_resources(pinned(task, groups, catalog, managed, by_size=not exists))
    _report(groups, found, catalog, budget, say, saves=begins and job_of(task) in (TRAIN, SWEEP))
    if managed:
        warn_of_controller(request, catalog, say)


def _run_budget(task: sky.Task, say: Any) -> float:
    """The budget of the run in US dollars; the default is added to the task if it names none."""
    text = task.envs.get(BUDGET)
    if text is None:
        task.update_envs({BUDGET: f"{DEFAULT_RUN_USD:g}"})
        say(f"finetune: no {BUDGET} in envs: the run gets a budget of ${DEFAULT_RUN_USD:g}")
        return DEFAULT_RUN_USD
    return _positive(BUDGET, text, "US dollars")


def _with_budgets(
    task: sky.Task, found: list[Candidate], budget: float, plan: PlanSection, config: RunConfig | None
) -> list[Candidate]:
    """The candidates, without those on which the task's job would end before it has begun."""
    day = parse_limit(task.envs.get(DAILY, ""))
    daily, minutes = None if day is None else float(day), plan.setup_minutes
    set_up = ASSUMED.minutes if minutes is None else minutes

    def checked(config: RunConfig | None) -> list[Candidate]:
        return refuse_small_budgets(found, starts_of(job_of(task), budget, daily, set_up, config))

    refused = checked(config)
    return checked(None) if refused != found and _is_begun(task) else refused


def _is_begun(task: sky.Task) -> bool:
    """Whether the bucket has the task's run or sweep already."""
    run, bucket = task.envs.get("RUN_NAME"), task.envs.get("BUCKET", "")
    record = "runs/sweeps/{}/sweep.json" if job_of(task) == SWEEP else "runs/{}/run.json"
    return bool(run) and holds(bucket, record.format(run))


def _positive(name: str, text: str, unit: str) -> float:
    """Parsed as in finetune/job/settings.py, which would otherwise refuse the number on a machine that is already billed."""
    number = parse_limit(text)
    if number is None:
        raise UserError(
            f"envs.{name}: expected a positive number of {unit} up to {LARGEST_LIMIT:,}, found {text[:40]!r}; write it like 25 "
            "or 0.5",
            code="launch.bad_value",
        )
    return float(number)


def _run(
    task: sky.Task, asked: set[tuple[str, int]], say: Any
) -> tuple[dict[str, OnGpu], PlanSection, RunConfig | None]:
    """Memory, speed and hours of the task's run on each (GPU, count), what was assumed, and its config; empty and None if the
    task names no config of ours."""
    named = task.envs.get(CONFIG)
    elsewhere = VARIABLE in task.envs or isinstance(task.workdir, dict)  # on the server's machine; in a git repository
    if not named or (elsewhere and not Path(named).is_file()):
        return {}, PlanSection(), None
    config = _config_of(task)
    plan, _ = with_set_up(config, ask_google=False)
    if unknown := sorted({gpu for gpu, _ in asked} - set(GPUS)):
        say(f"finetune: no speed is known for {', '.join(unknown)}: machines are ranked by price alone")
        return {}, plan, config
    try:
        nodes = task.num_nodes
        size = run_size(config, gpus_that_agree(config.training, (count * nodes for _, count in asked)))
        evaluation = evaluation_size(config) if task.envs.get(EVALUATE) == "1" else None
        found = [run_on(config, size, GPUS[gpu], evaluation, count, nodes) for gpu, count in asked]
        return {one.name: one for one in found}, plan, config
    except NotEstimated as error:
        say(f"finetune: WARNING: {error}; so machines are ranked by price alone, and the run's memory is not checked")
        return {}, plan, config


def _report(
    groups: list[CandidateGroup], found: list[Candidate], catalog: Catalog, budget: float, say: Any, *, saves: bool
) -> None:
    """saves: whether it is known to reach a checkpoint within its budget."""
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
    if best.cost and best.cost.usd > budget:
        say(
            f"finetune: WARNING: the run is estimated at ${best.cost.usd:.2f}, above its budget of ${budget:g} ({BUDGET}): "
            f"it would stop at the budget{', with a checkpoint' if saves else ''}"
        )


def _settings_in_envs(task: sky.Task) -> None:
    """Takes our settings out of the task's secrets. SkyPilot makes each value of --env-file a secret too, which would win over
    --env, and over what this policy writes into envs."""
    for name in [name for name in task.secrets if name in SETTINGS or name.startswith("SWEEP")]:
        task.envs.setdefault(name, task.secrets.pop(name).get_secret_value())


def _secret(task: sky.Task, name: str) -> str:
    """Of the task, else what was typed with --env, else from the environment of the user who types the command."""
    return task.secrets[name].get_secret_value() or task.envs.get(name, "") or os.environ.get(name, "")


def _fill_secrets(task: sky.Task, say: Any) -> None:
    """Fills empty secrets of the task, and takes them out of its envs: SkyPilot would send the empty secret, not the value of
    --env, and shows envs in its dashboard and in the files that it keeps."""
    filled = {name: _secret(task, name) for name, value in task.secrets.items() if not value.get_secret_value()}
    if given := {name: value for name, value in filled.items() if value}:
        task.update_secrets(given)
    typed = {name: value for name in task.secrets if (value := task.envs.pop(name, ""))}
    if taken := [name for name in typed if name in filled]:
        say(f"finetune: {', '.join(taken)}: taken from envs as a secret; type --secret NAME=VALUE, not --env")
    if ignored := [name for name, value in typed.items() if value != _secret(task, name)]:  # the same: of --env-file
        say(f"finetune: {', '.join(ignored)}: in envs and in secrets, of which the secret is used")
