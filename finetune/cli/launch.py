"""`finetune launch`: SkyPilot's own launch command, with the plan's table first and the ceilings in force."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cli.arguments import add_command, path
from finetune.errors import UserError
from finetune.runtime.commands import as_command
from finetune.runtime.installed import version
from finetune.stage_end.following import after_launch
from finetune.stage_end.tell import tell

if TYPE_CHECKING:
    from finetune.cloud.launch.command import Launch
    from finetune.cloud.plan.plan import Plan
    from finetune.config.schema import RunConfig
    from finetune.machine.price import Ceilings


def add(commands: Any) -> None:
    launch = add_command(
        commands,
        "launch",
        _launch,
        "`sky launch`, typed in any folder, under the ceilings of the task and with the plan's table first",
        "finetune launch sky/train_a100.yaml --env MAX_RUN_USD=5 --yes\n"
        "  finetune launch --jobs sky/train_spot.yaml --env RUN_NAME=my-run",
    )
    launch.add_argument(
        "--jobs", action="store_true", help="a managed job, which survives preemptions: `sky jobs launch`"
    )
    launch.add_argument("task", type=path, metavar="TASK", help="a task YAML, such as sky/train_a100.yaml")
    launch.add_argument(
        "options", nargs=argparse.REMAINDER, metavar="...", help="SkyPilot's own options, passed on as typed"
    )


def _launch(arguments: argparse.Namespace) -> int:
    from finetune.cloud.launch.command import launch_of
    from finetune.cloud.launch.our_job import check_variables

    launch = launch_of(arguments.task, arguments.options, managed=arguments.jobs)
    _renew(launch)
    following = [one.here() for one in after_launch(launch.cluster, managed=arguments.jobs)]
    os.chdir(launch.folder)  # only now: the paths in a config are relative to it, those of the next commands are not
    check_variables(launch.task)
    if launch.config is not None:
        try:
            print(_plan(launch))
        except UserError as error:  # the policy decides whether such a run may be launched
            print(f"no plan: {error}")
    if "--dryrun" not in arguments.options:
        tell("launch", _most(launch), following)
    print(f"in {launch.folder}: {as_command('sky', *launch.words[1:])}", flush=True)
    os.execv(launch.words[0], launch.words)


def _renew(launch: Launch) -> None:
    """After an upgrade, a project of `finetune init` still has the machine's side of the version before."""
    from finetune.project_folder import read_project, renew_machine_side

    project = read_project(launch.folder)
    if project is not None and (renewed := renew_machine_side(project)):
        more = f" and {len(renewed) - 1} more" if renewed[1:] else ""
        print(f"renewed for finetune {version()} as installed here: {launch.folder / renewed[0]}{more}")


def _most(launch: Launch) -> str:
    """What it can cost at most: SkyPilot's command takes this process's place, and cannot say at the end what it did cost."""
    try:
        limits = launch.ceilings
    except UserError:  # the policy refuses it, and says why
        return "nothing yet"
    texts = {
        "run_usd": f"${limits.run_usd:g} in all" if limits.run_usd is not None else "",
        "usd_per_hour": f"${limits.usd_per_hour:g}/h" if limits.usd_per_hour is not None else "",
    }
    by_default = [text for name, text in texts.items() if name in launch.defaults]
    given = f"by default: {', '.join(by_default)}" if by_default else "ceilings of the task"
    found = ", ".join(filter(None, texts.values()))
    return f"at most {found} ({given})" if found else "no ceiling"


def _plan(launch: Launch) -> str:
    from finetune.cloud.plan.table import render
    from finetune.config.load import load_config
    from finetune.runtime.overrides import split_overrides

    assert launch.config is not None
    overrides = split_overrides(launch.environment.get("OVERRIDES", ""))
    if launch.environment.get("SWEEP"):
        return _sweep_plan(launch, launch.config, overrides)
    config = load_config(launch.config, overrides)
    scored = launch.environment.get("EVALUATE") == "1"
    return render(_planned(launch, config, launch.ceilings, scored=scored), launch.environment["CONFIG"])


def _planned(launch: Launch, config: RunConfig, ceilings: Ceilings, *, scored: bool) -> Plan:
    """On the machines that the task may take, not on those of the config."""
    from finetune.cloud.catalog.offers import load_catalog
    from finetune.cloud.plan.plan import plan_run
    from finetune.machine.gpus import MACHINES

    allowed = {(one.name, one.spot) for one in launch.alternatives}
    names = {name for name, _ in allowed}
    if unknown := sorted(names - set(MACHINES)):
        raise UserError(f"{', '.join(unknown)}: a plan knows only {', '.join(MACHINES)}", code="launch.not_planned")
    if names:
        config = replace(config, plan=replace(config.plan, gpus=[name for name in MACHINES if name in names]))
    trusts = launch.environment.get("FINETUNE_TRUST_PRICES") == "1"
    plan = plan_run(config, load_catalog(), ceilings, trust_prices=trusts, scored=scored)
    rows = tuple(row for row in plan.rows if not allowed or (row.on_gpu.name, row.spot) in allowed)
    return replace(plan, rows=rows)


def _sweep_plan(launch: Launch, config: Path, overrides: list[str]) -> str:
    """The dollars and hours of all trials; each alone may cost as much as the budget allows all of them."""
    from finetune.cli.sweep import costs_of
    from finetune.cloud.plan.sweep import render_sweep
    from finetune.job.sweep import read_sweep

    wanted, _ = read_sweep(launch.environment, str(config), overrides, None)
    limits = replace(launch.ceilings, run_usd=None, hours=None)
    costs, trials = costs_of(wanted, lambda base: _planned(launch, base, limits, scored=False))
    return render_sweep(costs, trials, launch.ceilings.run_usd, "MAX_RUN_USD")
