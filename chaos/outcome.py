"""The outcome of all runs: violations, a table, and the totals below it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from chaos import checks
from chaos.attempt import HEARTBEAT_SECONDS
from chaos.environment import USD_PER_HOUR
from chaos.soak import Run
from finetune.runtime.table import aligned


@dataclass(frozen=True)
class Outcome:
    """All runs of a session. whole: the uninterrupted run of each kind, by name. full_disk, provisioned: None if skipped."""

    whole: dict[str, Run]
    killed: list[Run]
    full_disk: Run | None
    provisioned: tuple[Run, checks.Spend] | None
    requested: int
    places_missed: list[str]
    seconds: float

    @property
    def all_killed(self) -> list[Run]:
        return [*self.own_meter, *([self.provisioned[0]] if self.provisioned else [])]

    @property
    def own_meter(self) -> list[Run]:
        """The runs whose attempts are billed only for their own time."""
        return [*self.killed, *([self.full_disk] if self.full_disk else [])]


def violations(outcome: Outcome) -> list[str]:
    found = [line for run in outcome.whole.values() for line in checks.check_end(run)]
    for run in outcome.all_killed:
        whole = outcome.whole[run.kind.name]
        found += [
            *checks.check_end(run),
            *checks.check_weights(run, whole),
            *checks.check_losses(run),
            *checks.check_curves(run, whole),
            *checks.check_orphans(run),
        ]
    found += checks.check_spend([*outcome.whole.values(), *outcome.own_meter], USD_PER_HOUR)
    if outcome.provisioned:
        found += checks.check_provisioned(outcome.provisioned[0].name, outcome.provisioned[1])
    if _kills(outcome.killed) < outcome.requested:
        found.append(f"only {_kills(outcome.killed)} of {outcome.requested} requested kills happened")
    if outcome.places_missed:
        found.append(f"no attempt was killed at: {', '.join(outcome.places_missed)}")
    return found


def table(outcome: Outcome) -> list[str]:
    """One line per run."""
    columns: list[tuple[str, Callable[[Run], object]]] = [
        ("run", lambda run: run.name),
        ("attempts", lambda run: len(run.lives)),
        ("kills", lambda run: len(run.kills)),
        ("damaged", lambda run: sum(bool(life.damage) for life in run.lives)),
        ("largest loss", _largest_loss),
        ("ledger", lambda run: f"{_spend(run, outcome).error:+.2%}"),
        ("adapter", lambda run: (run.adapter or "none")[:12]),
        ("as uninterrupted", lambda run: "yes" if _same(run, outcome) else "NO"),
    ]
    rows = [[str(value(run)) for _, value in columns] for run in [*outcome.whole.values(), *outcome.all_killed]]
    rows.insert(0, [name for name, _ in columns])
    return aligned(rows)


def _largest_loss(run: Run) -> str:
    found = [loss for loss in checks.losses(run) if not loss.corrupt]
    if not found:
        return "-"
    worst = max(found, key=lambda loss: loss.steps)
    return f"{worst.steps} of {worst.interval}" + (f"+{worst.in_copy}" if worst.in_copy else "")


def figures(outcome: Outcome) -> list[str]:
    by_name = Counter(life.attempt.kill.name for run in outcome.all_killed for life in run.kills if life.attempt.kill)
    damaged = sum(len(life.damage) for run in outcome.killed for life in run.lives)
    total = checks.spend([*outcome.whole.values(), *outcome.own_meter])
    provisioned = outcome.provisioned[1] if outcome.provisioned else None
    return [
        "kills: " + ", ".join(f"{count} {name}" for name, count in by_name.most_common()),
        f"damaged between attempts: {damaged} checkpoints; restarts because none was left intact: {_restarts(outcome)}",
        f"spend: ledger {total.booked:.1f} s, clock {total.real:.1f} s ({total.error:+.2%}); a kill between two heartbeats of "
        f"{HEARTBEAT_SECONDS:g} s loses at most that: {total.allowance:.2%} over {total.kills} kills",
        f"not booked: {total.unbooked:.1f} s of attempts that died before their first line in the ledger, {total.teardown:.1f} s "
        "of process shutdown after the last line",
        "full disk: " + ("filled, resumed on, freed" if outcome.full_disk else "skipped"),
        "provisioned machine, including idle time and early kills: "
        + (
            f"ledger {provisioned.booked:.1f} s, clock {provisioned.real:.1f} s ({provisioned.error:+.2%})"
            if provisioned
            else "skipped"
        ),
    ]


def verdict(outcome: Outcome, found: Sequence[str]) -> str:
    counted = [loss for run in outcome.killed for loss in checks.losses(run) if not loss.corrupt]
    largest = max((loss.steps for loss in counted), default=0)
    same = sum(_same(run, outcome) for run in outcome.all_killed)
    head = "everything held" if not found else f"{len(found)} VIOLATIONS"
    return (
        f"chaos: {head}: {_kills(outcome.all_killed)} kills in {len(outcome.all_killed)} runs, {same} of them with the "
        f"adapter of the uninterrupted run, largest loss {largest} steps, {outcome.seconds:.0f} s"
    )


def _same(run: Run, outcome: Outcome) -> bool:
    return not checks.check_weights(run, outcome.whole[run.kind.name])


def _spend(run: Run, outcome: Outcome) -> checks.Spend:
    return outcome.provisioned[1] if outcome.provisioned and outcome.provisioned[0] is run else checks.spend([run])


def _kills(runs: Sequence[Run]) -> int:
    return sum(len(run.kills) for run in runs)


def _restarts(outcome: Outcome) -> int:
    lives = [pair for run in outcome.killed for pair in zip(run.lives, run.lives[1:], strict=False)]
    return sum(bool(before.damage) and before.left == 0 and life.attempt.resumed == 0 for before, life in lives)
