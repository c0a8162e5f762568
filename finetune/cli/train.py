"""`finetune train`: starts a run, or resumes one."""

from __future__ import annotations

import argparse
import math
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from finetune.cli.arguments import OVERRIDES, add_command, large_imports, loaded, opened, path, whole_above_0
from finetune.errors import UserError, shown
from finetune.stage_end.following import after_training
from finetune.stage_end.tell import cost_of_account, cost_of_command, tell

if TYPE_CHECKING:
    from finetune.run_folder import RunFolder


def add(commands: Any) -> None:
    train = add_command(
        commands,
        "train",
        _train,
        "fine-tune the model of a config",
        "finetune train configs/demo_cpu.yaml training.num_train_epochs=1\n  finetune train --resume runs/demo\n"
        "  finetune train --resume runs/demo --max-run-usd 20",
        continues=True,
    )
    train.add_argument("--resume", action="store_true", help="resume the run whose folder is given instead of a config")
    train.add_argument("target", type=path, metavar="CONFIG|RUN", help="a config file; with --resume a run folder")
    for option, unit, what in (("--max-run-usd", "USD", "dollars"), ("--max-hours", "HOURS", "hours")):
        train.add_argument(
            option,
            metavar=unit,
            help=f"ceiling in {what}, all attempts together: the same as the override budget.{_budget_key(option)}={unit}; with "
            "--resume it is saved in config.yaml of the run folder",
        )
    train.add_argument(
        "--stop-after-step",
        type=whole_above_0,
        metavar="N",
        help="compute the validation loss, save a checkpoint and pause after this optimizer step; --resume goes on from there, "
        "and the result is that of a run that did not pause",
    )
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)


def _train(arguments: argparse.Namespace) -> int:
    from finetune.machine.hardware import let_segments_grow

    let_segments_grow()
    from finetune.runtime import process_group
    from finetune.runtime.console import broken_pipe_safe

    with broken_pipe_safe(), process_group.process_group():  # so that an error of all processes is reported once
        return _train_here(arguments)


TYPED = ("resume", "target", "overrides", "max_run_usd", "max_hours", "stop_after_step")


def _train_here(arguments: argparse.Namespace) -> int:
    """What was typed for rank 0 applies: another machine may not see yet, or not any more, what is in the run's folder."""
    from finetune.runtime import distributed

    typed = distributed.run_on_rank0(lambda: {name: getattr(arguments, name) for name in TYPED})
    return _train_as_typed(argparse.Namespace(**typed))


def _train_as_typed(arguments: argparse.Namespace) -> int:
    from finetune.runtime import distributed

    ceilings = _typed_ceilings(arguments)
    if arguments.resume:
        if arguments.overrides:
            raise UserError(
                "--resume uses the config in the run folder; remove the overrides, or edit that config",
                code="cli.conflicting_options",
            )
        run = distributed.run_on_rank0(lambda: opened(arguments.target))
        with large_imports():
            from finetune.training.run import resume

        code = resume(run, ceilings, arguments.stop_after_step)
        _tell_end(run)
        return code
    arguments.overrides += [f"budget.{key}={value!r}" for key, value in ceilings.items()]
    config = distributed.run_on_rank0(lambda: loaded(arguments, arguments.target))
    with large_imports():
        from finetune.training.run import start

    began: list[RunFolder] = []
    code = start(config, arguments.target, arguments.stop_after_step, created=began.append)
    _tell_end(*began)
    return code


def _tell_end(run: RunFolder) -> None:
    from finetune.budget.ledger import Ledger
    from finetune.runtime import distributed

    if not distributed.is_rank0():
        return
    with suppress(UserError):  # the run has ended well, whatever has become of its files since
        account = Ledger(run.ledger).account().of("train")
        tell("train", cost_of_account(account) if account.attempts else cost_of_command(), after_training(run))


def _typed_ceilings(arguments: argparse.Namespace) -> dict[str, float]:
    """The ceilings, by their keys in the section budget. Raises UserError for a value that is not a number above 0."""
    ceilings = {}
    for option in ("--max-run-usd", "--max-hours"):
        text = getattr(arguments, key := _budget_key(option))
        if text is None:
            continue
        if any(word.startswith(f"budget.{key}=") for word in arguments.overrides):
            raise UserError(
                f"{option}: same as budget.{key}=, which is given too; remove one of them",
                code="cli.conflicting_options",
            )
        try:
            ceilings[key] = float(text)
        except ValueError:
            ceilings[key] = math.nan
        if not 0 < ceilings[key] < math.inf:
            raise UserError(f"{option}: expected a number above 0, found {shown(text)}", code="cli.bad_value")
    return ceilings


def _budget_key(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")
