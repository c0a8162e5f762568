"""`finetune plan`: what the run would cost on each GPU."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING, Any

from finetune.cli.arguments import OVERRIDES, add_command, add_json, loaded, path, positive
from finetune.errors import EXIT_OK, UserError
from finetune.runtime.document import print_document
from finetune.stage_end.following import after_plain_plan, after_plan, after_written_plan
from finetune.stage_end.tell import Next, cost_of_command, tell

if TYPE_CHECKING:
    from finetune.cloud.plan.plan import Plan
    from finetune.cloud.plan.task_yaml import TaskSettings
    from finetune.config.schema import RunConfig
    from finetune.machine.price import Ceilings


def add(commands: Any) -> None:
    plan = add_command(
        commands,
        "plan",
        _plan,
        "what the run would cost on each GPU: memory, hours, dollars, and the order of choice",
        "finetune plan configs/mistral_7b_qlora.yaml --max-run-usd 20\n"
        "  finetune plan configs/mistral_7b_qlora.yaml --memory",
    )
    plan.add_argument("config", type=path, metavar="CONFIG")
    plan.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    plan.add_argument(
        "--max-run-usd", type=positive, metavar="USD", help="ceiling for the whole run (default: budget.max_run_usd)"
    )
    plan.add_argument("--max-hourly-usd", type=positive, metavar="USD", help="ceiling for the machine per hour")
    plan.add_argument(
        "--max-hours", type=positive, metavar="HOURS", help="ceiling for the run (default: budget.max_hours)"
    )
    kinds = plan.add_mutually_exclusive_group()
    kinds.add_argument("--spot", dest="spot", action="store_const", const=True, help="spot machines only")
    kinds.add_argument("--on-demand", dest="spot", action="store_const", const=False, help="on-demand machines only")
    kinds.add_argument("--both", dest="spot", action="store_const", const=None, help="both (the default)")
    plan.add_argument(
        "--no-score", action="store_true", help="without the score with which a run ends (EVALUATE=0 in a task)"
    )
    plan.add_argument("--trust-prices", action="store_true", help="also accept offers with a price anomaly")
    plan.add_argument(
        "--flex",
        action="store_true",
        help="also what it would cost with flex-start, which SkyPilot's catalog has no price for",
    )
    plan.add_argument("--memory", action="store_true", help="print the parts of the GPU memory for each GPU instead")
    plan.add_argument(
        "--write",
        type=path,
        metavar="TASK",
        help="write the order into this task YAML, such as sky/train_cheapest.yaml, under the ceilings that it has",
    )
    add_json(plan, "the plan, or with --memory its table,")


def _plan(arguments: argparse.Namespace) -> int:
    config = loaded(arguments)
    if arguments.memory:
        if arguments.write or arguments.flex:
            raise UserError("--memory: prints its own table; omit --write and --flex", code="cli.conflicting_options")
        from finetune.estimate.memory_table import memory_json, memory_table

        if arguments.json:
            print_document(memory_json(config, config.plan.gpus))
        else:
            print(memory_table(config, config.plan.gpus))
        tell("plan", cost_of_command(), [Next(tuple(_words(arguments)), "hours and dollars")])
        return EXIT_OK
    from finetune.cloud.catalog.offers import load_catalog
    from finetune.cloud.plan.flex import flex_json, render_flex
    from finetune.cloud.plan.plan import plan_run
    from finetune.cloud.plan.table import render, to_json
    from finetune.cloud.plan.task_yaml import settings_of, write_order

    task = settings_of(arguments.write) if arguments.write else None
    if task is not None:
        _take_settings(arguments, task)
    plan = plan_run(
        config,
        load_catalog(),
        _ceilings(arguments, config),
        spot=arguments.spot,
        trust_prices=arguments.trust_prices,
        scored=not arguments.no_score,
        ask_google=True,
    )
    if arguments.json:
        flex = {"flex": flex_json(plan)} if arguments.flex else {}
        print_document(to_json(plan) | flex)
    else:
        print("\n\n".join([render(plan, str(arguments.config)), *([render_flex(plan)] if arguments.flex else [])]))
    if arguments.write:
        write_order(plan, arguments.write, _typed(arguments))
        if not arguments.json:
            print(f"written: {arguments.write}")
    tell("plan", cost_of_command(), _following(plan, arguments, task))
    return EXIT_OK


def _take_settings(arguments: argparse.Namespace, task: TaskSettings) -> None:
    """The task's ceilings where none is typed: an order with machines above them would promise what no launch may do. And its
    EVALUATE=0."""
    arguments.max_run_usd = arguments.max_run_usd or task.ceilings.run_usd
    arguments.max_hourly_usd = arguments.max_hourly_usd or task.ceilings.usd_per_hour
    arguments.max_hours = arguments.max_hours or task.ceilings.hours
    arguments.no_score = arguments.no_score or task.evaluate == "0"


def _following(plan: Plan, arguments: argparse.Namespace, task: TaskSettings | None) -> list[Next]:
    chosen = [row for row in plan.rows if row.chosen]
    if task is not None:
        return _launch_of_written(arguments, task, spot=chosen[0].spot)
    costs = [
        row.cost for row in plan.rows if row.cost and row.on_gpu.possible and not (row.offer and row.offer.anomalies)
    ]
    cheapest = min(((cost.usd, cost.hours) for cost in costs), default=None)
    if chosen and _words(arguments) == _plain_words(arguments):
        return after_plain_plan(arguments.config, arguments.overrides)
    return after_plan(_words(arguments), cheapest, fits=bool(chosen), most_hours=plan.ceilings.hours)


def _launch_of_written(arguments: argparse.Namespace, task: TaskSettings, *, spot: bool) -> list[Next]:
    from finetune.machine.price import Ceilings

    scored, hourly = not arguments.no_score, arguments.max_hourly_usd
    wanted = Ceilings(run_usd=arguments.max_run_usd, hours=arguments.max_hours)
    return after_written_plan(
        arguments.write,
        arguments.config,
        arguments.overrides,
        variables=task.variables_for(wanted, scored=scored, trusts=arguments.trust_prices),
        managed=spot and task.recovers,
        scored=scored,
        usd_per_hour=hourly if hourly != task.ceilings.usd_per_hour else None,
    )


def _typed(arguments: argparse.Namespace) -> str:
    """The command that produces this plan, in one line."""
    return " ".join(shlex.join(_words(arguments)).split())


def _plain_words(arguments: argparse.Namespace) -> list[str]:
    return ["finetune", "plan", str(arguments.config), *arguments.overrides]


def _words(arguments: argparse.Namespace) -> list[str]:
    words = _plain_words(arguments)
    for name in ("max_run_usd", "max_hourly_usd", "max_hours"):
        if (value := getattr(arguments, name)) is not None:
            words += [f"--{name.replace('_', '-')}", f"{value:g}"]
    if arguments.spot is not None:
        words.append("--spot" if arguments.spot else "--on-demand")
    if arguments.no_score:
        words.append("--no-score")
    if arguments.trust_prices:
        words.append("--trust-prices")
    return words


def _ceilings(arguments: argparse.Namespace, config: RunConfig) -> Ceilings:
    from finetune.machine.price import Ceilings

    return Ceilings(
        usd_per_hour=arguments.max_hourly_usd,
        run_usd=arguments.max_run_usd or config.budget.max_run_usd,
        hours=arguments.max_hours or config.budget.max_hours,
    )
