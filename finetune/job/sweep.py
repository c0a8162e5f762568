"""`finetune job sweep`: works on a sweep in the bucket until nothing is left for this machine, and scores its best trial.

All trials are trained on this machine, one after the other, so that its set-up is paid once. Several machines with one RUN_NAME
share the sweep and its budget, MAX_RUN_USD (finetune/sweep/grants.py). After a preemption the next machine goes on from the
bucket.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path

from finetune.errors import EXIT_TRANSIENT, UserError
from finetune.job.data import data_of_config
from finetune.job.kept import prepare_model
from finetune.job.limits import hours_left, run_limited
from finetune.job.programs import say, tensorboard
from finetune.job.score import interruption_is_transient, is_scored, score_after_training
from finetune.job.settings import JobSettings
from finetune.job.too_dear import refused_as_too_dear
from finetune.job.train import trainer
from finetune.machine import set_up
from finetune.runtime.commands import env_option
from finetune.sweep.folder import MOST_NAME, SweepFolder
from finetune.sweep.grants import Grant, Grants
from finetune.sweep.open import Wanted, machine_of, open_sweep
from finetune.sweep.programs import Ended
from finetune.sweep.run import Outcome, book_rest, work_on
from finetune.sweep.turn import Work, take_score
from finetune.sweep.workers import Worker

DEFAULTS = {
    "SWEEP_SEARCH": "grid",
    "SWEEP_TRIALS": "0",
    "SWEEP_ETA": "2",
    "SWEEP_RUNGS": "2",
    "SWEEP_SEED": "0",
    "SWEEP_WORKERS": "1",
}
MOST = 1_000_000


@dataclass
class JobTrainer:
    """Trains a trial within what MAX_HOURS and MAX_RUN_USD leave to this machine. It is a Trainer of sweep/run.py."""

    settings: JobSettings
    hours: float
    interrupted: bool = False
    began: float = field(default_factory=time.monotonic)

    @property
    def hours_left(self) -> float:
        return max(0.0, self.hours - (time.monotonic() - self.began) / 3600)

    def __call__(self, name: str, words: Sequence[str]) -> Ended:
        wandb = {"WANDB_RUN_ID": name, "WANDB_NAME": name, "WANDB_RESUME": "allow"}
        settings = replace(self.settings, environment=self.settings.environment | wandb)
        ended = run_limited([*trainer(settings), *words], self.hours_left, settings)
        self.interrupted = self.interrupted or ended.signalled
        return Ended(ended.code, self.settings.limits if ended.out_of_time else "")


def sweep(settings: JobSettings) -> tuple[Path, Outcome]:
    """The sweep's folder, and why this machine ends; its exit code is 75 if it was interrupted, to be run again."""
    settings.require_bucket()
    set_up.begin_job()
    wanted, workers = wanted_of(settings)
    folder = SweepFolder(settings.runs, settings.name_of_run())
    if (code := refused_as_too_dear(folder.as_run, settings)) is not None:
        return folder.path, Outcome(code, "too_dear")
    hours = hours_left(settings)
    data_of_config(Path(settings.config), settings.overrides, settings)
    opened = open_sweep(wanted)
    prepare_model(opened.base.model, settings)
    usd = float(settings.max_run_usd)
    machine = machine_of(opened.base, usd)
    opened.create()
    train = JobTrainer(settings, hours)
    with interruption_is_transient(), tensorboard(settings), Worker(opened.folder.path) as worker:
        work = Work(opened.sweep, opened.folder, worker, machine, usd, workers, opened.settings_of, say)
        say(
            f"sweep {opened.folder.path}; the same launch with {env_option('RUN_NAME', opened.sweep.name)} goes on with it"
        )
        outcome = work_on(work, train, lambda: train.interrupted)
        if outcome.why == "done" and settings.evaluate:
            outcome = _score(work, train, settings)
    return opened.folder.path, outcome


def _score(work: Work, train: JobTrainer, settings: JobSettings) -> Outcome:
    grant = take_score(work, is_scored)
    if not isinstance(grant, Grant):
        return Outcome(0, grant.why, grant.detail)
    run = work.folder.run_of(work.sweep, grant.trial)
    within = replace(settings, max_run_usd=Decimal(repr(grant.ceiling_usd)))
    try:
        code = score_after_training(run, train.hours_left, within)
        if code != EXIT_TRANSIENT:
            Grants(work.folder.path / "grants").close(grant)
    finally:
        book_rest(work)
    return Outcome(code, "done" if not code else "interrupted" if code == EXIT_TRANSIENT else "failed")


def wanted_of(settings: JobSettings) -> tuple[Wanted, int]:
    """The sweep of a job, and how many machines share it. Raises UserError that names every invalid variable."""
    problems = []
    if settings.nodes:
        problems.append("SKYPILOT_NUM_NODES: a sweep's machines do not wait for each other; launch it several times")
    if len(settings.run_name) > MOST_NAME:
        problems.append(f"RUN_NAME: expected at most {MOST_NAME} characters, because its trials add some")
    overrides = [*settings.overrides, f"training.output_dir={settings.runs}"]
    return read_sweep(settings.environment, settings.config, overrides, settings.name_of_run(), problems)


def read_sweep(
    given: Mapping[str, str], config: str, overrides: Sequence[str], name: str | None, others: Sequence[str] = ()
) -> tuple[Wanted, int]:
    """The sweep, and how many machines share it. given: the task's variables. others: problems found already. Raises
    UserError that names every one."""
    problems = list(others)
    numbers = {
        name: _whole(name, given.get(name) or text, problems)
        for name, text in DEFAULTS.items()
        if name != "SWEEP_SEARCH"
    }
    search = given.get("SWEEP_SEARCH") or DEFAULTS["SWEEP_SEARCH"]
    if search not in ("grid", "optuna"):
        problems.append(f"SWEEP_SEARCH: expected grid or optuna, found {search[:40]!r}")
    if (search == "optuna") != bool(numbers["SWEEP_TRIALS"]):
        problems.append("SWEEP_TRIALS: expected with SWEEP_SEARCH=optuna, and only then")
    if numbers["SWEEP_ETA"] < 2 or not numbers["SWEEP_WORKERS"]:
        problems.append("SWEEP_ETA: expected 2 or more, SWEEP_WORKERS: 1 or more")
    if not config or not given.get("SWEEP"):
        problems.append("CONFIG and SWEEP: expected a config, and what is varied, such as lora.r=8,16")
    if problems:
        raise UserError("; ".join(problems), code="job.bad_setting")
    wanted = Wanted(
        config_file=Path(config),
        words=[*overrides, *given["SWEEP"].split()],
        name=name,
        search=search,
        trials=numbers["SWEEP_TRIALS"] or None,
        seed=numbers["SWEEP_SEED"],
        eta=numbers["SWEEP_ETA"],
        rungs=numbers["SWEEP_RUNGS"],
    )
    return wanted, numbers["SWEEP_WORKERS"]


def _whole(name: str, text: str, problems: list[str]) -> int:
    if text.isascii() and text.isdecimal() and int(text[:9]) <= MOST:
        return int(text[:9])
    problems.append(f"{name}: expected a whole number up to {MOST:,}, found {text[:40]!r}")
    return 1
