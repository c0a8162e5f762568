"""What launches keep in the bucket for the next ones (on_machine/kept), as a job uses it: waits for the model files that set-up
fetches beside the packages, and starts the process that keeps what the bucket lacks.

~/.finetune/model.lock          locked while what training needs of the model is fetched
~/.finetune/four-bit.lock       locked while anything of it is fetched (machine/four_bit_place.py)
~/.finetune/model.log           what that said
~/.finetune/keep.log            the same of the process that keeps
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from finetune.config.schema import ModelSection
from finetune.job.programs import last_lines, say
from finetune.job.settings import JobSettings
from finetune.machine import set_up
from finetune.machine.four_bit_place import lock_of, place_in
from finetune.runtime.locks import is_locked, wait_while_locked

LOCK, FETCHED, KEPT = "model.lock", "model.log", "keep.log"
WAIT_SECONDS = 900.0
"""After that the model is loaded from the hub."""
LOWEST = ("setsid", "--fork", "nice", "-n", "19")
"""Detached, because SkyPilot ends the children of a job that has ended."""


def prepare_model(model: ModelSection, settings: JobSettings) -> None:
    """Once the data are there: wait for the model files, and see that what this launch has is kept for the next."""
    set_up.mark(set_up.DATA)
    wait_for_model(model, settings)
    set_up.mark(set_up.FILES)
    keep_after_first_step(model, settings)


def wait_for_model(model: ModelSection, settings: JobSettings, *, whole: bool = False) -> None:
    """Wait until what training needs of the model is fetched, and note where it comes from. whole: until all of it is."""
    lock = lock_of(place_in(settings.state)) if whole else settings.state / LOCK
    if is_locked(lock):
        say("waiting for the model files from the bucket")
        wait_while_locked(lock, WAIT_SECONDS)
        if (log := settings.state / FETCHED).is_file() and (words := last_lines(log, 1)):
            say(words)
    known = set_up.read(settings.state.parent)
    if known is not None and set_up.MODEL_FROM not in known.facts:
        source = set_up.HERE if Path(model.name).exists() or not _from_hub(model) else set_up.HUB
        set_up.note(set_up.MODEL_FROM, source, settings.state.parent)


def keep_after_first_step(model: ModelSection, settings: JobSettings) -> None:
    """Start the process that waits for the first step of this job and then fills the bucket, at the lowest priority. Without it
    the run is the same, so what fails is only reported."""
    if settings.nodes and settings.nodes.rank:
        return
    about = {
        "pid": os.getpid(),
        "model": model.name,
        "revision": model.revision,
        "record": set_up.record_name(model.name),
    }
    words = [*LOWEST, "python3", "-m", "on_machine.kept", "keep", str(settings.mount), json.dumps(about)]
    try:
        with (settings.state / KEPT).open("wb") as log:
            subprocess.run(
                words, env=settings.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True
            )
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"nothing is kept in the bucket for later launches: {error}")


def _from_hub(model: ModelSection) -> bool:
    return model.name.count("/") == 1 and not model.name.startswith((".", "/", "~"))
