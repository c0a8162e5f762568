"""Minutes from the boot of a machine to its first optimizer step: the median of the user's own launches, else assumed.

Launches of the same model are found in the ledgers of the runs on this computer, and in what each machine adds to the bucket,
set-up/<model>.jsonl, of which a copy is kept here: `finetune plan` asks Google for it, a launch only reads the copy.
"""

from __future__ import annotations

import statistics
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.budget.ledger import Ledger
from finetune.cloud.gcloud.cli import ask
from finetune.cloud.gcloud.config import bucket_name, local_login
from finetune.config.schema import PlanSection, RunConfig
from finetune.errors import UserError
from finetune.machine.set_up import AT, MODEL, SetUp, from_line, record_name
from finetune.runtime.files import parse_json, write_text
from finetune.runtime.paths import cache_root

LAUNCHES = 10
"""The median is over so many of the newest launches."""
CAT = ("storage", "cat")
ASK_SECONDS, FRESH_SECONDS = 5.0, 600.0
"""For Google's answer; a copy of its file that is newer is used without asking."""


@dataclass(frozen=True)
class SetUpMinutes:
    """minutes: of a launch. basis: measured, assumed or set, as text for the user."""

    minutes: float
    basis: str


ASSUMED = SetUpMinutes(12.0, "assumed")
"""Of a launch that finds nothing in the bucket."""


def with_set_up(config: RunConfig, *, ask_google: bool) -> tuple[PlanSection, SetUpMinutes]:
    """The plan's assumptions with minutes of set-up, and where these come from. ask_google: about launches that only the bucket
    knows; without a login or an answer they are left out."""
    found = set_up_minutes(config, ask_google=ask_google)
    return replace(config.plan, setup_minutes=found.minutes), found


def set_up_minutes(config: RunConfig, *, ask_google: bool) -> SetUpMinutes:
    """plan.setup_minutes, else the median of the newest launches of this model, of those with a warm bucket if there are any: a
    launch without one fills it for the next."""
    if config.plan.setup_minutes is not None:
        return SetUpMinutes(config.plan.setup_minutes, "plan.setup_minutes")
    model = config.model.name
    found = [*_in_ledgers(Path(config.training.output_dir)), *_in_bucket(model, ask_google)]
    launches = {one.facts.get(AT, ""): one for one in found if one.facts.get(MODEL) == model}
    newest = [launches[at] for at in sorted(launches)][-LAUNCHES:]
    warm = [one for one in newest if one.warm]
    used = warm or newest
    if not used:
        return SetUpMinutes(ASSUMED.minutes, f"{ASSUMED.basis}: no launch of {model} is recorded here")
    which = "1 launch" if len(used) == 1 else f"{len(used)} launches"
    bucket = "a warm bucket" if warm else "a bucket that lacked packages or weights"
    minutes = statistics.median(one.seconds for one in used) / 60
    return SetUpMinutes(minutes, f"measured: median of your last {which} with {bucket}")


def _in_ledgers(runs: Path) -> list[SetUp]:
    found: list[SetUp] = []
    for folder in sorted(runs.glob("*/ledger")):
        with suppress(UserError):  # a folder that cannot be listed; the run's own commands report it
            found += [one.set_up for one in Ledger(folder).account().attempts if one.set_up]
    return found


def _in_bucket(model: str, ask_google: bool) -> list[SetUp]:
    try:
        bucket = bucket_name(local_login())
    except UserError:
        return []
    copy = cache_root() / "set-up" / bucket / record_name(model)
    if ask_google and not _is_fresh(copy):
        answer = ask(CAT, f"gs://{bucket}/set-up/{record_name(model)}", seconds=ASK_SECONDS)
        with suppress(OSError, UserError):
            if answer.trouble:  # no launch yet, or no connection
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.touch()
            else:
                write_text(copy, answer.output)
    try:
        lines = copy.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    return [launch for line in lines if (launch := _launch(line))]


def _launch(text: str) -> SetUp | None:
    try:
        line = parse_json(text)
    except ValueError:
        return None
    return from_line(line) if isinstance(line, dict) else None


def _is_fresh(path: Path) -> bool:
    try:
        return 0 <= time.time() - path.stat().st_mtime < FRESH_SECONDS
    except OSError:
        return False
