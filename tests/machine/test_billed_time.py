"""The billed seconds of an attempt: from boot or from its own start, never twice, independent of the wall clock."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune.machine import billed_time
from finetune.machine.billed_time import MARKER, MachineTime, machine_age, machine_identity, process_age
from tests.helpers.errors import raises


class Age:
    """A machine's age that a test sets."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def __call__(self) -> float:
        return self.seconds


def write_marker(home: Path, text: str) -> None:
    (home / MARKER).parent.mkdir(parents=True, exist_ok=True)
    (home / MARKER).write_text(text)


def test_a_machine_is_as_old_as_its_first_process() -> None:
    line = subprocess.run(
        ["ps", "-o", "etimes=", "-p", "1"], check=False, capture_output=True, text=True
    ).stdout.strip()
    age = machine_age()
    assert age is not None
    if not line:
        pytest.skip("no ps here to compare with")
    assert age == pytest.approx(float(line), abs=2)


def test_a_process_is_as_old_as_it_runs() -> None:
    program = (
        "import time; time.sleep(0.5); from finetune.machine.billed_time import process_age as age; before = age(); "
        "time.sleep(0.3); print(before, age())"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    before, after = map(float, done.stdout.split())
    assert 0.5 <= before < 5 and 0.3 <= after - before < 1


def test_a_cloud_machine_is_billed_from_its_boot(tmp_path: Path) -> None:
    age = machine_age()
    assert age is not None and MachineTime(provisioned=True, home=tmp_path).seconds() == pytest.approx(age, abs=5)
    own = MachineTime(provisioned=False, home=tmp_path)
    assert own.seconds() == pytest.approx(process_age(), abs=5)
    own.take()
    own.mark()
    assert not (tmp_path / MARKER).exists()


def test_a_second_attempt_is_billed_from_the_last_heartbeat_of_the_first(tmp_path: Path) -> None:
    age = Age(300.0)  # boot and set-up
    first = MachineTime(provisioned=True, home=tmp_path, age=age)
    age.seconds = 400.0
    assert first.take() == 400.0
    first.mark()
    age.seconds = 430.0  # killed here, 30 s after its last heartbeat
    age.seconds = 1000.0  # the machine stood idle
    second = MachineTime(provisioned=True, home=tmp_path, age=age)
    assert second.seconds() == 600.0
    age.seconds = 1010.0
    assert second.seconds() == second.take() == 610.0


def test_two_runs_at_the_same_time_share_the_seconds(tmp_path: Path) -> None:
    age = Age(100.0)
    one, two = (MachineTime(provisioned=True, home=tmp_path, age=age) for _ in range(2))
    assert one.take() == 100.0
    one.mark()
    age.seconds = 130.0
    assert two.take() == 30.0
    two.mark()
    age.seconds = 160.0
    assert one.seconds() == 160.0  # until it reads the marker
    assert one.take() == 130.0 and two.take() == 60.0  # both before either has marked: the dearer reading


def test_what_was_not_marked_is_billed_to_the_next(tmp_path: Path) -> None:
    """The ledger could not be written, so the marker was not either: the seconds are not lost."""
    age = Age(100.0)
    MachineTime(provisioned=True, home=tmp_path, age=age).take()
    assert MachineTime(provisioned=True, home=tmp_path, age=age).take() == 100.0


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '{"seconds": 50}',
        json.dumps({"machine": "another boot/0.22", "seconds": 50}),
        json.dumps({"machine": machine_identity(), "seconds": 101}),  # ahead
        json.dumps({"machine": machine_identity(), "seconds": -1}),
        json.dumps({"machine": machine_identity(), "seconds": "soon"}),
        json.dumps({"machine": machine_identity(), "seconds": None}),
        json.dumps({"machine": machine_identity(), "seconds": float("nan")}),
        '{"machine": "\\udcff", "seconds": 1}',
    ],
)  # fmt: skip
def test_an_invalid_marker_is_ignored(text: str, tmp_path: Path) -> None:
    write_marker(tmp_path, text)
    assert MachineTime(provisioned=True, home=tmp_path, age=Age(100.0)).seconds() == 100.0
    write_marker(tmp_path, json.dumps({"machine": machine_identity(), "seconds": 50}))
    assert MachineTime(provisioned=True, home=tmp_path, age=Age(100.0)).seconds() == 50.0


def test_a_marker_that_cannot_be_written_is_a_user_error_and_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / MARKER.parts[0]).write_text("a file where the folder belongs")
    mine = MachineTime(provisioned=True, home=tmp_path, age=Age(100.0))
    assert mine.take() == 100.0
    with raises("disk.error", match=r"\.finetune: "):
        mine.mark()
    assert mine.take() == 100.0


def test_the_wall_clock_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for provisioned in (True, False):
        mine = MachineTime(provisioned=provisioned, home=tmp_path)
        before = mine.seconds()
        for jump in (-1e9, 1e9):
            monkeypatch.setattr(time, "time", lambda jump=jump: 1.8e9 + jump)
            assert mine.seconds() == pytest.approx(before, abs=5)
            assert mine.take() == pytest.approx(before, abs=5)


def test_without_proc_the_time_since_loading_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(billed_time, "_started", lambda process: None)
    assert machine_age() is None and machine_identity() is None
    mine = MachineTime(provisioned=True, home=tmp_path)
    assert 0 < mine.seconds() == pytest.approx(process_age(), abs=5)
    mine.mark()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["begin", "beat", "kill"]), st.integers(0, 2), st.floats(0.0, 500.0)), max_size=30
    )
)
@example([("begin", 0, 5.0), ("begin", 1, 5.0), ("beat", 0, 5.0), ("beat", 1, 5.0), ("beat", 0, 5.0)])
@example([("begin", 0, 5.0), ("beat", 0, 5.0), ("kill", 0, 5.0), ("begin", 1, 5.0), ("beat", 1, 5.0)])
def test_the_seconds_of_all_attempts_are_those_of_the_machine(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, int, float]]
) -> None:
    """For any interleaving of runs, consecutive or concurrent, the recorded seconds sum up to the last recorded age."""
    home, age = tmp_path_factory.mktemp("home"), Age(12.0)
    running: dict[int, tuple[int, MachineTime]] = {}  # by run: number of the attempt, its time
    told: dict[int, float] = {}  # by attempt, as a ledger has it
    paid_up_to = 0.0
    for number, (event, who, passes) in enumerate([*events, ("begin", 0, 1.0), ("beat", 0, 1.0)]):
        age.seconds += passes
        if event == "begin":
            running[who] = number, MachineTime(provisioned=True, home=home, age=age)
        elif event == "kill":
            running.pop(who, None)
        elif who in running:
            attempt, mine = running[who]
            told[attempt] = mine.take()
            mine.mark()
            paid_up_to = age.seconds
    assert sum(told.values()) == pytest.approx(paid_up_to)
