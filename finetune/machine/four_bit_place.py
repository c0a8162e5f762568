"""Where a cloud machine has 4-bit weights (finetune/models/four_bit_files.py): the job names the folder, the loader reads it.

~/.finetune/four-bit/       a folder for each copy
~/.finetune/four-bit.lock   locked by on_machine/setup.sh while the original weights are still being fetched
"""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "FINETUNE_FOUR_BIT"


def place_in(state: Path) -> Path:
    """state: ~/.finetune."""
    return state / "four-bit"


def named_place() -> Path | None:
    """The folder that the job has named; None outside one."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else None


def lock_of(place: Path) -> Path:
    return Path(f"{place}.lock")
