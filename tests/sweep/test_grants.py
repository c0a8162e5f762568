"""One budget over all trials: whatever several workers do and whenever they are killed, it is not passed."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.budget.claims import Claim
from finetune.budget.ledger import Ledger
from finetune.machine.price import MachinePrice
from finetune.machine.process import ProcessId
from finetune.run_folder import RunFolder
from finetune.sweep import turn
from finetune.sweep.folder import Result, Sweep, SweepFolder
from finetune.sweep.grants import Grant, Grants, Purse, purse
from finetune.sweep.turn import Machine, Nothing, Work
from finetune.sweep.workers import Worker
from tests.helpers.errors import raises

PRICE = MachinePrice(3.6, "as in this test")
"""US dollars per hour: a second costs a tenth of a cent."""
USD = 1.0
ROUNDING = 40 * 5e-7
"""Of the ledgers' three decimals of a second, at most."""
TRIALS, RUNGS = 6, (10, 20)


class FakeWorker:
    """A worker without files. dead: tokens of those that have died."""

    settle = 0.0

    def __init__(self, token: str, dead: set[str]) -> None:
        self.token, self._dead = token, dead

    def alive(self, tokens: Collection[str]) -> dict[str, Claim]:
        claim = Claim(1, "", "live", ProcessId("", 0, 0, ""), 60.0)
        return {token: claim for token in tokens if token not in self._dead and token != self.token}

    wait_for_signs = alive


@dataclass
class Program:
    """`finetune train` of a trial under its grant, on a ledger of its own. steps: of its run, which outlive it."""

    grant: Grant
    run: RunFolder
    spent_before: float
    seconds: float = 0.0
    log: Any = None

    def begin(self) -> None:
        ledger = Ledger(self.run.ledger)
        self.log = ledger.new_attempt(ledger.next_attempt(), machine={}, price=PRICE, resumed_step=None)
        self.log.begin(0.0)

    @property
    def left(self) -> float:
        """Seconds until its ceiling, by which its watchdog has stopped it."""
        assert self.grant.ceiling_usd is not None
        return max(0.0, (self.grant.ceiling_usd - self.spent_before) / PRICE.usd_per_hour * 3600 - self.seconds)

    def goes_on(self, seconds: float) -> None:
        self.seconds += min(seconds, self.left)
        self.log.heartbeat(self.seconds, None)


@dataclass
class Cloud:
    """Workers on one sweep. losses of trials do not matter here, only that there are some."""

    folder: SweepFolder
    sweep: Sweep
    workers: int
    usd: float = USD
    dead: set[str] = field(default_factory=set)
    running: dict[str, Program] = field(default_factory=dict)
    turns: int = 0

    def work(self, token: str) -> Work:
        machine = Machine(PRICE, False, None, interval_seconds=3.0, start_seconds=2.0)
        worker = cast("Worker", FakeWorker(token, self.dead))
        return Work(
            self.sweep, self.folder, worker, machine, self.usd, self.workers, lambda trial: (f"lora.r={trial}",), print
        )

    def turn(self, token: str) -> Grant | Nothing:
        self.turns += 1
        found = turn._next(self.work(token), self.turns)
        if isinstance(found, Grant):
            self.grants.write(found)
            run = self.folder.run_of(self.sweep, found.trial)
            self.running[token] = Program(found, run, Ledger(run.ledger).account().usd or 0.0)
            self.running[token].begin()
        return found

    @property
    def grants(self) -> Grants:
        return Grants(self.folder.path / "grants")

    def ends(self, token: str, *, reaches: bool, closes: bool) -> None:
        """The program ends, with its result or without; closes: unless the worker is killed before it closes the grant."""
        program = self.running.pop(token)
        program.log.end(program.seconds, "paused", None)
        if reaches:
            grant = program.grant
            self.folder.add_result(Result(grant.trial, grant.rung, 10, 1.0 + grant.trial, ""))
        if closes:
            self.grants.close(program.grant)
        else:
            self.dead.add(token)

    def spent(self) -> float:
        ledgers = [Ledger(self.folder.run_of(self.sweep, trial).ledger) for trial in range(TRIALS)]
        return sum(ledger.account().usd or 0.0 for ledger in ledgers)

    def could_spend(self) -> float:
        """With every program that runs going on to its ceiling."""
        return self.spent() + sum(program.left * PRICE.usd_per_hour / 3600 for program in self.running.values())


def make(folder: Path, workers: int = 2) -> Cloud:
    sweep = Sweep("s", {}, "", {}, "grid", TRIALS, 0, 2, list(RUNGS), [[f"lora.r={trial}"] for trial in range(TRIALS)])
    return Cloud(SweepFolder(folder, "s"), sweep, workers)


ACTIONS = st.lists(
    st.tuples(
        st.integers(0, 3),  # which worker
        st.sampled_from(["turn", "spends", "reaches", "stops", "killed", "killed while it closes", "crashes"]),
        st.integers(0, 400),  # seconds, whole ones: the ledger has three decimals
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(ACTIONS, st.integers(1, 4))
def test_no_interleaving_passes_the_budget(actions: list[tuple[int, str, int]], workers: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cloud = make(Path(folder), workers)
        lives = [0] * 4
        for number, action, seconds in actions:
            token = f"{number:08x}{lives[number]:08x}"
            if token not in cloud.running:
                cloud.turn(token)
            elif action == "spends":
                cloud.running[token].goes_on(seconds)
            elif action in ("reaches", "stops"):
                cloud.running[token].goes_on(seconds)
                cloud.ends(token, reaches=action == "reaches", closes=True)
            elif action == "killed while it closes":
                cloud.ends(token, reaches=True, closes=False)
                lives[number] += 1
            elif action in ("killed", "crashes"):
                cloud.running.pop(token).goes_on(seconds)
                cloud.dead.add(token)
                lives[number] += 1
            assert cloud.could_spend() <= USD + ROUNDING, (action, cloud.running)
        runs = {trial: cloud.folder.run_of(cloud.sweep, trial) for trial in range(TRIALS)}
        assert purse(USD, runs, cloud.folder.path / "ledger", {}).total_spent <= USD + ROUNDING


def test_a_share_for_each_worker(tmp_path: Path) -> None:
    cloud = make(tmp_path)
    first, second, third = (cloud.turn(f"{number:016x}") for number in (1, 2, 3))
    assert isinstance(first, Grant) and first.ceiling_usd == pytest.approx(0.5)
    assert isinstance(second, Grant) and second.ceiling_usd == pytest.approx(0.5)
    assert isinstance(third, Nothing) and third.why == "budget", "all dollars are reserved"
    cloud.running[f"{1:016x}"].goes_on(100)
    cloud.ends(f"{1:016x}", reaches=True, closes=True)
    again = cloud.turn(f"{1:016x}")
    assert isinstance(again, Grant) and again.ceiling_usd == pytest.approx(0.4), "what it did not spend came back"


def test_the_trial_of_a_dead_worker_keeps_its_dollars_and_is_taken_over_first(tmp_path: Path) -> None:
    cloud = make(tmp_path, workers=1)
    first = cloud.turn("a" * 16)
    assert isinstance(first, Grant) and first.ceiling_usd == USD
    assert isinstance(nothing := cloud.turn("b" * 16), Nothing) and nothing.why == "budget"
    cloud.running.pop("a" * 16).goes_on(300)
    cloud.dead.add("a" * 16)
    again = cloud.turn("b" * 16)
    assert isinstance(again, Grant) and (again.trial, again.ceiling_usd) == (first.trial, USD)


def test_a_kill_between_the_result_and_the_end_of_the_grant_reserves_nothing(tmp_path: Path) -> None:
    cloud = make(tmp_path, workers=1)
    cloud.turn("a" * 16)
    cloud.running["a" * 16].goes_on(100)
    cloud.ends("a" * 16, reaches=True, closes=False)
    found = cloud.turn("b" * 16)
    assert isinstance(found, Grant) and found.trial == 1 and found.ceiling_usd == pytest.approx(0.9)


def test_the_ceiling_of_a_taken_over_grant_is_not_lower_than_before() -> None:
    money = Purse(1.0, {0: 0.3}, {0: 0.9}, own=0.0)
    assert money.ceiling(0, workers=4, busy=0) == pytest.approx(0.9)
    assert Purse(1.0, {0: 0.3, 1: 0.4}, {0: 0.9}, own=0.05).ceiling(0, 4, 0) == pytest.approx(0.55), "if it is there"


def test_all_that_is_left_where_a_share_is_too_little(tmp_path: Path) -> None:
    cloud = make(tmp_path, workers=4)
    cloud.usd = 0.008
    found = cloud.turn("a" * 16)
    assert isinstance(found, Grant) and found.ceiling_usd == pytest.approx(0.008), "a quarter would be 2 s of the 5"


def test_without_a_budget_there_is_no_ceiling() -> None:
    money = Purse(None, {0: 5.0}, {}, own=0.0)
    assert money.ceiling(0, 1, 0) is None and math.isinf(money.left_for(0))


def test_the_sweeps_own_ledger_counts(tmp_path: Path) -> None:
    cloud = make(tmp_path, workers=1)
    ledger = Ledger(cloud.folder.path / "ledger", "sweep")
    log = ledger.new_attempt(1, machine={}, price=PRICE, resumed_step=None)
    log.begin(400.0)
    found = cloud.turn("a" * 16)
    assert isinstance(found, Grant) and found.ceiling_usd == pytest.approx(0.6)


def test_too_little_is_left(tmp_path: Path) -> None:
    """For a start and the time to a checkpoint, 5 s here, at a tenth of a cent a second."""
    cloud = make(tmp_path, workers=1)
    cloud.usd = 0.004
    found = cloud.turn("a" * 16)
    assert isinstance(found, Nothing) and found.why == "budget"
    assert (
        "$0.0000 of $0.004 are spent (measured hours x as in this test): too little is left for s-t00, which takes 2 s to start "
        "and 3 s to a checkpoint"
    ) in found.detail
    cloud.usd = 0.006
    assert isinstance(cloud.turn("a" * 16), Grant)


def broken(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return apply


@pytest.mark.parametrize(
    ("code", "damage"),
    [
        ("file.bad_json", lambda path: path.write_text(path.read_text()[:40])),
        ("file.bad_json", lambda path: path.write_text("[]")),
        ("sweep.bad_record", broken(lambda value: value.update(ceiling_usd="much"))),
        ("sweep.bad_record", broken(lambda value: value.update(ceiling_usd=-1))),
        ("sweep.bad_record", broken(lambda value: value.pop("trial"))),
    ],
)
def test_a_damaged_grant_ends_the_sweep(tmp_path: Path, code: str, damage: Callable[[Path], object]) -> None:
    """Its dollars are not known, so none are granted."""
    cloud = make(tmp_path)
    cloud.turn("a" * 16)
    (path,) = (cloud.folder.path / "grants").iterdir()
    damage(path)
    with raises(code):
        cloud.turn("b" * 16)


def test_half_a_write_is_no_grant(tmp_path: Path) -> None:
    cloud = make(tmp_path)
    cloud.turn("a" * 16)
    (cloud.folder.path / "grants" / ".grant-000002-bbbbbbbbbbbbbbbb.json.x.tmp").write_text('{"num')
    assert len(cloud.grants.newest()) == 1


def test_a_ledger_that_cannot_be_counted_ends_the_sweep(tmp_path: Path) -> None:
    cloud = make(tmp_path)
    cloud.turn("a" * 16)
    (cloud.folder.run_of(cloud.sweep, 0).ledger / "attempt-001.jsonl").write_text("nothing that can be read")
    with raises("sweep.bad_ledger"):
        cloud.turn("b" * 16)
