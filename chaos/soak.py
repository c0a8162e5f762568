"""A run from its first attempt to its last, with what a managed job does between attempts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from chaos.attempt import Action, EndedProcess, Kill, Machine, attempt
from chaos.damage import damage_checkpoints
from chaos.environment import ChaosEnvironment, Kind
from chaos.observe import (
    Curve,
    adapter_hash,
    booked,
    checkpoints,
    history,
    in_flight,
    newest_local,
    newest_whole,
    orphans,
    spent_usd,
    tensorboard,
)
from chaos.plan import Plan
from finetune.budget.lease import clear_not_started
from finetune.errors import EXIT_OK, EXIT_TRANSIENT, UserError
from finetune.run_folder import RunFolder

MAX_ATTEMPTS = 60
Say = Callable[[str], None]


@dataclass(frozen=True)
class Life:
    """An attempt and the state of the run after it.

    whole: step of the newest intact checkpoint. in_flight: steps of later saves that had begun. left: the step that the next
    attempt must resume from, after any damage and loss of the machine: that of the newest intact checkpoint, or of a newer
    staged save if the machine still exists. booked: seconds in the ledger, None if it has no line there.
    """

    attempt: EndedProcess
    whole: int
    in_flight: tuple[int, ...]
    damage: tuple[str, ...]
    left: int
    booked: float | None
    full_disk: bool = False


@dataclass
class Run:
    """All attempts of a run, and its result. fault: why the harness gave up on it, None if it finished."""

    name: str
    kind: Kind
    folder: Path
    lives: list[Life] = field(default_factory=list)
    fault: str | None = None
    adapter: str | None = None
    losses: Curve = field(default_factory=list)
    tensorboard: Curve = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    spent_usd: float = 0.0

    @property
    def kills(self) -> list[Life]:
        return [life for life in self.lives if life.attempt.killed]


@dataclass
class Harness:
    """Executes runs. runs: their folder, which represents the bucket."""

    environment: ChaosEnvironment
    machine: Machine
    runs: Path
    say: Say

    def folder(self, name: str) -> Path:
        return self.runs / name

    def one_attempt(
        self, run: Run, kill: Kill | None, *, action: Action | None = None, full_disk: bool = False
    ) -> EndedProcess:
        """What a managed job does, following on_machine/train.sh: start a new run, or resume one that has a run.json."""
        before = set(booked(run.folder))
        begun = (run.folder / "run.json").is_file()
        if not begun:
            _remove_not_started(run.folder)
        config = self.environment.config(run.kind, run.name, self.runs)
        arguments = ["--resume", str(run.folder)] if begun else [str(config)]
        log = self.environment.folder / "logs" / f"{run.name}-{len(run.lives) + 1:02d}.log"
        made = attempt(self.machine, arguments, run.folder, kill, log, action)
        whole = newest_whole(run.folder)
        now = booked(run.folder)
        mine = [seconds for name, seconds in now.items() if name not in before]
        unfinished = tuple(in_flight(run.folder, self.machine.temporary))
        left = max(whole, newest_local(self.machine.temporary))
        life = Life(made, whole, unfinished, (), left, sum(mine) if mine else None, full_disk)
        run.lives.append(life)
        self.say(f"{run.name} {describe(life)}")
        return made

    def replace_machine(self) -> None:
        shutil.rmtree(self.machine.folder)
        self.machine.folder.mkdir()

    def close(self, run: Run) -> Run:
        """Read the result of a run."""
        if run.fault is None:
            run.adapter = adapter_hash(run.folder)
            run.losses, run.tensorboard = history(run.folder), tensorboard(run.folder)
            run.orphans = orphans(run.folder)
            run.spent_usd = spent_usd(run.folder)
        return run


class NoRunRecord(Exception):
    """The run's folder holds files but no run.json: on_machine/train.sh does not touch it, so the run is stuck."""


def uninterrupted(harness: Harness, kind: Kind) -> Run:
    """The reference run that all others of its kind must equal."""
    run = Run(f"{kind.name}-whole", kind, harness.folder(f"{kind.name}-whole"))
    made = harness.one_attempt(run, None)
    if made.code != EXIT_OK:
        run.fault = f"exit code {made.code}: {last_line(made.output)}"
    return harness.close(run)


def killed_repeatedly(harness: Harness, kind: Kind, name: str, plan: Plan) -> Run:
    """A run that is killed as often as the plan's quota says and then finishes undisturbed."""
    run = Run(name, kind, harness.folder(name))
    quota = plan.quota()
    while len(run.lives) < MAX_ATTEMPTS:
        begins_at, done = newest_whole(run.folder), len(run.kills)
        first, last = not run.lives, done + 1 == quota
        kill = plan.kill(kind, begins_at, first=first, last=last) if done < quota else None
        try:
            made = harness.one_attempt(run, kill)
        except NoRunRecord as error:
            run.fault = str(error)
            break
        if made.killed and kill and not made.hung:
            plan.happened(kill)
            _between_attempts(harness, run, plan)
            continue
        if kill:
            plan.missed(kill)
        if made.code == EXIT_TRANSIENT and kill and kill.how == "notice":
            continue
        ended = made.code == EXIT_OK or made.finished  # `finetune job train` leaves a run that is done alone
        if made.hung or not ended:
            run.fault = "hung" if made.hung else f"exit code {made.code}: {last_line(made.output)}"
        break
    else:
        run.fault = f"no end after {MAX_ATTEMPTS} attempts"
    return harness.close(run)


def _between_attempts(harness: Harness, run: Run, plan: Plan) -> None:
    """Damage checkpoints and replace the machine between attempts, as the plan says."""
    target = plan.damage(bool(checkpoints(run.folder)))
    damage = tuple(damage_checkpoints(run.folder, target, plan.draws)) if target else ()
    if plan.new_machine():
        harness.replace_machine()
    for line in damage:
        harness.say(f"    {line}")
    left = max(newest_whole(run.folder), newest_local(harness.machine.temporary))
    run.lives[-1] = replace(run.lives[-1], damage=damage, left=left)


def _remove_not_started(folder: Path) -> None:
    try:
        clear_not_started(RunFolder(folder), print)
    except UserError as error:
        raise NoRunRecord(f"{error}: a managed job cannot resume it") from error


def describe(life: Life) -> str:
    made = life.attempt
    end = "killed" if made.killed else "finished" if made.finished else f"exit {made.code}"
    by = f" ({made.kill.name})" if made.kill else ""
    steps = f"step {made.resumed if made.resumed is not None else '?'} to {made.done if made.done is not None else '?'}"
    saving = f", saving {', '.join(map(str, life.in_flight))}" if life.in_flight else ""
    return f"{end}{by} after {made.seconds:.1f} s, {steps}, whole {life.whole}{saving}"


def last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "(no output)"
