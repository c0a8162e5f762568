"""Which of our jobs a task runs, by the script of on_machine/ that its `run` names, and whether that job would refuse the task's
variables. A task that names none of these scripts is the user's own: nothing is asked of its variables.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.job.settings import JobSettings, read_settings

TRAIN, EVALUATE, SERVE, SWEEP, DEV = JOBS = ("train", "evaluate", "serve", "sweep", "dev")
SCRIPT = re.compile(rf"\bon_machine/({'|'.join(JOBS)})\.sh(?![\w.-])")


def job_of(task: Any) -> str:
    """The first one that a sky.Task runs; "" if it runs none."""
    return next(iter(_jobs_of(task)), "")


def check_variables(task: Any) -> None:
    """Raises UserError, the job's own, for variables with which it would end on a machine that is billed by then."""
    jobs = _jobs_of(task)
    if not jobs:
        return
    settings = read_settings(_on_machine(task))
    for job in jobs:
        if job in CHECKS:
            CHECKS[job](settings, task)


def _jobs_of(task: Any) -> list[str]:
    return SCRIPT.findall(task.run) if isinstance(task.run, str) else []


def _on_machine(task: Any) -> dict[str, str]:
    """The task's variables, with SkyPilot's."""
    nodes = int(task.num_nodes or 1)
    several = {"SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NODE_IPS": "ADDRESS\n" * nodes}
    return {name: str(value) for name, value in task.envs.items()} | {"SKYPILOT_TASK_ID": "task"} | several


def _train(settings: JobSettings, _: Any) -> None:
    if not settings.run_name:  # a run of the bucket needs no config
        settings.require_config()


def _serve(settings: JobSettings, _: Any) -> None:
    from finetune.job.serve import read_serving

    read_serving(settings)


def _sweep(settings: JobSettings, task: Any) -> None:
    from finetune.job.sweep import wanted_of
    from finetune.sweep.open import choice_of

    wanted, _ = wanted_of(settings)
    folder = Path(task.workdir).expanduser() if isinstance(task.workdir, str) else Path()
    config_file = folder / task.envs["CONFIG"]
    if config_file.is_file():
        choice_of(replace(wanted, config_file=config_file), elsewhere=True)


CHECKS: dict[str, Callable[[JobSettings, Any], None]] = {TRAIN: _train, SERVE: _serve, SWEEP: _sweep}
"""Besides the settings that all have. What needs the machine, such as the files of the bucket, is left to it."""
