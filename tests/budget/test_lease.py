"""The lease: who may take over a run, and when; what an attempt that has lost it may still do."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.budget.claims import Claim, ClaimFolder, next_number
from finetune.budget.lease import (
    LOCAL_SETTLE_SECONDS,
    UNSURE_SECONDS,
    Lease,
    clear_not_started,
    lease_seconds,
    settle_seconds,
)
from finetune.budget.takeover import SETTLE_SECONDS, Timing, acquiring
from finetune.checkpoint.store import CheckpointStore, Skipped
from finetune.errors import EXIT_TRANSIENT, EXIT_USER_ERROR, TakenOver
from finetune.machine.process import ProcessId, is_gone, this_process
from finetune.run_folder import RunFolder
from tests.helpers.errors import raises

ELSEWHERE = ProcessId("another machine", 4242, 7, "gpu-1")
TIMING = Timing(lease=60.0, settle=6.0, patience=240.0)
HASHES = {"config_hash": "c" * 64, "data_hash": "d" * 64}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "runs" / "demo")
    run.lease.mkdir(parents=True)
    return run


@pytest.fixture
def claims(run: RunFolder) -> ClaimFolder:
    return ClaimFolder(run.lease)


def claim(number: int, state: Any = "live", **values: Any) -> Claim:
    facts: dict[str, Any] = {"process": ELSEWHERE, "seconds": 60.0, "since": "2026-11-29 10:00:00 UTC"}
    return Claim(number, f"{number:016x}", state, **facts | values)


class Steps:
    """An attempt that acquires, on a clock of its own."""

    def __init__(self, claims: ClaimFolder, gone: Any = lambda claim: False, **wanted: Any) -> None:
        self.now, self.begun = 0.0, claims
        mine = Claim(0, "f" * 16, "candidate", this_process(), 60.0, **wanted)
        self.steps: Generator[float, None, Claim] = acquiring(
            claims, mine, TIMING, clock=lambda: self.now, gone=gone, heritage=lambda: ({"step-4": "seal"}, 0)
        )

    def until(self, seconds: float) -> Claim | None:
        """The claim, or None if it is still waiting at that time."""
        while self.now < seconds:
            try:
                self.now += next(self.steps)
            except StopIteration as end:
                taken: Claim = end.value
                return taken
        return None


def test_a_new_run_is_taken_after_the_time_in_which_another_could_show_up(claims: ClaimFolder) -> None:
    attempt = Steps(claims)
    taken = attempt.until(100)
    assert taken is not None and (taken.number, taken.state, attempt.now) == (1, "live", TIMING.settle)
    assert taken.inherits == {"step-4": "seal"}
    assert claims.read(taken.key) == taken


def test_a_run_whose_last_attempt_has_ended_is_taken_at_once(claims: ClaimFolder) -> None:
    claims.write(claim(3, "live"))  # killed, and taken over by the next
    claims.write(claim(4, "ended"))
    claims.write(claim(5, "withdrawn"))
    attempt = Steps(claims)
    taken = attempt.until(100)
    assert taken is not None and (taken.number, attempt.now) == (6, TIMING.settle)


@pytest.mark.parametrize("state", ["live", "candidate", "unknown"])
def test_a_silent_attempt_is_taken_over_after_the_length_of_the_lease(state: str, claims: ClaimFolder) -> None:
    claims.write(claim(3, "live" if state == "unknown" else state))
    if state == "unknown":
        next(iter(claims.folder.iterdir())).write_text("")  # killed in the middle of a write
    attempt = Steps(claims)
    assert attempt.until(59.0) is None
    taken = attempt.until(200)
    assert taken is not None and taken.number == 4 and 60.0 <= attempt.now <= 62.0 + TIMING.settle


def test_one_that_is_certainly_gone_is_taken_over_at_once(claims: ClaimFolder) -> None:
    claims.write(claim(3))
    attempt = Steps(claims, gone=lambda other: other.number == 3)
    assert attempt.until(100) is not None and attempt.now == TIMING.settle


def test_a_longer_lease_of_the_holder_counts(claims: ClaimFolder) -> None:
    claims.write(claim(3, seconds=180.0))
    attempt = Steps(claims)
    assert attempt.until(179) is None
    assert attempt.until(300) is not None


def test_a_run_that_is_alive_is_refused_at_the_first_sign_of_life(claims: ClaimFolder) -> None:
    claims.write(claim(3))
    attempt = Steps(claims)
    assert attempt.until(20) is None
    claims.write(claim(3, beat=1))
    who = r"machine gpu-1, process 4242, since 2026-11-29 10:00:00 UTC"
    with raises("run.held", match=f"being trained already .{who}") as caught:
        attempt.until(30)
    assert caught.value.exit_code == EXIT_USER_ERROR
    assert [claims.read(key).number for key in claims.listed()] == [3], "nothing of the loser's is left"


def test_a_recovery_of_the_same_job_waits_for_its_old_machine_and_is_retried(claims: ClaimFolder) -> None:
    claims.write(claim(3, task="job-1"))
    attempt = Steps(claims, task="job-1")
    for second in range(0, 240, 10):
        assert attempt.until(second) is None
        claims.write(claim(3, beat=second + 1, task="job-1"))
    with raises("run.held", match="an earlier machine of this job") as caught:
        attempt.until(300)
    assert caught.value.exit_code == EXIT_TRANSIENT


def test_a_recovery_of_the_same_job_goes_on_when_its_old_machine_ends(claims: ClaimFolder) -> None:
    claims.write(claim(3, task="job-1"))
    attempt = Steps(claims, task="job-1")
    assert attempt.until(20) is None
    claims.write(claim(3, beat=1, task="job-1"))
    assert attempt.until(40) is None
    claims.write(claim(3, "ended", beat=2, task="job-1"))
    assert attempt.until(100) is not None and attempt.now < 50


def test_of_two_that_start_at_once_the_lower_claim_wins(claims: ClaimFolder) -> None:
    attempt = Steps(claims)
    next(attempt.steps)  # its candidate is written
    lower = replace(claim(1, "candidate"), token="0" * 16)
    claims.write(lower)
    assert attempt.until(30) is None
    claims.write(replace(lower, state="live"))
    with raises("run.held"):
        attempt.until(100)
        claims.write(replace(lower, state="live", beat=1))
        attempt.until(200)
    assert "withdrawn" in {claims.read(key).state for key in claims.listed()}


def test_the_other_of_them_withdraws(claims: ClaimFolder) -> None:
    attempt = Steps(claims)
    next(attempt.steps)
    attempt.now += TIMING.settle
    claims.write(replace(claim(2, "candidate"), token="0" * 16))
    next(attempt.steps)
    assert {claims.read(key).state for key in claims.listed()} == {"withdrawn", "candidate"}


def test_one_that_comes_back_during_the_takeover_keeps_its_run(claims: ClaimFolder) -> None:
    claims.write(claim(3))
    attempt = Steps(claims)
    while len(claims.listed()) == 1:
        attempt.now += next(attempt.steps)
    claims.write(claim(3, beat=1))
    with raises("run.held"):
        attempt.until(200)
    assert [claims.read(key).state for key in claims.listed()] == ["live", "withdrawn"]


# --- what a claim in a file may be


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": 1e9}, {"seconds": -1}, {"seconds": float("nan")}, {"seconds": "x"}, {"seconds": True}, {"state": "king"},
        {"beat": -1}, {"beat": 1.5}, {"beat": 10**400}, {"inherits": 5}, {"process": None}, {"process": {}},
    ],
    ids=str,
)  # fmt: skip
def test_a_claim_that_no_attempt_has_written_is_unknown(change: dict[str, Any], claims: ClaimFolder) -> None:
    claims.write(claim(3))
    (path,) = claims.folder.iterdir()
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert claims.read(claims.listed()[0]).state == "unknown"


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "[" * 100_000, "\x00", '{"number": 1}'])
def test_a_claim_that_is_damaged_is_unknown(text: str, claims: ClaimFolder) -> None:
    claims.write(claim(3))
    next(iter(claims.folder.iterdir())).write_text(text)
    assert claims.read(claims.listed()[0]).state == "unknown"


def test_a_heartbeat_needs_no_room_and_a_claim_that_cannot_be_written_leaves_nothing(
    claims: ClaimFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims.write(claim(3))
    (path,) = claims.folder.iterdir()
    size, file = path.stat().st_size, path.stat().st_ino
    claims.write(claim(3, "ended", beat=10**9))
    assert (path.stat().st_size, path.stat().st_ino) == (size, file) and size % 1024 == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # as on a full disk: no file may grow
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with raises("disk.error"):
            claims.write(claim(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [claims.read(key).state for key in claims.listed()] == ["ended"]


def test_names_of_other_files_are_no_claims_and_texts_are_printable(claims: ClaimFolder) -> None:
    for name in ("claim-1-x.json", "claim-000001-../../x.json".replace("/", "_"), "claim-000001.json", ".claim", "x"):
        (claims.folder / name).write_text("{}")
    assert claims.listed() == []
    claims.write(claim(3, since="\x1b[2J\n" + "x" * 999))
    assert claims.read(claims.listed()[0]).since == "[2J" + "x" * 195
    with raises("run.bad_lease", match="999999999"):
        next_number([(999_999_999, "x")], 0)


# --- the lease of an attempt


def held(claims: ClaimFolder, number: int, **values: Any) -> Lease:
    lease = Lease(print)
    mine = claim(number, **values)
    claims.write(mine)
    lease.begin(claims, mine)
    return lease


def test_an_attempt_that_was_taken_over_saves_and_prunes_nothing(
    run: RunFolder, claims: ClaimFolder, tmp_path: Path
) -> None:
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged" / "weights").write_text("w")
    lease = held(claims, 1)
    store = CheckpointStore(run.checkpoints, run_id="r", fence=lease, keep_last=1)
    for step in (1, 2):
        store.put(tmp_path / "staged", step=step, attempt=1, **HASHES)
    claims.write(claim(2, inherits=store.heritage()[0]))
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    for action in (
        lease.check,
        lambda: store.put(tmp_path / "staged", step=3, attempt=1, **HASHES),
        store.prune,
        lambda: store.quarantine(damaged(run)),
    ):
        with raises(
            "run.taken_over",
            match="another attempt has taken over this run .machine gpu-1, process 4242",
            kind=TakenOver,
        ):
            action()
    lease.beat()
    lease.release()
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before
    with raises("run.taken_over"):
        lease.check_pulse()


def damaged(run: RunFolder) -> Skipped:
    return Skipped(run.checkpoints / "step-1", "damaged", corrupt=True)


def test_a_commit_in_the_moment_of_the_takeover_does_not_count(
    run: RunFolder, claims: ClaimFolder, tmp_path: Path
) -> None:
    """The first attempt has checked, is paused, and writes its manifest after the second one has taken over."""
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged" / "weights").write_text("w")
    first = held(claims, 1)
    old = CheckpointStore(run.checkpoints, run_id="r", fence=first)
    inherited = old.put(tmp_path / "staged", step=4, attempt=1, **HASHES)

    def paused(max_age: float = 0.0) -> None:
        """The check passes, as it did before the pause."""

    second = held(claims, 2, inherits=old.heritage()[0])
    first.check = paused  # type: ignore[assignment, method-assign]
    late = old.put(tmp_path / "staged", step=6, attempt=1, **HASHES)
    new = CheckpointStore(run.checkpoints, run_id="r", fence=second)
    found, (skipped,) = new.latest_valid()
    assert (found, skipped.folder, skipped.corrupt) == (inherited, late, True)
    assert skipped.reason == "was committed by an attempt that had lost the run"
    assert new.prune() == new.clean() == []
    assert new.quarantine(skipped) == run.checkpoints / "damaged-step-6", "kept, in case it is wanted"
    third = held(claims, 3, inherits=new.heritage()[0])
    assert CheckpointStore(run.checkpoints, run_id="r", fence=third).latest_valid()[0] == inherited


def test_checkpoints_of_earlier_versions_and_of_ended_attempts_count(
    run: RunFolder, claims: ClaimFolder, tmp_path: Path
) -> None:
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged" / "weights").write_text("w")
    CheckpointStore(run.checkpoints, run_id="r").put(tmp_path / "staged", step=2, attempt=1, **HASHES)
    lease = held(claims, 1, inherits={})
    store = CheckpointStore(run.checkpoints, run_id="r", fence=lease)
    assert store.latest_valid()[0] == run.checkpoints / "step-2"
    newest = store.put(tmp_path / "staged", step=4, attempt=2, **HASHES)
    lease.release()
    assert claims.read(claims.listed()[-1]).state == "ended"
    assert store.heritage()[1] == 1
    later = held(claims, 2, inherits=store.heritage()[0])
    assert CheckpointStore(run.checkpoints, run_id="r", fence=later).latest_valid()[0] == newest


def test_an_attempt_that_cannot_reach_the_run_ends_after_a_while(claims: ClaimFolder) -> None:
    lease = held(claims, 1)
    now = lease._clock()
    lease._clock = lambda: now + UNSURE_SECONDS - 1
    lease.check_pulse()
    lease._clock = lambda: now + UNSURE_SECONDS + 1
    with raises("run.lease_not_renewed", match="could not be reached for 301 s") as caught:
        lease.check_pulse()
    assert caught.value.exit_code == EXIT_TRANSIENT


def test_without_a_lease_nothing_is_checked() -> None:
    with Lease(print) as lease:
        lease.check()
        lease.check_pulse()
        lease.beat()
        assert (lease.number, lease.lost, lease.too_late("step-1", 1, "x")) == (0, None, False)


# --- with real processes


CHILD = "import sys, time; print('up', flush=True); time.sleep(600)"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_LEASE_SECONDS", "1.2")


HOLDER = """
import sys, time
from pathlib import Path
from finetune.budget.lease import Lease
from finetune.run_folder import RunFolder
with Lease(print) as lease:
    lease.acquire(RunFolder(Path(sys.argv[1])), lambda: ({}, 0))
    print("held", flush=True)
    while lease.lost is None:
        time.sleep(0.02)
    print("lost", lease.lost, flush=True)
"""


def test_a_paused_process_is_taken_over_and_notices_it(
    run: RunFolder, short: None, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with Lease(print) as lease, raises("run.held", match=f"runs/demo: .*process {holder.pid}"):
            lease.acquire(run, lambda: ({}, 0))
        holder.send_signal(signal.SIGSTOP)
        with Lease(print) as lease:
            assert lease.acquire(run, lambda: ({}, 0)), "it waited for the length of the lease"
            before = {path: path.read_bytes() for path in run.lease.iterdir() if f"{lease.number:06d}" not in path.name}
            holder.send_signal(signal.SIGCONT)
            said = holder.stdout.readline()
            assert holder.wait(30) == 0
            lease.check()
        assert said.startswith("lost another attempt has taken over this run") and f"process {os.getpid()}" in said
        assert {path: path.read_bytes() for path in before} == before
    finally:
        holder.kill()
        holder.wait()
    assert "has not said that it ended; waiting up to 1 s" in capsys.readouterr().out


def test_a_killed_process_on_this_machine_is_taken_over_at_once(run: RunFolder) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    began = time.monotonic()
    with Lease(print) as lease:
        assert not lease.acquire(run, lambda: ({}, 0))
    assert time.monotonic() - began < 5


def test_which_process_is_gone() -> None:
    me = this_process()
    assert me.machine and not is_gone(me)
    assert is_gone(replace(me, started=me.started + 1)), "another process has its id"
    assert not is_gone(replace(me, machine="another", pid=2**22 + 1))
    assert not is_gone(replace(me, machine=""))
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline()
    fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    theirs = replace(me, pid=child.pid, started=int(fields[19]))
    assert not is_gone(theirs)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie until `wait`
    assert is_gone(theirs)
    child.wait()
    assert is_gone(theirs)


def test_a_folder_in_which_an_attempt_is_starting_is_not_removed(run: RunFolder, short: None) -> None:
    run.config_yaml.write_text("")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with raises("run.held"):
            clear_not_started(run, print)
        assert run.config_yaml.is_file()
    finally:
        holder.kill()
        holder.wait()
    clear_not_started(run, print)
    assert not run.path.exists()


def test_how_long_a_new_file_may_be_invisible(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"d / ext4 rw 0 0\nb {tmp_path}/bucket fuse.gcsfuse rw 0 0\nn {tmp_path}/n nfs4 rw\nbroken\n")
    assert settle_seconds(tmp_path / "runs", mounts) == LOCAL_SETTLE_SECONDS
    assert settle_seconds(tmp_path / "bucket" / "runs" / "x", mounts) == SETTLE_SECONDS
    assert settle_seconds(tmp_path / "n", mounts) == SETTLE_SECONDS
    assert settle_seconds(tmp_path, tmp_path / "missing") == SETTLE_SECONDS


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "x", "601"])
def test_the_length_of_the_lease_for_tests(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_LEASE_SECONDS", text)
    with raises("run.bad_lease_seconds", match="FINETUNE_LEASE_SECONDS: expected seconds above 0 and at most 600"):
        lease_seconds()
