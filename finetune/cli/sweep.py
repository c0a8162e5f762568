"""`finetune sweep`: many runs of one config under one budget, of which the worse ones are stopped early."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cli.arguments import add_command, add_json, path, positive, text, whole_above_0
from finetune.errors import EXIT_OK, UserError
from finetune.runtime.document import print_document

if TYPE_CHECKING:
    from finetune.cloud.plan.plan import Plan
    from finetune.cloud.plan.sweep import SweepCost
    from finetune.config.schema import RunConfig
    from finetune.report.sweep import SweepReport
    from finetune.sweep.open import Wanted
    from finetune.sweep.run import Outcome


def add(commands: Any) -> None:
    sweep = add_command(
        commands,
        "sweep",
        _sweep,
        "train many variants of a config under one budget, and stop the worse ones early",
        "finetune sweep configs/demo_cpu.yaml training.learning_rate=1e-4,2e-4 lora.r=8,16,32\n"
        "  finetune sweep configs/mistral_7b_qlora.yaml lora.r=8,16,32 --max-sweep-usd 20 --plan\n"
        "  finetune sweep configs/demo_cpu.yaml training.learning_rate=1e-5..1e-3 --search optuna --trials 12",
        continues=True,
    )
    sweep.description = (
        f"{sweep.description} Interrupted or stopped at its budget, the same command goes on. The trials are runs of their own; "
        "the table and the plot are in <runs>/sweeps/NAME/report."
    )
    add_sweep_arguments(sweep)
    add_json(sweep, "the table")
    sweep.add_argument(
        "--plan",
        action="store_true",
        help="only print what it would cost on one machine, and on several at once (estimated)",
    )


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=path, metavar="CONFIG")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE[,VALUE...]",
        help="what is varied; a key with one value is the same for all trials",
    )
    parser.add_argument(
        "--max-sweep-usd", type=positive, metavar="USD", help="ceiling in dollars, all trials and machines together"
    )
    parser.add_argument("--name", type=text, help="of the sweep; without it, CONFIG's name with -sweep")
    parser.add_argument(
        "--search", choices=("grid", "optuna"), default="grid", help="all combinations (the default), or optuna's TPE"
    )
    parser.add_argument("--trials", type=whole_above_0, metavar="N", help="with --search optuna: how many")
    parser.add_argument(
        "--eta", type=whole_above_0, default=2, metavar="N", help="at a comparison the best 1/N go on (default: 2)"
    )
    parser.add_argument(
        "--rungs", type=_rungs, default=2, metavar="N", help="comparisons before the end (default: 2; 0: none)"
    )
    parser.add_argument("--seed", type=_rungs, default=0, metavar="N", help="of the search (default: 0)")
    parser.add_argument(
        "--workers",
        type=whole_above_0,
        default=1,
        metavar="N",
        help="how many such commands share the budget at once (default: 1)",
    )


def wanted(arguments: argparse.Namespace) -> Wanted:
    from finetune.sweep.open import Wanted

    if arguments.eta < 2:
        raise UserError("--eta: expected 2 or more", code="cli.bad_value")
    if arguments.search == "grid" and arguments.trials:
        raise UserError(
            "--trials: a grid has its own number of trials; omit it, or use --search optuna",
            code="cli.conflicting_options",
        )
    if arguments.search == "optuna" and not arguments.trials:
        raise UserError("--search optuna: expected --trials N", code="cli.conflicting_options")
    return Wanted(
        config_file=arguments.config,
        words=list(arguments.overrides),
        name=arguments.name,
        search=arguments.search,
        trials=arguments.trials,
        seed=arguments.seed,
        eta=arguments.eta,
        rungs=arguments.rungs,
    )


def _sweep(arguments: argparse.Namespace) -> int:
    from finetune.runtime.console import broken_pipe_safe

    with broken_pipe_safe():
        return _plan(arguments) if arguments.plan else _train(arguments)


def _train(arguments: argparse.Namespace) -> int:
    from finetune.runtime.console import say
    from finetune.sweep.open import machine_of, open_sweep
    from finetune.sweep.programs import LocalTrainer
    from finetune.sweep.run import work_on
    from finetune.sweep.turn import Work
    from finetune.sweep.workers import Worker

    opened = open_sweep(wanted(arguments))
    machine = machine_of(opened.base, arguments.max_sweep_usd)
    opened.create()
    trainer = LocalTrainer()
    with Worker(opened.folder.path) as worker, trainer.on_signals():
        work = Work(
            opened.sweep,
            opened.folder,
            worker,
            machine,
            arguments.max_sweep_usd,
            arguments.workers,
            opened.settings_of,
            say,
        )
        outcome = work_on(work, trainer, lambda: trainer.interrupted)
    report = tell(opened.folder.path, outcome, "the same command", "--max-sweep-usd")
    if arguments.json:
        print_document(report.as_json() | {"ended": outcome.why, "detail": outcome.detail})
    return outcome.code


def tell(folder: Path, outcome: Outcome, same: str, budget: str) -> SweepReport:
    """Writes the report and prints how the sweep stands, and how it goes on. same: what goes on with it; budget: what sets its
    budget."""
    from finetune.report.sweep import write_sweep
    from finetune.runtime.console import visible

    report = write_sweep(folder)
    for line in report.lines:
        print(visible(line, one_line=True))
    ends = {
        "done": "the sweep is done",
        "budget": f"the budget ends the sweep: {outcome.detail}; {same} with a higher {budget} goes on",
        "others": f"nothing is left to do for this worker: {outcome.detail}",
        "limit": f"stopped at a limit of this machine: {outcome.detail}; {same} goes on",
    }
    print(ends.get(outcome.why, f"{outcome.detail or 'interrupted'}; {same} goes on"))
    print(f"report: {report.page}")
    return report


def _plan(arguments: argparse.Namespace) -> int:
    from finetune.cloud.catalog.offers import load_catalog
    from finetune.cloud.plan.plan import plan_run
    from finetune.cloud.plan.sweep import render_sweep, sweep_json
    from finetune.machine.price import Ceilings

    costs, trials = costs_of(wanted(arguments), lambda base: plan_run(base, load_catalog(), Ceilings(), scored=False))
    if arguments.json:
        print_document(sweep_json(costs, trials, arguments.max_sweep_usd))
    else:
        print(render_sweep(costs, trials, arguments.max_sweep_usd))
    return EXIT_OK


def costs_of(asked: Wanted, plan_of: Callable[[RunConfig], Plan]) -> tuple[list[SweepCost], int]:
    """By the number of machines; and how many trials there are. plan_of: the plan of one whole trial. Raises UserError."""
    from finetune.cloud.plan.sweep import sweep_costs
    from finetune.sweep.halving import quotas
    from finetune.sweep.open import choice_of, most_rungs

    choice = choice_of(asked)
    rungs = most_rungs(choice.trials, asked)
    shares = [asked.eta ** (rung - rungs) for rung in range(rungs)]
    allowed = quotas(choice.trials, asked.eta, rungs)
    return sweep_costs(plan_of(choice.space.base), allowed, shares), choice.trials


def _rungs(text: str) -> int:
    return 0 if text == "0" else whole_above_0(text)
