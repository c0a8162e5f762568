"""The lease under arbitrary interleavings: attempts start, end, are killed and paused, on clocks that neither agree nor run
equally fast, over a folder that shows each change to each machine after its own delay."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from finetune.budget.claims import Claim, Key, unknown
from finetune.budget.lease import Lease
from finetune.budget.takeover import Timing, acquiring
from finetune.errors import TakenOver, UserError
from finetune.machine.process import ProcessId

TIMING = Timing(lease=60.0, settle=6.0, patience=240.0)
DELAY = 5
"""The longest time, in seconds, until a change is visible to all: below `settle`, as on a bucket's mount."""
TICK = 1
MACHINES = 3
UNTOUCHED = TIMING.lease - TIMING.beat - DELAY - 2 * TICK
"""An attempt that is silent for less must never lose its run; the clocks differ in speed by 1%."""


@dataclass
class Shared:
    """What all machines see sooner or later. versions: of each claim, with the time at which each machine sees them."""

    now: float = 0.0
    versions: dict[Key, list[tuple[Claim, list[float]]]] = field(default_factory=dict)
    commits: list[Commit] = field(default_factory=list)
    delays: list[int] = field(default_factory=lambda: [0])
    taken: int = 0

    def seen_at(self, writer: int) -> list[float]:
        """When each machine sees what `writer` writes now; itself at once."""
        times = []
        for machine in range(MACHINES):
            self.taken += 1
            late = 0 if machine == writer else self.delays[self.taken % len(self.delays)]
            times.append(self.now + late)
        return times


@dataclass(frozen=True)
class Commit:
    step: int
    number: int
    at: float
    visible: list[float]
    machine: int

    @property
    def name(self) -> str:
        return f"step-{self.step}"


@dataclass
class View:
    """The claims as one machine sees them now."""

    shared: Shared
    machine: int

    def listed(self) -> list[Key]:
        return sorted(key for key in self.shared.versions if self._visible(key))

    def read(self, key: Key) -> Claim:
        found = self._visible(key)
        return found[-1] if found else unknown(key)

    def write(self, claim: Claim) -> None:
        """Versions of one file become visible in their order."""
        before = self.shared.versions.setdefault(claim.key, [])
        at = self.shared.seen_at(self.machine)
        if before:
            at = [max(new, old) for new, old in zip(at, before[-1][1], strict=True)]
        before.append((claim, at))

    def _visible(self, key: Key) -> list[Claim]:
        return [claim for claim, at in self.shared.versions[key] if at[self.machine] <= self.shared.now]


@dataclass
class Machine:
    """lease: of an attempt that has taken the run. pending: the step of a commit between its check and its write."""

    index: int
    shared: Shared
    skew: float
    rate: float
    paused: bool = False
    acquiring: Generator[float, None, Claim] | None = None
    wake: float = 0.0
    lease: Lease | None = None
    silent: float = 0.0
    longest_silence: float = 0.0
    pending: int | None = None
    refused: int = 0
    listed_at: float = 0.0

    def clock(self) -> float:
        return self.skew + self.rate * self.shared.now

    @property
    def idle(self) -> bool:
        return self.acquiring is None and self.lease is None

    @property
    def holds(self) -> bool:
        return self.lease is not None and self.lease.lost is None

    def heritage(self) -> tuple[dict[str, str], int]:
        self.listed_at = self.shared.now
        seen = [commit for commit in self.shared.commits if commit.visible[self.index] <= self.shared.now]
        return {commit.name: str(commit.number) for commit in seen}, max([0, *(commit.number for commit in seen)])

    def start(self, token: str) -> None:
        me = ProcessId(f"m{self.index}", 1, 1, f"m{self.index}")
        wanted = Claim(0, token, "candidate", me, TIMING.lease)
        view = View(self.shared, self.index)
        self.acquiring = acquiring(
            view, wanted, TIMING, clock=self.clock, gone=lambda claim: False, heritage=self.heritage
        )
        self.wake = self.shared.now

    def tick(self) -> None:
        if self.paused:
            self.silent += TICK
            self.longest_silence = max(self.longest_silence, self.silent)
            return
        if self.acquiring is not None and self.shared.now >= self.wake:
            try:
                self.wake = self.shared.now + max(TICK, next(self.acquiring))
            except StopIteration as end:
                self.lease, self.acquiring = Lease(lambda line: None, self.clock), None
                self.lease.begin(View(self.shared, self.index), end.value)
                self.silent = self.longest_silence = 0.0
                self.wake = self.shared.now + TIMING.beat
            except UserError as error:
                assert error.code == "run.held"
                self.acquiring, self.refused = None, self.refused + 1
        elif self.lease is not None and self.shared.now >= self.wake:
            self.lease.beat()
            self.silent, self.wake = 0.0, self.shared.now + TIMING.beat

    def stop(self, *, cleanly: bool) -> None:
        if self.lease is not None and cleanly and self.lease.lost is None:
            self.lease._end()
        self.acquiring = self.lease = self.pending = None
        self.paused = False


numbers = st.integers(0, MACHINES - 1)


class LeaseMachine(RuleBasedStateMachine):
    @initialize(
        skews=st.lists(st.integers(-(10**6), 10**6), min_size=MACHINES, max_size=MACHINES),
        rates=st.lists(st.sampled_from([0.99, 1.0, 1.01]), min_size=MACHINES, max_size=MACHINES),
        delays=st.lists(st.integers(0, DELAY), min_size=1, max_size=7),
    )
    def begin(self, skews: list[int], rates: list[float], delays: list[int]) -> None:
        self.shared = Shared(delays=delays)
        self.machines = [
            Machine(index, self.shared, float(skew), rate)
            for index, (skew, rate) in enumerate(zip(skews, rates, strict=True))
        ]
        self.takeovers: list[tuple[int, float]] = []  # (number, when its heritage was listed)
        self.tokens = self.steps = 0

    @rule(seconds=st.sampled_from([1, 2, 3, 7, 15, 40, 75]))
    def time_passes(self, seconds: int) -> None:
        for _ in range(0, seconds, TICK):
            self.shared.now += TICK
            for machine in self.machines:
                held = machine.lease
                machine.tick()
                if machine.lease is not None and machine.lease is not held:
                    self.takeovers.append((machine.lease.number, machine.listed_at))
            self.nobody_is_robbed()
        self.together = seconds

    @rule(index=numbers, token=st.integers(0, 15), then=st.sampled_from([0, 1, 8, 75]))
    def an_attempt_starts(self, index: int, token: int, then: int = 0) -> None:
        machine = self.machines[index]
        if machine.idle and not machine.paused:
            self.tokens += 1
            machine.start(f"{token:08x}{self.tokens:08x}")
            self.time_passes(then)

    @rule(index=numbers)
    def one_is_paused(self, index: int) -> None:
        self.machines[index].paused = not self.machines[index].idle

    @rule(index=numbers)
    def one_comes_back(self, index: int) -> None:
        machine = self.machines[index]
        if machine.paused:
            machine.paused, machine.wake = False, min(machine.wake, self.shared.now)

    @rule(other=numbers, away=st.sampled_from([20, 50, 70, 90]), checked=st.booleans(), soon=st.booleans())
    def the_holder_is_paused_while_another_starts(self, other: int, away: int, checked: bool, soon: bool) -> None:
        """In the middle of a commit, or not; and what it was about to write is written first of all, or not."""
        for machine in self.machines:
            if machine.holds and not machine.paused and machine.index != other:
                if checked:
                    self.a_commit_is_checked(machine.index)
                self.one_is_paused(machine.index)
                self.an_attempt_starts(other, 0)
                self.time_passes(away)
                self.one_comes_back(machine.index)
                if soon:
                    self.a_commit_is_written(machine.index)
                self.time_passes(15)
                return

    @rule(index=numbers, cleanly=st.booleans())
    def one_ends(self, index: int, cleanly: bool) -> None:
        if not self.machines[index].paused or not cleanly:
            self.machines[index].stop(cleanly=cleanly)

    @rule(index=numbers)
    def a_commit_is_checked(self, index: int) -> None:
        machine = self.machines[index]
        if machine.lease is None or machine.paused or machine.pending is not None:
            return
        try:
            machine.lease.check()
        except TakenOver:
            return
        self.steps += 1
        machine.pending = self.steps

    @rule(index=numbers)
    def a_commit_is_written(self, index: int) -> None:
        machine = self.machines[index]
        if machine.lease is None or machine.paused or machine.pending is None:
            return
        at = self.shared.seen_at(index)
        self.shared.commits.append(Commit(machine.pending, machine.lease.number, self.shared.now, at, index))
        machine.pending = None

    @precondition(lambda self: all(machine.idle for machine in self.machines))
    @rule(index=numbers)
    def a_run_without_attempts_can_always_be_taken(self, index: int) -> None:
        self.an_attempt_starts(index, 0)
        self.time_passes(75)
        self.time_passes(15)
        assert self.machines[index].holds

    def nobody_is_robbed(self) -> None:
        """An attempt that renews its lease keeps its run, whatever the others do."""
        for machine in self.machines:
            if machine.lease is not None and machine.lease.lost is not None:
                assert machine.longest_silence > UNTOUCHED, (machine.longest_silence, self.shared.now)

    @invariant()
    def at_most_one_holds_the_run(self) -> None:
        """Of those that are awake, once they had the time to look."""
        if getattr(self, "together", 0) > TIMING.beat + DELAY + TICK:
            awake = [machine for machine in self.machines if machine.holds and not machine.paused]
            assert len(awake) <= 1, [machine.index for machine in awake]
            self.together = 0

    @invariant()
    def what_counts_is_one_history(self) -> None:
        """The newest holder passes over exactly the commits that came after a later takeover, and none that came well before."""
        if not hasattr(self, "machines"):
            return
        holders = [machine for machine in self.machines if machine.holds and machine.lease is not None]
        if not holders:
            return
        newest = max(holders, key=lambda machine: machine.lease.number if machine.lease else 0)
        lease: Any = newest.lease
        for commit in self.shared.commits:
            later = [listed for number, listed in self.takeovers if commit.number < number <= lease.number]
            late = lease.too_late(commit.name, commit.number, str(commit.number))
            if any(commit.at > listed for listed in later):
                assert late, (commit, later)
            elif all(commit.at < listed - DELAY for listed in later):
                assert not late, (commit, later)


TestLease = LeaseMachine.TestCase
TestLease.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
