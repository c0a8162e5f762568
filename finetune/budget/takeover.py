"""When an attempt may take over a run: the protocol of the lease (lease.py), without threads, files and waiting.

A run is free when the last live attempt has ended and says so, or is certainly gone, or has not changed its claim for the length
of the lease. An attempt then writes a claim as a candidate, waits until everyone must see it, and looks again: if the old one has
come back, or another candidate is higher, it withdraws; if another one is lower, it waits for that one's decision.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, replace

from finetune.budget.claims import Claim, Claims, Key, next_number
from finetune.errors import TransientError, UserError

LEASE_SECONDS = 60.0
"""What an attempt that was killed on another machine costs the next one, at most. SkyPilot's mounts show changes after 5 s."""
BEATS = 6
"""Heartbeats in the length of a lease."""
SETTLE_SECONDS = 6.0
"""After this time a new file is visible to everyone, on a bucket or network disk; a tenth of a shorter lease."""
PATIENCE_SECONDS = 240.0
"""How long a recovery of a managed job waits for its old machine: longer than the 180 s that a job has for its last save."""

Heritage = tuple[Mapping[str, str], int]
"""The checkpoints now: folder's name -> hash of the manifest; and the highest number of an attempt in them."""


@dataclass(frozen=True)
class Timing:
    """lease, settle, patience: in seconds, as the constants above."""

    lease: float = LEASE_SECONDS
    settle: float = SETTLE_SECONDS
    patience: float = PATIENCE_SECONDS

    @property
    def poll(self) -> float:
        return min(1.0, self.lease / 20)

    @property
    def beat(self) -> float:
        return self.lease / BEATS


class Observer:
    """Judges from one clock whether other attempts are alive. gone: whether a claim's process has certainly ended."""

    def __init__(self, timing: Timing, clock: Callable[[], float], gone: Callable[[Claim], bool]) -> None:
        self._timing, self._clock, self._gone = timing, clock, gone
        self._first: dict[Key, float] = {}
        self._seen: dict[Key, tuple[Claim, float]] = {}
        self._alive: set[Key] = set()

    def is_dead(self, claim: Claim) -> bool:
        now, before = self._clock(), self._seen.get(claim.key)
        first = self._first.setdefault(claim.key, now)
        if before is None or before[0] != claim:
            if (
                before is not None and now - first >= self._timing.settle
            ):  # an earlier change may be of one that died since
                self._alive.add(claim.key)
            self._seen[claim.key] = claim, now
            before = None
        if self._gone(claim):
            return True
        return before is not None and now - before[1] >= max(self._timing.lease, claim.seconds)

    def was_seen_alive(self, claim: Claim) -> bool:
        """Whether its claim was changed since we began to look."""
        return claim.key in self._alive


def acquiring(
    claims: Claims,
    wanted: Claim,
    timing: Timing,
    *,
    clock: Callable[[], float],
    gone: Callable[[Claim], bool],
    heritage: Callable[[], Heritage],
    waits: Callable[[Claim], None] = lambda claim: None,
) -> Generator[float, None, Claim]:
    """Takes the lease: yields seconds to wait, and returns the claim, which is then live. waits: told about the claim that it
    waits for. Raises UserError (run.held) for a run that another attempt holds."""
    observer, began = Observer(timing, clock, gone), clock()
    while True:
        while (other := _first(_in_the_way(claims), observer)) is not None:
            _refuse_if_held(other, wanted, observer, clock() - began, timing)
            waits(other)
            yield timing.poll
        mine = replace(wanted, number=next_number(claims.listed(), heritage()[1]), state="candidate")
        claims.write(mine)
        yield timing.settle
        while (rival := _first(_rivals(claims, mine), observer)) is not None:
            if rival.state == "live" or rival.key > mine.key:
                break
            yield timing.settle  # a lower candidate: it sees ours, and withdraws or goes on
        if rival is None:
            mine = replace(mine, state="live", inherits=heritage()[0])
            claims.write(mine)
            if not any(claim.took_over for claim in above(claims, mine.key)):
                return mine
        claims.write(replace(mine, state="withdrawn"))
        yield timing.poll


def _in_the_way(claims: Claims) -> list[Claim]:
    """The claims that may be of a running attempt: those since the last one that was ever live."""
    found: list[Claim] = []
    for key in reversed(claims.listed()):
        claim = claims.read(key)
        if claim.state != "withdrawn":
            found.append(claim)
        if claim.took_over:
            break
    return [claim for claim in found if claim.state != "ended"]


def _rivals(claims: Claims, mine: Claim) -> list[Claim]:
    return [claim for claim in _in_the_way(claims) if claim.key != mine.key]


def above(claims: Claims, key: Key) -> list[Claim]:
    return [claims.read(other) for other in claims.listed() if other > key]


def _first(found: Iterable[Claim], observer: Observer) -> Claim | None:
    """The first one that is not dead; every one is looked at, so that the time of each is taken."""
    return next(iter([claim for claim in found if not observer.is_dead(claim)]), None)


def _refuse_if_held(other: Claim, mine: Claim, observer: Observer, waited: float, timing: Timing) -> None:
    """A second launch of a run that is alive is a mistake: exit code 2, at once. A recovery of the same managed job waits,
    because its old machine is about to end, and is retried (75) if that takes too long."""
    if not observer.was_seen_alive(other):
        return
    if not mine.task or mine.task != other.task:
        raise UserError(
            f"this run is being trained already ({other.who()}); nothing was changed: wait for its end, stop it there, or choose "
            "another name for a new run",
            code="run.held",
        )
    if waited >= timing.patience:
        raise TransientError(
            f"this run is still being trained by an earlier machine of this job ({other.who()}) after {waited:.0f} s; nothing "
            "was changed",
            code="run.held",
        )
