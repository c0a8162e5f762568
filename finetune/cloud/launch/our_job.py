"""Which of our jobs a task runs, by the script of on_machine/ that its `run` names; a task that names none is the user's own."""

from __future__ import annotations

import re
from typing import Any

TRAIN, EVALUATE, SERVE, SWEEP, DEV = JOBS = ("train", "evaluate", "serve", "sweep", "dev")
SCRIPT = re.compile(rf"\bon_machine/({'|'.join(JOBS)})\.sh(?![\w.-])")


def job_of(task: Any) -> str:
    """The first one that a sky.Task runs; "" if it runs none."""
    found = SCRIPT.search(task.run) if isinstance(task.run, str) else None
    return found[1] if found else ""
