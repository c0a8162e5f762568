"""What a tracker knows a run by, the same for all its attempts."""

from __future__ import annotations

import os
import re
import secrets
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from finetune.runtime.confined import is_relative_name


def tracked_id(run_folder: Path, run_name: str, file: str, given: str = "") -> str:
    """The id that an earlier attempt saved in a file of the run's folder, unless one is given; else the run's name with a hash of
    SKYPILOT_TASK_ID, which a managed job keeps when it is recovered; else the name with a random number, because the project
    may have another run of that name.

    At most 128 characters out of A-Z a-z 0-9 _ -. If the run is named after its task, as finetune/job/settings.py does, the id
    is that name.
    """
    if given:
        return given
    with suppress(OSError, UnicodeDecodeError):
        saved = (run_folder / file).read_text(encoding="utf-8").strip()
        # what W&B accepts; it names a folder after it
        if is_relative_name(saved) and re.fullmatch(r"[^/\\#?%:]{1,128}", saved):
            return saved
    name, task = _plain(run_name), _plain(os.environ.get("SKYPILOT_TASK_ID", ""))
    if task and name == task:
        return name
    return f"{name}-{sha256(task.encode()).hexdigest()[:8] if task else secrets.token_hex(4)}"


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)[:100]
