"""How long a machine takes from its boot to the first optimizer step, part by part, by the clock that it is billed by.

on_machine/setup.sh begins the log in the home folder, once a boot. Each later line ends a part, and whoever does the work writes
it: the set-up script, the job, training. Training takes the log at the end of its first step, so that a second run on the machine
is not counted. A line is `<seconds since the boot> <part>`, or `= <fact> <value>`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.machine.billed_time import machine_age
from finetune.runtime.confined import remove_file
from finetune.runtime.files import write_json

LOG = Path(".finetune") / "set-up.log"
DONE = Path(".finetune") / "set-up.json"
"""Both in the home folder of a cloud machine. DONE: the parts, once the first step is done."""
EVENT = "set_up"
"""The event's name in the ledger."""
BOOT, PACKAGES, CHECK, JOB, DATA, FILES, IMPORTS, CHECKS, EXAMPLES, WEIGHTS, STEP = PARTS = (
    *("boot", "packages", "gpu_check", "job_start", "data", "model_files"),
    *("imports", "checks", "examples", "weights", "first_step"),
)
"""In their order. boot: of the machine, and SkyPilot's runtime on it. model_files: waiting for them only, because they are
fetched beside the packages. weights: read, quantised, on the GPU."""
PACKAGES_FROM, MODEL_FROM, MODEL, AT = "packages_from", "model_from", "model", "at"
"""Facts. at: when the first step was done, in ISO format, UTC; it also tells two launches apart."""
INDEX, HUB, BUCKET, HERE = "index", "hub", "bucket", "here"
"""Where packages and model files came from: the package index, the hub, the user's bucket, or this machine's own disk."""
MOST_SECONDS = 1e6
_LINE = re.compile(r"(?P<age>[0-9]+(\.[0-9]+)?) (?P<part>[a-z_]{1,40})|= (?P<fact>[a-z_]{1,40}) (?P<value>\S{1,200})")


@dataclass(frozen=True)
class SetUp:
    """seconds: from the boot to the end of the first step, the sum of `parts`. facts: such as where the packages came from."""

    parts: dict[str, float]
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def warm(self) -> bool:
        """Whether nothing came from the package index or the model hub."""
        return self.facts.get(PACKAGES_FROM) != INDEX and self.facts.get(MODEL_FROM) != HUB

    @property
    def text(self) -> str:
        """The parts that took a second or more, for the user."""
        long = [f"{name.replace('_', ' ')} {seconds:.0f}" for name, seconds in self.parts.items() if seconds >= 1]
        return f"{self.seconds:.0f} s from the boot to the first step (measured): {', '.join(long)}"

    def for_ledger(self) -> dict[str, Any]:
        """For a line of the ledger."""
        return {"seconds": round(self.seconds, 3), "parts": self.parts, "facts": self.facts}


def mark(part: str, home: Path | None = None) -> None:
    """Ends a part now. Does nothing on a machine without a log; never raises."""
    age = machine_age()
    if age is not None:
        _append(f"{age:.3f} {part}", home)


def note(fact: str, value: object, home: Path | None = None) -> None:
    """Adds a fact, without spaces. Does nothing on a machine without a log; never raises."""
    _append(f"= {fact} {value}", home)


def begin_job(home: Path | None = None) -> None:
    """The first job of a boot ends the part JOB; a later one forgets the log, because time has passed between them."""
    known = read(home)
    if known is not None and JOB in known.parts:
        _forget(home)
    with suppress(OSError, UserError):
        remove_file((home or Path.home()) / DONE, inside=home or Path.home())
    mark(JOB, home)


def read(home: Path | None = None) -> SetUp | None:
    """The log as it is now; None without one, and for one that is damaged."""
    try:
        lines = ((home or Path.home()) / LOG).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    parts: dict[str, float] = {}
    facts: dict[str, str] = {}
    before = 0.0
    for line in lines:
        found = _LINE.fullmatch(line)
        if found is None:
            return None
        if found["fact"]:
            facts[found["fact"]] = found["value"]
            continue
        age = float(found["age"])
        if age < before:
            return None
        parts[found["part"]] = round(parts.get(found["part"], 0.0) + age - before, 3)
        before = age
    return SetUp(parts, facts)


def take(model: str, home: Path | None = None) -> SetUp | None:
    """The parts from the boot on, at the end of the first step; None where they are unknown or another run has taken them.

    On a cloud machine DONE is written in any case: it says that the first step is done. Never raises.
    """
    found = read(home) or SetUp({})
    _forget(home)
    taken = SetUp(found.parts, found.facts | {MODEL: model, AT: datetime.now(UTC).isoformat(timespec="seconds")})
    with suppress(OSError, UserError):
        done = (home or Path.home()) / DONE
        if done.parent.is_dir():
            write_json(done, taken.for_ledger())
    return taken if taken.parts else None


def from_line(line: Mapping[str, Any]) -> SetUp | None:
    """From a line of a ledger; None if it is damaged."""
    parts, facts = line.get("parts"), line.get("facts")
    if not isinstance(parts, dict) or not isinstance(facts, dict) or not parts:
        return None
    for seconds in parts.values():
        if type(seconds) not in (int, float) or not (math.isfinite(seconds) and 0 <= seconds <= MOST_SECONDS):
            return None
    kept = {str(name)[:40]: float(seconds) for name, seconds in parts.items()}
    return SetUp(kept, {str(name)[:40]: value[:200] for name, value in facts.items() if isinstance(value, str)})


def record_name(model: str) -> str:
    """The name of a bucket's file set-up/NAME with the launches of a model, a line each."""
    plain = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")[:80]
    return f"{plain}-{hashlib.sha256(model.encode()).hexdigest()[:8]}.jsonl"


def _append(line: str, home: Path | None) -> None:
    log = (home or Path.home()) / LOG
    with suppress(OSError):
        if log.is_file():
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")


def _forget(home: Path | None) -> None:
    with suppress(OSError, UserError):
        folder = home or Path.home()
        remove_file(folder / LOG, inside=folder)
