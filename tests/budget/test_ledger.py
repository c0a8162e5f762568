"""The ledger: what it counts, and how it handles files left by a killed machine, a bucket or another program."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.budget.attempts import METERED
from finetune.budget.ledger import HEARTBEAT_RETENTION_SECONDS, AttemptLog, Ledger
from finetune.machine.price import MachinePrice
from tests.helpers.errors import raises

MACHINE = {"zone": "us-central1-a", "gpu": "A100", "spot": True, "id": "4520031799277581759"}


def begin(ledger: Ledger, attempt: int = 1, usd: float | None = 3.6, before: float = 0.0, **facts: Any) -> AttemptLog:
    log = ledger.new_attempt(
        attempt,
        machine=facts.pop("machine", MACHINE),
        price=None if usd is None else MachinePrice(usd, "a catalog of today"),
        resumed_step=facts.pop("resumed_step", None),
    )
    log.begin(before)
    return log


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_empty_folder_and_none_at_all_have_cost_nothing(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        account = Ledger(folder).account()
        assert (account.attempts, account.usd, account.hours, account.problems) == ((), None, 0, ())
    assert Ledger(tmp_path / "none").next_attempt() == 1 and not (tmp_path / "none").exists()


def test_seconds_times_price_over_all_attempts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    first = begin(ledger, before=600.0)
    first.heartbeat(1800.0, 10)
    first.note("saved", step=20, seconds=5.0)
    first.end(3600.0, "preempted", 21)
    begin(ledger, ledger.next_attempt(), usd=0.9, resumed_step=20, machine={}).heartbeat(7200.0, 30)
    account = ledger.account()
    one, two = account.attempts
    assert (one.number, one.usd, one.hours, one.reason, one.step, one.resumed_step) == (
        1,
        3.6,
        1,
        "preempted",
        21,
        None,
    )
    assert (one.zone, one.gpu, one.spot) == ("us-central1-a", "A100", True)
    assert one.price == MachinePrice(3.6, "a catalog of today")
    assert (two.number, two.usd, two.hours, two.reason, two.step, two.resumed_step) == (2, 1.8, 2, None, 30, 20)
    assert (two.zone, two.gpu, two.spot) == (None, None, None)
    assert (account.usd, account.hours, account.problems) == (pytest.approx(5.4), 3, ())


def test_an_evaluation_is_counted_with_training_and_can_be_told_apart(tmp_path: Path) -> None:
    begin(Ledger(tmp_path), 1).end(3600.0, "done", 9)
    scores = Ledger(tmp_path, "evaluate")
    assert scores.next_attempt() == 1, "numbered by themselves"
    begin(scores, 1, usd=0.9).end(1800.0, "interrupted", None)
    begin(scores, scores.next_attempt(), usd=0.9).end(1800.0, "scored", None)
    begin(Ledger(tmp_path), Ledger(tmp_path).next_attempt()).end(60.0, "done", 9)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "attempt-001.jsonl", "attempt-002.jsonl", "evaluation-001.jsonl", "evaluation-002.jsonl"
    ]  # fmt: skip
    account = Ledger(tmp_path).account()
    assert account == scores.account()
    assert [one.name for one in account.attempts] == ["attempt 1", "attempt 2", "evaluation 1", "evaluation 2"]
    assert account.usd == pytest.approx(3.66 + 0.9)
    assert account.of("train").usd == pytest.approx(3.66)
    assert (account.of("evaluate").usd, account.of("evaluate").hours) == (pytest.approx(0.9), 1.0)
    assert account.of("serve").attempts == () and account.of("serve").usd is None


def test_an_evaluation_without_a_price_is_named_as_one(tmp_path: Path) -> None:
    begin(Ledger(tmp_path))
    begin(Ledger(tmp_path, "evaluate"), usd=None)
    assert Ledger(tmp_path).account().problems[0].endswith("no price for evaluation 1; not in the dollars")


def test_an_evaluation_never_overwrites_another_one(tmp_path: Path) -> None:
    begin(Ledger(tmp_path, "evaluate")).heartbeat(10.0, None)
    second = begin(Ledger(tmp_path, "evaluate"), 1)
    assert second.number == 2 and second.path.name == "evaluation-002.jsonl"
    assert second.attempt().work == "evaluate"
    (tmp_path / ".evaluation-003.jsonl.x.tmp").touch()
    (tmp_path / ".attempt-003.jsonl.x.tmp").touch()
    begin(Ledger(tmp_path, "evaluate"), 3)
    assert [path.name for path in tmp_path.glob(".*")] == [".attempt-003.jsonl.x.tmp"], (
        "each cleans up after its own kind"
    )


def test_an_attempt_that_was_killed_at_once_has_cost_its_boot(tmp_path: Path) -> None:
    begin(Ledger(tmp_path), before=720.0)
    assert Ledger(tmp_path).account().usd == pytest.approx(0.72)


def test_the_first_line_of_a_file_is_what_earlier_versions_read_and_wrote(tmp_path: Path) -> None:
    log = begin(Ledger(tmp_path), before=12.3456, resumed_step=8)
    first = lines(log.path)[0]
    at, token = first["at"], first["token"]
    assert log.path.read_text() == (
        f'{{"event": "begin", "at": "{at}", "attempt": 1, "token": "{token}", "metered_seconds": 12.346, "step": 8, '
        '"usd_per_hour": 3.6, "basis": "a catalog of today", "machine": {"zone": "us-central1-a", "gpu": "A100", "spot": true, '
        '"id": "4520031799277581759"}}\n'
    )
    assert at and len(token) == 16


def test_an_attempt_can_be_read_before_it_begins_and_leaves_no_file(tmp_path: Path) -> None:
    log = Ledger(tmp_path / "ledger").new_attempt(2, machine=MACHINE, price=MachinePrice(3.6, "b"), resumed_step=8)
    attempt = log.attempt()
    assert (attempt.number, attempt.zone, attempt.usd, attempt.resumed_step, attempt.began_at) == (
        2,
        "us-central1-a",
        0.0,
        8,
        None,
    )
    assert not (tmp_path / "ledger").exists()


def test_attempts_without_a_price_are_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    begin(ledger, usd=None).heartbeat(3600.0, 1)
    account = ledger.account()
    assert (account.usd, account.hours, account.problems) == (None, 1, ())
    begin(ledger, 2).heartbeat(3600.0, 1)
    account = ledger.account()
    assert account.usd == 3.6 and account.hours == 2 and "no price for attempt 1" in account.problems[0]


def test_the_file_of_a_long_run_stays_small(tmp_path: Path) -> None:
    log = begin(Ledger(tmp_path))
    heartbeats = [30.0 * n for n in range(721)]  # six hours
    for seconds in heartbeats:
        log.heartbeat(seconds, int(seconds))
    kept = [line[METERED] for line in lines(log.path) if line["event"] == "heartbeat"]
    assert len(kept) <= 6 * 3600 / HEARTBEAT_RETENTION_SECONDS + 2
    assert max(b - a for a, b in pairwise(kept)) <= HEARTBEAT_RETENTION_SECONDS
    assert Ledger(tmp_path).account().attempts[0].seconds == heartbeats[-1]


def test_notes_are_never_thinned_and_take_any_fact(tmp_path: Path) -> None:
    log = begin(Ledger(tmp_path))
    for step in range(3):
        log.heartbeat(float(step), step)
        log.note("saved", step=step, folder=tmp_path, loss=float("nan"))
    saved = [line for line in lines(log.path) if line["event"] == "saved"]
    assert [line["step"] for line in saved] == [0, 1, 2]
    assert saved[0]["folder"] == str(tmp_path) and saved[0]["loss"] is None


def test_a_torn_last_line_is_dropped_and_reported(tmp_path: Path) -> None:
    log = begin(Ledger(tmp_path))
    log.heartbeat(3600.0, 1)
    log.note("saved", step=2)
    log.heartbeat(7200.0, 2)
    whole = log.path.read_bytes()
    last = len(whole.rstrip().split(b"\n")[-1])
    for cut in range(2, last):
        log.path.write_bytes(whole[:-cut])
        account = Ledger(tmp_path).account()
        assert account.usd == 3.6
        assert account.problems == (f"{log.path}: the last line is torn and left out",)
    log.path.write_bytes(whole[:-1])  # only the line feed is missing
    account = Ledger(tmp_path).account()
    assert account.usd == 7.2 and not account.problems


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_corrupt_file_is_only_reported(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever bytes replace a part of a file: its account can be read, and the other attempts count."""
    folder = tmp_path_factory.mktemp("ledger")
    ledger = Ledger(folder)
    log = begin(ledger)
    log.heartbeat(1000.0, 1)
    log.end(2000.0, "done", 2)
    begin(ledger, 2).end(3600.0, "done", 3)
    whole = log.path.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole)))
    junk = data.draw(st.binary(max_size=20).filter(lambda junk: not any(digit in junk for digit in b"0123456789e")))
    log.path.write_bytes(whole[:start] + junk + whole[end:])
    account = ledger.account()
    assert [attempt.number for attempt in account.attempts] == [1, 2]
    assert account.attempts[1].usd == 3.6 and account.usd is not None and account.usd >= 3.6


@pytest.mark.parametrize(
    "text",
    ["", "garbage\n", "[]\n", "null\n", '{"event": 3}\n', "\x00" * 50, '{"metered_seconds": 5}\n'],
)
def test_a_file_of_garbage_is_reported_and_keeps_its_number(text: str, tmp_path: Path) -> None:
    (tmp_path / "attempt-004.jsonl").write_text(text)
    ledger = Ledger(tmp_path)
    account = ledger.account()
    assert account.hours == 0 and account.usd is None and "nothing in it is readable" in account.problems[0]
    assert ledger.next_attempt() == 5
    assert begin(ledger, 4).number == 5
    assert (tmp_path / "attempt-004.jsonl").read_text() == text


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-5", '"7"', "true", "null", "[1]"])
def test_values_that_are_not_numbers_do_not_count(value: str, tmp_path: Path) -> None:
    log = begin(Ledger(tmp_path))
    log.heartbeat(3600.0, 1)
    with log.path.open("a") as file:
        file.write(f'{{"event": "heartbeat", "metered_seconds": {value}}}\n')
    (tmp_path / "attempt-002.jsonl").write_text(
        f'{{"event": "begin", "usd_per_hour": {value}, "machine": {value}, "token": [1]}}\n'
    )
    account = Ledger(tmp_path).account()
    assert account.usd == 3.6 and account.attempts[1].usd is None and account.attempts[1].zone is None


def test_an_attempt_without_its_first_line_has_hours_but_no_price(tmp_path: Path) -> None:
    log = begin(Ledger(tmp_path))
    log.heartbeat(3600.0, 1)
    log.path.write_text("".join(log.path.read_text().splitlines(keepends=True)[1:]))
    account = Ledger(tmp_path).account()
    assert account.hours == 1 and account.usd is None and "first line is missing" in account.problems[0]


def test_temporary_and_unknown_files_are_not_attempts(tmp_path: Path) -> None:
    begin(Ledger(tmp_path)).heartbeat(3600.0, 1)
    for name in (".attempt-002.jsonl.abc.tmp", "attempt-002.jsonl.bak", "notes.txt", "attempt-x.jsonl"):
        (tmp_path / name).write_text("{}\n")
    assert Ledger(tmp_path).account().usd == 3.6 and Ledger(tmp_path).next_attempt() == 2
    begin(Ledger(tmp_path), 2)
    assert not list(tmp_path.glob(".*")) and (tmp_path / "notes.txt").is_file()


def test_a_copy_of_a_file_is_counted_once(tmp_path: Path) -> None:
    log = begin(Ledger(tmp_path))
    log.heartbeat(3600.0, 1)
    shutil.copy(log.path, tmp_path / "attempt-002.jsonl")
    account = Ledger(tmp_path).account()
    assert account.usd == 3.6 and "a copy of attempt-001.jsonl" in account.problems[0]


def test_an_unreadable_file_is_reported(tmp_path: Path) -> None:
    begin(Ledger(tmp_path), 2).heartbeat(3600.0, 1)
    (tmp_path / "attempt-001.jsonl").mkdir()
    account = Ledger(tmp_path).account()
    assert account.usd == 3.6 and "not readable" in account.problems[0]


def test_a_number_that_is_taken_is_not_written_over(tmp_path: Path) -> None:
    first, second = begin(Ledger(tmp_path)), begin(Ledger(tmp_path))
    assert (first.number, second.number) == (1, 2)
    first.heartbeat(3600.0, 1)
    second.heartbeat(7200.0, 1)
    assert Ledger(tmp_path).account().hours == 3
    assert {"event": "renumbered", "taken": 1}.items() <= lines(second.path)[1].items()


def test_two_machines_that_take_a_number_at_once_both_count(tmp_path: Path) -> None:
    """On a bucket neither sees the other's file in time; the later one keeps the number, and the first takes another one at its
    next line."""
    first = begin(Ledger(tmp_path))
    first.heartbeat(1800.0, 1)
    first.path.unlink()
    second = begin(Ledger(tmp_path))
    second.heartbeat(7200.0, 9)
    first.heartbeat(3600.0, 2)
    assert (first.number, second.number) == (2, 1)
    assert [(a.number, a.hours, a.step) for a in Ledger(tmp_path).account().attempts] == [(1, 2, 9), (2, 1, 2)]


def test_a_file_corrupted_during_the_run_is_whole_again_after_the_next_line(tmp_path: Path) -> None:
    log = begin(Ledger(tmp_path))
    log.heartbeat(1800.0, 1)
    log.path.write_text("garbage")
    log.heartbeat(3600.0, 2)
    assert Ledger(tmp_path).account().usd == 3.6 and log.number == 1


def test_a_fault_of_the_folder_is_a_user_error_and_the_next_line_adds_what_is_missing(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    log = begin(Ledger(folder))
    away = folder.rename(tmp_path / "away")
    with raises("budget.ledger_vanished", match=r"has vanished"):
        log.note("saved", step=7)
    assert not folder.exists()
    folder.write_text("a file")
    with raises("budget.ledger_vanished"):
        log.heartbeat(30.0, 7)
    with raises("disk.error", match="ledger"):
        Ledger(folder).account()
    with raises("disk.error", match="ledger"):
        begin(Ledger(folder))
    folder.unlink()
    away.rename(folder)
    log.heartbeat(60.0, 8)
    assert [line["event"] for line in lines(log.path)] == ["begin", "saved", "heartbeat", "heartbeat"]


def test_a_full_disk_leaves_the_last_whole_file(tmp_path: Path) -> None:
    program = (
        "import resource, sys; from pathlib import Path; from finetune.errors import UserError\n"
        "from finetune.budget.ledger import Ledger\n"
        "log = Ledger(Path(sys.argv[1])).new_attempt(1, machine={}, price=None, resumed_step=None); log.begin(0)\n"
        "log.heartbeat(60.0, 1)\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "try: log.note('x', text='y' * 1000)\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True, text=True, timeout=30
    )
    assert "attempt-001.jsonl: File too large" in done.stdout
    assert [line["event"] for line in lines(tmp_path / "attempt-001.jsonl")] == ["begin", "heartbeat"]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_slow_write_does_not_undo_a_later_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = begin(Ledger(tmp_path))
    rename, slow, waits = os.replace, threading.Event(), threading.Event()

    class TellingLock:
        """Signals when a thread has to wait for it."""

        lock = threading.Lock()

        def __enter__(self) -> None:
            if not self.lock.acquire(blocking=False):
                waits.set()
                self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()

    def rename_slowly(source: str, target: Path) -> None:
        if not slow.is_set():
            slow.set()
            waits.wait(5)
        rename(source, target)

    monkeypatch.setattr(log, "_lock", TellingLock())
    monkeypatch.setattr(os, "replace", rename_slowly)
    first = threading.Thread(target=lambda: log.note("saved", step=1))
    first.start()
    slow.wait()
    log.note("saved", step=2)
    first.join()
    assert waits.is_set() and [line["step"] for line in lines(log.path)] == [None, 1, 2]


def test_a_kill_in_the_middle_of_a_write_leaves_the_lines_before_it(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from finetune.budget.ledger import Ledger\n"
        "log = Ledger(Path(sys.argv[1])).new_attempt(1, machine={}, price=None, resumed_step=None); log.begin(0)\n"
        "for n in range(9): log.heartbeat(600.0 * n, n)\n"
    )
    environment = os.environ | {"FINETUNE_FAULT": "ledger:5"}  # the first is that of `begin`
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, env=environment, timeout=30)
    assert done.returncode == -9
    account = Ledger(tmp_path).account()
    assert account.attempts[0].seconds == 1200.0 and not account.problems
    assert begin(Ledger(tmp_path), Ledger(tmp_path).next_attempt()).number == 2


def test_values_of_other_types_in_the_first_line_are_unknown(tmp_path: Path) -> None:
    log = begin(Ledger(tmp_path), usd=7.2)
    (first, *_) = lines(log.path)
    odd = {"at": 1, "step": "x", "machine": {"name": ["m"], "zone": 3, "gpu": "L4", "spot": "yes"}}
    log.path.write_text(json.dumps(first | odd) + "\n", encoding="utf-8")
    (attempt,) = Ledger(tmp_path).account().attempts
    assert (attempt.began_at, attempt.resumed_step, attempt.zone, attempt.spot) == (None, None, None, None)
    assert (attempt.gpu, attempt.usd_per_hour, attempt.machine) == ("L4", 7.2, {"gpu": "L4"})


BAD_NUMBERS = ("-1", "NaN", "Infinity", "-Infinity", "1e999", "1e300", "1" + "0" * 400, "true", '"5"', "[5]", "{}")


@pytest.mark.parametrize("number", BAD_NUMBERS)
@pytest.mark.parametrize("key", [METERED, "usd_per_hour"])
def test_a_number_that_no_attempt_can_have_is_left_out_and_reported(key: str, number: str, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    log = begin(ledger, before=5.0)
    good = log.path.read_text()
    old = {METERED: f'"{METERED}": 5.0', "usd_per_hour": '"usd_per_hour": 3.6'}[key]
    assert old in good
    log.path.write_text(good.replace(old, f'"{key}": {number}'))
    (attempt,) = ledger.account().attempts
    assert (attempt.seconds if key == METERED else attempt.usd_per_hour) in (0.0, None)
    said = (
        (key, "left out") if len(number) < 100 and number != "1e999" else ("nothing in it is readable", "not counted")
    )
    assert any(all(part in problem for part in said) for problem in ledger.account().problems)


@pytest.mark.parametrize("step", ["-1", "1e999", "true", '"x"', "1" + "0" * 400, "2.5"])
def test_a_step_that_no_attempt_can_have_is_unknown(step: str, tmp_path: Path) -> None:
    log = begin(Ledger(tmp_path), resumed_step=7)
    log.path.write_text(log.path.read_text().replace('"step": 7', f'"step": {step}'))
    (attempt,) = Ledger(tmp_path).account().attempts
    assert (attempt.resumed_step, attempt.step) == (None, None)


def test_names_that_are_no_attempt_of_ours_and_files_that_never_end(tmp_path: Path) -> None:
    begin(Ledger(tmp_path))
    for name in (
        f"attempt-{'9' * 240}.jsonl",
        "attempt-\u0661\u0662\u0663.jsonl",
        "attempt--05.jsonl",
        "attempt-1.jsonl",
    ):
        (tmp_path / name).write_text("{}\n")
    os.mkfifo(tmp_path / "attempt-002.jsonl")
    (tmp_path / "attempt-003.jsonl").write_text("[" * 100_000)
    account = Ledger(tmp_path).account()
    assert [attempt.number for attempt in account.attempts] == [1, 2, 3]
    assert len(account.problems) == 3 and "002.jsonl: not readable (not a file)" in account.problems[0]
    assert Ledger(tmp_path).next_attempt() == 4


# --- a price that changes while an attempt runs -----------------------------------------------------------------------------


def reprices(log: AttemptLog, seconds: float, usd: float, basis: str = "a newer catalog") -> None:
    log.note("price", **{METERED: seconds}, usd_per_hour=usd, basis=basis)


def test_a_newer_price_counts_from_its_line_on(tmp_path: Path) -> None:
    log = begin(Ledger(tmp_path), before=600.0)  # $3.60/h
    log.heartbeat(1000.0, 5)
    reprices(log, 1000.0, 7.2)
    log.heartbeat(1500.0, 9)
    (attempt,) = Ledger(tmp_path).account().attempts
    assert attempt.usd == pytest.approx(1.0 + 500 / 3600 * 7.2) and log.attempt().usd == attempt.usd
    assert attempt.price == MachinePrice(7.2, "a newer catalog"), "in force"
    reprices(log, 2000.0, 1.8)
    log.end(3000.0, "done", 12)
    (attempt,) = Ledger(tmp_path).account().attempts
    assert attempt.usd == pytest.approx(1.0 + 2.0 + 1000 / 3600 * 1.8) and attempt.usd_per_hour == 1.8
    assert (attempt.seconds, attempt.step, attempt.reason) == (3000.0, 12, "done")


def test_seconds_after_the_last_line_of_a_killed_attempt_are_not_priced(tmp_path: Path) -> None:
    log = begin(Ledger(tmp_path), before=600.0)
    reprices(log, 1800.0, 7.2)
    (attempt,) = Ledger(tmp_path).account().attempts
    assert attempt.seconds == 1800.0 and attempt.usd == pytest.approx(1.8)


@pytest.mark.parametrize("number", BAD_NUMBERS)
@pytest.mark.parametrize("key", [METERED, "usd_per_hour"])
def test_a_damaged_newer_price_is_left_out_and_reported(key: str, number: str, tmp_path: Path) -> None:
    log = begin(Ledger(tmp_path))
    reprices(log, 1000.0, 7.25)
    log.heartbeat(3600.0, 1)
    old = {METERED: f'"{METERED}": 1000.0', "usd_per_hour": '"usd_per_hour": 7.25'}[key]
    text = log.path.read_text()
    assert old in text
    log.path.write_text(text.replace(old, f'"{key}": {number}'))
    account = Ledger(tmp_path).account()
    assert account.usd == pytest.approx(3.6), "the price that is known"
    assert account.problems


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 5000), st.floats(0.05, 20)), max_size=6),
    st.floats(0, 5000),
    st.floats(0.05, 20),
)
def test_the_cost_is_the_sum_of_seconds_times_the_price_in_force(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[float, float]], rest: float, first: float
) -> None:
    ledger = Ledger(tmp_path_factory.mktemp("ledger"))
    log = begin(ledger, usd=first)
    now, usd, price = 0.0, 0.0, first
    for seconds, newer in changes:
        now, usd = now + seconds, usd + seconds / 3600 * price
        log.heartbeat(now, None)
        reprices(log, round(now, 3), newer)
        price = newer
    log.end(now + rest, "done", None)
    usd += rest / 3600 * price
    assert ledger.account().usd == pytest.approx(usd, abs=1e-4)  # milliseconds are the ledger's smallest
