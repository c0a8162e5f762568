"""`finetune evaluate`: scores of a run's model and of its base model."""

from __future__ import annotations

import argparse
from typing import Any

from finetune.cli.arguments import OVERRIDES, add_command, large_imports, loaded, path
from finetune.errors import EXIT_OK, UserError


def add(commands: Any) -> None:
    evaluate = add_command(
        commands,
        "evaluate",
        _evaluate,
        "score a run's model and its base model by executing their SQL",
        "finetune evaluate runs/demo\n  finetune evaluate configs/demo_cpu.yaml   (the base model alone)",
    )
    evaluate.add_argument(
        "target", type=path, metavar="RUN|CONFIG", help="a run folder, or a config for the base model"
    )
    evaluate.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="with a config: " + OVERRIDES)
    evaluate.add_argument("--no-base", action="store_true", help="do not score the base model")


def _evaluate(arguments: argparse.Namespace) -> int:
    if arguments.target.is_dir():
        if arguments.overrides:
            raise UserError(
                "a run is evaluated with the config in its folder; use overrides with a config file only",
                code="cli.conflicting_options",
            )
        from finetune.run_folder import open_run

        run = open_run(arguments.target)
        with large_imports():
            from finetune.evaluation.run import evaluate_run

        scores = evaluate_run(run, base=not arguments.no_base)["models"]
    else:
        if arguments.no_base:
            raise UserError(
                "--no-base needs a run folder; with a config only the base model is scored",
                code="cli.conflicting_options",
            )
        if not arguments.target.exists():
            raise UserError(f"{arguments.target}: no such run folder or config file", code="run.not_found")
        config = loaded(arguments, arguments.target)
        with large_imports():
            from finetune.evaluation.run import evaluate_base

        scores = {"base": evaluate_base(config)}
    for name, result in scores.items():
        low, high = result["execution_accuracy_interval95"]
        right = f"{result['correct']} of {result['questions']}, 95% interval {low:.1%} to {high:.1%}"
        print(f"{name:>6}: execution accuracy {result['execution_accuracy']:.1%} ({right}), "
              f"valid SQL {result['valid_sql_rate']:.1%}")  # fmt: skip
    return EXIT_OK
