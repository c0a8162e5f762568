"""The least budget with which a job of ours begins on a machine. With less it refuses when the machine has booted and is set up,
which is paid by then.

What is asked of the machine's first minutes is the job's own rule (budget/meter.py: check_start), with the boot and set-up that
`finetune plan` counts. What earlier machines of the same run have spent is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from finetune.budget.attempts import Account
from finetune.budget.meter import Meter
from finetune.budget.run_budget import MIN_MINUTES
from finetune.cloud.launch.candidates import Candidate, rounded_up
from finetune.cloud.launch.our_job import DEV, EVALUATE, SERVE, SWEEP, TRAIN
from finetune.config.schema import RunConfig
from finetune.job.serve import LEAST_SECONDS
from finetune.machine.billed_time import MachineTime
from finetune.machine.price import Ceilings, MachinePrice
from finetune.runtime.quantities import duration

ANY_SECONDS = 1.0
"""For a job that only has to have something left when it begins."""


@dataclass(frozen=True)
class Start:
    """What has to be left of a budget when a job begins. key: of the budget, usd. set_up_seconds: of boot and set-up. seconds: of
    work; work, before: what it is, and what comes after it, as text. restarts: whether the start of another machine is kept in
    reserve on spot."""

    key: str
    usd: float
    set_up_seconds: float
    seconds: float
    work: str
    before: str
    restarts: bool

    def refusal(self, candidate: Candidate, dearest_usd_per_hour: float) -> str:
        """Why the job does not begin there, with the least budget that would do; "" if it does. dearest_usd_per_hour: of the
        machines on which it may go on."""
        restarts = self.restarts and candidate.offer.spot
        meter = Meter(
            Account(()),
            MachineTime(provisioned=False, age=_clock(self.set_up_seconds)),
            MachinePrice(candidate.job_usd_per_hour, ""),
            Ceilings(run_usd=self.usd),
            restart_usd_per_hour=dearest_usd_per_hour if restarts else None,
        )
        if meter.check_start(self.seconds) is None:
            return ""
        source = "estimated; plan.setup_minutes sets it" if self.restarts else "estimated"
        parts = [f"{duration(self.set_up_seconds)} of boot and set-up ({source})"]
        parts += [f"{duration(self.seconds)} {self.work}"] if self.seconds > ANY_SECONDS else []
        parts += ["what is reserved for a restart after a preemption"] if restarts else []
        least = rounded_up(meter.least_usd(self.seconds))
        return (
            f"{self.key}={self.usd:g} would be used up before {self.before}: {least:.2f} pays for {' and '.join(parts)}"
        )


def _clock(seconds: float) -> Callable[[], float]:
    """Of a machine whose set-up is over."""
    return lambda: seconds


def starts_of(
    job: str, budget: float, daily: float | None, set_up_minutes: float, config: RunConfig | None
) -> list[Start]:
    """One for each budget that the job looks at when it begins. daily: MAX_USD_PER_DAY, None without one. config: of a run that
    is to begin; None for one that is there, which may have nothing left to train."""
    set_up = 60 * set_up_minutes
    if job in (TRAIN, SWEEP):
        minutes = (config.checkpoint.every_minutes or MIN_MINUTES) if config else ANY_SECONDS / 60
        return [Start("MAX_RUN_USD", budget, set_up, 60 * minutes, "to a checkpoint", "a checkpoint", restarts=True)]
    if job not in (EVALUATE, SERVE, DEV):
        return []
    starts = [Start("MAX_RUN_USD", budget, set_up, ANY_SECONDS, "", "the job begins", restarts=False)]
    if job == SERVE and daily is not None:
        starts.append(
            Start("MAX_USD_PER_DAY", daily, set_up, LEAST_SECONDS, "to load the model", "it serves", restarts=False)
        )
    return starts


def refuse_small_budgets(found: Sequence[Candidate], starts: Sequence[Start]) -> list[Candidate]:
    """The candidates in their order; those on which the job would not begin are refused.

    A restart is reserved on the dearest machine of the launch, so those that are too dear by themselves are left out first.
    """
    alone = [_refused(candidate, starts, candidate.job_usd_per_hour) for candidate in found]
    dearest = max((candidate.job_usd_per_hour for candidate in alone if not candidate.refusal), default=0.0)
    return [_refused(candidate, starts, dearest) for candidate in alone]


def _refused(candidate: Candidate, starts: Sequence[Start], dearest: float) -> Candidate:
    refusals = [candidate.refusal, *(start.refusal(candidate, dearest) for start in starts if not candidate.refusal)]
    return replace(candidate, refusal=next(filter(None, refusals), ""))
