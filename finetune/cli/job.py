"""`finetune job train`, `evaluate`, `serve`, `sweep` and `dev`: what the scripts of on_machine/ call."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from finetune.cli.arguments import add_command
from finetune.errors import EXIT_MISSING

if TYPE_CHECKING:
    from finetune.job.settings import JobSettings


def add(commands: Any) -> None:
    job = add_command(commands, "job", None, "do the work of a cloud machine, in the bucket", "finetune job train")
    jobs = job.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add(
        jobs,
        "train",
        _train,
        "start a run, or resume it, and score it",
        "CONFIG OVERRIDES RUN_NAME EVALUATE MAX_RUN_USD MAX_HOURS VLLM_MINUTES",
    )
    _add(jobs, "evaluate", _evaluate, "score a run and write its report", "RUN_NAME MAX_RUN_USD MAX_HOURS VLLM_MINUTES")
    _add(
        jobs,
        "serve",
        _serve,
        "serve a run or an export through ssh",
        "RUN_NAME EXPORT DATABASES EXECUTE IDLE_MINUTES MAX_USD_PER_DAY MAX_RUN_USD MAX_HOURS VLLM_MINUTES",
    )
    _add(
        jobs,
        "sweep",
        _sweep,
        "train the trials of a sweep, one after the other",
        "CONFIG OVERRIDES SWEEP SWEEP_SEARCH SWEEP_TRIALS SWEEP_ETA SWEEP_RUNGS SWEEP_SEED SWEEP_WORKERS RUN_NAME EVALUATE "
        "MAX_RUN_USD MAX_HOURS VLLM_MINUTES",
    )
    _add(jobs, "dev", _dev, "serve JupyterLab and TensorBoard through ssh", "MAX_RUN_USD MAX_HOURS")


def _add(jobs: Any, name: str, work: Callable[[JobSettings], int], summary: str, variables: str) -> None:
    parser = add_command(jobs, name, lambda _: _run(work), summary, f"finetune job {name}", continues=True)
    parser.description = f"{parser.description} Settings come from the environment, which sky/*.yaml set: {variables}."


def _train(settings: JobSettings) -> int:
    from finetune.job.train import train

    return train(settings)


def _evaluate(settings: JobSettings) -> int:
    from finetune.job.evaluate import evaluate

    return evaluate(settings)


def _serve(settings: JobSettings) -> int:
    from finetune.job.serve import serve

    return serve(settings)


def _sweep(settings: JobSettings) -> int:
    from finetune.cli.sweep import tell
    from finetune.job.sweep import sweep

    folder, outcome = sweep(settings)
    if outcome.why == "too_dear":  # which is said, and the sweep may not have begun
        return outcome.code
    tell(folder, outcome, f"the same launch with RUN_NAME={folder.name}", "MAX_RUN_USD")
    return outcome.code


def _dev(settings: JobSettings) -> int:
    from finetune.job.dev import dev

    return dev(settings)


def _run(work: Callable[[JobSettings], int]) -> int:
    from finetune.job.programs import ProgramFailed, say
    from finetune.job.settings import read_settings
    from finetune.runtime.console import broken_pipe_safe

    signal.signal(signal.SIGTERM, _end)
    settings = read_settings(os.environ)
    settings.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    with broken_pipe_safe():  # so that the exit code is that of the command
        try:
            return work(settings)
        except ProgramFailed as failed:
            return failed.code
        except OSError as error:  # such as an unavailable bucket
            say(str(error))
            return EXIT_MISSING


def _end(number: int, _: object) -> None:
    """Exits so that started programs are terminated too; the exit code is as in a shell."""
    raise SystemExit(128 + number)
