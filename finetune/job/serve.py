"""`finetune job serve`: serves a run or an export of the bucket, reachable through ssh, until it is idle or a limit is reached.

<bucket>/serving/<day>/serving-NNN.jsonl     what machines that serve from this bucket have cost on a day (UTC)
"""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

from finetune.budget.ledger import Ledger
from finetune.budget.newest_prices import look
from finetune.errors import EXIT_OK, UserError
from finetune.job.evaluate import run_to_score
from finetune.job.kept import wait_for_model
from finetune.job.limits import hours_left, run_limited
from finetune.job.metering import Metering
from finetune.job.programs import say
from finetune.job.settings import API_KEY, JobSettings, positive, switch
from finetune.job.too_dear import now_too_dear
from finetune.job.vllm import wait_for_vllm
from finetune.machine.price import Ceilings
from finetune.runtime.confined import remove_tree, within
from finetune.runtime.files import disk_error
from finetune.stage_end.following_job import serve_again
from finetune.stage_end.tell import tell

PORT = 8000
DAILY = "MAX_USD_PER_DAY"
DEFAULTS = {"EXECUTE": "0", "IDLE_MINUTES": "30", DAILY: "5"}
LEAST_SECONDS = 120.0
"""With less left of the day's budget the model would hardly be loaded."""
SMALL_BYTES = 1 << 20
"""Files of an export up to this size are compared byte by byte; its manifest, which has the hashes of the others, is one."""


@dataclass(frozen=True)
class Serving:
    """What sky/serve.yaml sets. export: a folder of the bucket instead of a run. databases: NAME=FILE."""

    export: str
    databases: list[str]
    execute: bool
    idle_minutes: Decimal
    max_usd_per_day: Decimal


def serve(settings: JobSettings) -> int:
    """Exit codes: 0 idle, or stopped at a limit; 2 user error; else that of `finetune serve`."""
    settings.require_bucket()
    serving = read_serving(settings)
    look(say)
    if (found := now_too_dear()) is not None:
        raise UserError(
            f"this machine is {found.reason}; launch again, which goes by today's prices", code="price.too_dear"
        )
    hours = hours_left(settings, of_machine=True)
    budget = DailyBudget(settings.mount / "serving", serving.max_usd_per_day)
    with budget:
        if serving.export:
            target = _export(serving.export, settings)
        else:
            run = run_to_score(settings)
            target = run.path
            wait_for_model(run.config().model, settings, whole=True)
        wait_for_vllm(settings, 3600 * hours)
        say(f"serving {target} for at most {hours:.4f} hours, or until it is idle for {serving.idle_minutes} minutes:")
        say(
            f"  ssh -L {PORT}:localhost:{PORT} {settings.cluster}      # then http://localhost:{PORT}/v1 is the endpoint"
        )
        ended = run_limited(_command(target, serving, settings), hours, settings, limit=budget)
        spent = budget.spent()
    again = serve_again(target.name, serving.export)
    if over := ended.over or (settings.limits if ended.out_of_time else ""):
        say(f"stopped at a limit: {over}")
        tell("serving today", spent, [again], say, within=True)
        return EXIT_OK
    if ended.code == EXIT_OK:
        say("ended, because nobody asks any more; the machine goes down by itself")
    tell("serving today", spent, [again], say, within=True)
    return ended.code


def read_serving(settings: JobSettings) -> Serving:
    """Raises UserError that names every invalid variable."""
    given, problems = settings.environment, list[str]()
    values = {name: given.get(name) or default for name, default in DEFAULTS.items()}
    serving = Serving(
        export=given.get("EXPORT", ""),
        databases=given.get("DATABASES", "").split(),
        execute=switch("EXECUTE", values["EXECUTE"], problems),
        idle_minutes=positive("IDLE_MINUTES", values["IDLE_MINUTES"], problems),
        max_usd_per_day=positive(DAILY, values[DAILY], problems),
    )
    if serving.export and settings.run_name:
        problems.append("EXPORT and RUN_NAME: expected one of them")
    if problems:
        raise UserError("; ".join(problems), code="job.bad_setting")
    return serving


def _command(target: Path, serving: Serving, settings: JobSettings) -> list[str]:
    words = ["finetune", "serve", str(target), "--port", str(PORT), "--idle-minutes", str(serving.idle_minutes)]
    for database in serving.databases:
        words += ["--db", database]
    if serving.execute:
        words.append("--execute")
    if settings.environment.get(API_KEY):
        words += ["--api-key-env", API_KEY]
    return words


def _export(name: str, settings: JobSettings) -> Path:
    """A copy of an export of the bucket on the local disk, from which weights are read in any order. Raises UserError if there is
    none, or if the disk is too small."""
    folder = within(settings.mount, name.rstrip("/"))
    if folder is None or not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(
            f"EXPORT: {name[:200]!r}: no such folder in the bucket, or nothing in it; expected one that `finetune export` wrote, "
            "such as runs/my-run/exports/merged",
            code="job.no_export",
        )
    copies = settings.state / "exports"
    copy, part = copies / folder.name, copies / f".{folder.name}.part"
    if copy.is_dir() and _same(folder, copy):
        return copy
    say(f"export: {folder} -> {copy}")
    try:
        remove_tree(part, inside=copies)
        remove_tree(copy, inside=copies)  # first, because two might not fit
        shutil.copytree(folder, part)
        part.rename(copy)
    except (OSError, shutil.Error) as error:
        remove_tree(part, inside=copies, ignore_errors=True)
        if isinstance(error, shutil.Error):
            raise UserError(
                f"{copy}: could not be copied from the bucket: {error}", code="job.export_not_copied"
            ) from error
        raise disk_error(error, copy) from error
    return copy


def _same(one: Path, other: Path) -> bool:
    files = [
        {path.relative_to(root): path.stat().st_size for path in root.rglob("*") if path.is_file()}
        for root in (one, other)
    ]
    small = [name for name, size in files[0].items() if size <= SMALL_BYTES]
    return files[0] == files[1] and all(filecmp.cmp(one / name, other / name, shallow=False) for name in small)


class DailyBudget:
    """The budget of a day, of all machines that serve from this bucket. It is a Limit for `run_limited`, and a context manager,
    in which this machine's time is recorded; on a new day it begins again.

    folder: of the days. today: as YYYY-MM-DD.
    """

    def __init__(self, folder: Path, usd: Decimal, today: Callable[[], str] | None = None) -> None:
        self._folder, self._usd, self._today = folder, usd, today or _utc_day
        self._open = ExitStack()
        self._over = ""

    def __enter__(self) -> DailyBudget:
        """Raises UserError if hardly anything is left of today's budget."""
        self._begin()
        if self._metering.seconds_left() < LEAST_SECONDS:
            spent = self._metering.spent()
            self._metering.ends("refused")
            self._open.close()
            raise UserError(
                f"{DAILY}={self._usd}: used up for {self._day} (UTC) by what serves or has served from this bucket: {spent}; "
                f"launch again tomorrow, or with a higher --env {DAILY}",
                code="budget.exhausted",
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._metering.ends("ended")
        self._open.close()

    @property
    def over(self) -> str:
        if not self._over and self._today() != self._day:
            self._next_day()
        return self._over or self._metering.over

    @property
    def overdue(self) -> bool:
        return self._metering.overdue

    def spent(self) -> str:
        """What serving has cost on this day (UTC), of all machines."""
        return self._metering.spent() or "not recorded, because the price of this machine is unknown"

    def _begin(self) -> None:
        self._day = self._today()
        self._metering = Metering(
            Ledger(self._folder / self._day, "serve"),
            Ceilings(run_usd=float(self._usd)),
            usd_key=DAILY,
            restarts=False,
        )
        self._open.enter_context(self._metering.recorded())

    def _next_day(self) -> None:
        self._metering.ends("next day")
        self._open.close()
        try:
            self._begin()
        except UserError as error:
            self._over = f"the ledger of a new day cannot be kept: {error}"


def _utc_day() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")
