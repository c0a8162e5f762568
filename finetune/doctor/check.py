"""One row of the environment check, and the status of something absent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "missing", "warning", "info"]
Need = Literal["train", "cloud", "all"]


@dataclass(frozen=True)
class Check:
    """One row. `missing`: needed, and absent or wrong; `warning`: may cause trouble later; `info`: no action needed."""

    name: str
    status: Status
    found: str
    needed: str = ""
    advice: str = ""


def absent(group: str, need: Need) -> Status:
    """The status of something absent. group: `train` or `cloud`, or "" for what every command needs."""
    if group in ("", need) or need == "all":
        return "missing"
    return "warning" if group == "cloud" else "info"
