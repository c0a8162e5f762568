"""A sweep's worker: takes a trial, trains it up to its next comparison, writes its loss down, and takes the next one.

Each trial is trained by the ordinary `finetune train`, which pauses at the comparison; a trial that goes on is resumed, which is
exact, so it becomes what it would have become alone. Wherever a worker is killed, the same command goes on with the same
decisions.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune.budget.claims import Claim, ClaimFolder
from finetune.budget.lease import clear_not_started
from finetune.budget.ledger import Ledger
from finetune.budget.meter import MAX_HOURS
from finetune.config.load import load_config, to_dict
from finetune.config.resume_rules import decide
from finetune.errors import EXIT_OK, EXIT_TRANSIENT, TransientError, UserError
from finetune.machine.billed_time import MachineTime
from finetune.machine.price import facts
from finetune.machine.process import is_gone, this_process
from finetune.run_folder import RunFolder
from finetune.run_record import RunRecord
from finetune.sweep.folder import Result
from finetune.sweep.grants import Grant, Grants
from finetune.sweep.programs import Ended
from finetune.sweep.space import label
from finetune.sweep.turn import Nothing, Work, exhausted, take_turn

ORPHAN_SECONDS = 240.0
"""How long the program of a worker that was killed here is waited for: it may be saving."""
MOST_KILLS = 2
"""How often in a row a program that another process has killed is started again."""

Trainer = Callable[[str, Sequence[str]], Ended]
"""Runs `finetune train` for the run of this name, with these words."""


@dataclass(frozen=True)
class Outcome:
    """Why a worker ends. code: its exit code. why: done, budget, others, limit, interrupted, killed, refused (too little was left
    for one trial), too_dear (this machine, for any), failed. detail: for people."""

    code: int
    why: str
    detail: str = ""


def work_on(work: Work, train: Trainer, interrupted: Callable[[], bool] = lambda: False) -> Outcome:
    """Work until nothing is left for this worker. Raises UserError."""
    counts = Counter[str]()
    try:
        while True:
            if interrupted():
                return Outcome(EXIT_TRANSIENT, "interrupted")
            grant = take_turn(work)
            if isinstance(grant, Nothing):
                return Outcome(EXIT_OK, grant.why, grant.detail)
            outcome = _trained(work, grant, train)
            if outcome is None:
                counts.clear()
            elif outcome.why not in ("killed", "refused") or interrupted():
                return outcome
            else:
                counts[outcome.why] += 1
                if counts["killed"] > MOST_KILLS:
                    return outcome
                if counts["refused"] > 1:
                    return Outcome(EXIT_OK, "budget", outcome.detail)
    finally:
        book_rest(work)


def book_rest(work: Work) -> None:
    """What this machine has cost since its last attempt, or its boot if it had none: on the sweep's own ledger."""
    if not work.machine.provisioned:
        return
    clock = MachineTime(provisioned=True)
    ledger = Ledger(work.folder.path / "ledger", "sweep")
    log = ledger.new_attempt(ledger.next_attempt(), machine=facts(), price=work.machine.price, resumed_step=None)
    seconds = clock.take()
    log.begin(seconds)
    log.end(seconds, "ended", None)
    clock.mark()


def _trained(work: Work, grant: Grant, train: Trainer) -> Outcome | None:
    """Trains a trial up to the grant's rung, and writes down what came of it. None if the worker goes on."""
    run, grants = work.folder.run_of(work.sweep, grant.trial), Grants(work.folder.path / "grants")
    step = work.sweep.rungs[grant.rung] if grant.rung < len(work.sweep.rungs) else None
    result, ended, seconds = _reached(work, run, grant, step), Ended(EXIT_OK), 0.0
    if result is None:
        words, began = _words(work, run, grant, step), time.monotonic()
        ceiling = "" if grant.ceiling_usd is None else f", up to ${grant.ceiling_usd:.4f} of its own"
        work.say(f"{run.path.name} ({label(grant.settings)}): {_goal(step)}{ceiling}")
        ended, seconds = train(run.path.name, words), time.monotonic() - began
        result = _reached(work, run, grant, step)
    stays = ended.code == EXIT_TRANSIENT or _by_signal(ended)
    if result is None and ended.code != EXIT_OK and not stays:
        if held := _holder(run):
            raise TransientError(f"{run.path}: is being trained ({held.who()}); try again later", code="sweep.held")
        if exhausted(work, run, grant.ceiling_usd, 0.0 if work.machine.provisioned else seconds):
            grants.close(grant)
            return Outcome(EXIT_OK, "refused", f"too little was left for {run.path.name}")
        if not work.folder.results():
            grants.close(grant)
            why = f"{run.path.name} failed with exit code {ended.code}: see above; nothing is decided"
            return Outcome(ended.code, "failed", why)
        result = Result(grant.trial, grant.rung, step, None, f"failed with exit code {ended.code}")
    if result is None and (hours := _hours_over(run)):
        result = Result(grant.trial, grant.rung, step, None, hours)
    if result is not None:
        work.folder.add_result(result)
        work.say(f"{run.path.name}: {_told(result)}")
    if not stays or result is not None:
        grants.close(grant)
    if stays and not ended.over:
        why = "killed" if _by_signal(ended) else "interrupted"
        return Outcome(EXIT_TRANSIENT, why, f"{run.path.name} was interrupted")
    return Outcome(EXIT_OK, "limit", ended.over) if ended.over else None


def _words(work: Work, run: RunFolder, grant: Grant, step: int | None) -> list[str]:
    """Raises UserError for a folder that is not this trial's."""
    _wait_for_orphan(work, run)
    clear_not_started(run, work.say)
    _check_own(work, run, grant)
    words = ["--resume", str(run.path)]
    if not run.run_json.exists():
        place = [f"training.output_dir={work.folder.runs}", f"training.run_name={run.path.name}"]
        words = [str(work.folder.config_yaml), *grant.settings, *place]
    if step is not None:
        words += ["--stop-after-step", str(step)]
    return words if grant.ceiling_usd is None else [*words, "--max-run-usd", repr(grant.ceiling_usd)]


def _check_own(work: Work, run: RunFolder, grant: Grant) -> None:
    if not run.config_yaml.exists():
        return
    own = load_config(work.folder.config_yaml, list(grant.settings))
    changes = decide(to_dict(own), to_dict(run.config())).refused
    if changes:
        raise UserError(
            f"{run.path}: is another run, not trial {grant.trial} of this sweep: {'; '.join(map(str, changes))}; move it away, "
            "or choose another --name",
            code="sweep.trial_taken",
        )


def _reached(work: Work, run: RunFolder, grant: Grant, step: int | None) -> Result | None:
    """The trial's result at the rung, if its run has been there. step: None for the end of training."""
    if not run.run_json.exists():
        return None
    _check_own(work, run, grant)
    record = run.record()
    planned = record.steps.planned if record.steps else None
    at_end = step is None or (planned is not None and step >= planned)
    if at_end and record.status != "done":
        return None
    at = planned if at_end else step
    row = next((row for row in record.history or () if row.get("step") == at and "eval_loss" in row), None)
    if row is None:
        return _without_loss(record, grant, at)
    loss = row["eval_loss"]
    return Result(
        grant.trial, grant.rung, at, loss, "" if loss is not None else "diverged: its validation loss is not a number"
    )


def _without_loss(record: RunRecord, grant: Grant, step: int | None) -> Result | None:
    """A run that is beyond the rung and was not validated there, such as one that was trained by hand."""
    done = record.steps.done if record.steps else 0
    if record.status in ("done", "paused") and step is not None and done >= step:
        return Result(grant.trial, grant.rung, step, None, f"has no validation loss of step {step}")
    return None


def _hours_over(run: RunFolder) -> str:
    """Why a run that has stopped at its own ceiling in hours goes no further; "" for any other."""
    record = run.record() if run.run_json.exists() else RunRecord()
    detail = (record.stop and record.stop.detail) or ""
    return f"stopped at its {MAX_HOURS}" if record.status == "budget_stop" and MAX_HOURS in detail else ""


def _wait_for_orphan(work: Work, run: RunFolder) -> None:
    """Of a worker that was killed on this machine: its program has a SIGTERM, and saves."""
    began, told, here = time.monotonic(), False, this_process().machine
    while (holder := _holder(run)) and holder.process.machine == here and time.monotonic() - began < ORPHAN_SECONDS:
        if not told:
            work.say(f"{run.path.name}: waiting for an earlier attempt to save ({holder.who()})")
        told = True
        time.sleep(0.5)


def _holder(run: RunFolder) -> Claim | None:
    """The live attempt of a run, if there may be one: an attempt that ends says so, or takes over from a dead one first."""
    claims = ClaimFolder(run.lease)
    newest = [claims.read(key) for key in claims.listed()][-1:]
    return next((claim for claim in newest if claim.state == "live" and not is_gone(claim.process)), None)


def _by_signal(ended: Ended) -> bool:
    return ended.code >= 128


def _goal(step: int | None) -> str:
    return "training to the end" if step is None else f"training to step {step}"


def _told(result: Result) -> str:
    return result.why if result.loss is None else f"validation loss {result.loss:.4f} after step {result.step}"
