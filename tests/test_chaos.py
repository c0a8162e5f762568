"""`python -m chaos`: its checks detect the violations they are meant for, and a short session passes."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from chaos import checks
from chaos.__main__ import main
from chaos.attempt import HEARTBEAT_SECONDS, EndedProcess, Kill, Machine, Watch, attempt, resumed_step
from chaos.damage import TARGETS, damage_checkpoints
from chaos.environment import USD_PER_HOUR, ChaosEnvironment, kind_of, make_environment
from chaos.full_disk import fill, free, small_disk
from chaos.observe import in_flight, is_whole, newest_local, newest_whole, orphans
from chaos.plan import Plan
from chaos.soak import Harness, Life, NoRunRecord, Run, killed_repeatedly
from finetune.runtime.fault_injection import PLACES

KIND = kind_of("float32")


def life(
    resumed: int | None,
    done: int | None,
    whole: int,
    *,
    killed: bool = True,
    seconds: float = 10.0,
    booked: float | None = 9.95,
    in_flight: tuple[int, ...] = (),
    damage: tuple[str, ...] = (),
    left: int | None = None,
    output: str = "",
    full_disk: bool = False,
) -> Life:
    made = EndedProcess(Kill("step") if killed else None, -9 if killed else 0, seconds, resumed, done, output)
    return Life(made, whole, in_flight, damage, whole if left is None else left, booked, full_disk)


def run_of(*lives: Life, name: str = "run-01") -> Run:
    """A run that ended without violations."""
    curve = [(step, 1 / step) for step in range(1, KIND.steps + 1)]
    spent = sum(each.booked or 0.0 for each in lives)
    return Run(
        name, KIND, Path("nowhere"), list(lives), adapter="a" * 64, losses=curve, tensorboard=curve, spent_usd=spent
    )


WHOLE = run_of(life(0, KIND.steps, KIND.steps, killed=False, booked=10.0), name="float32-whole")
GOOD = run_of(life(0, 13, 8), life(8, 20, 16), life(None, None, 16), life(16, 80, 80, killed=False, booked=10.0))


# --- the checks


def test_a_run_that_lost_nothing_passes() -> None:
    assert checks.check_end(GOOD) == []
    assert checks.check_weights(GOOD, WHOLE) == []
    assert checks.check_losses(GOOD) == []
    assert checks.check_curves(GOOD, WHOLE) == []
    assert checks.check_spend([WHOLE, GOOD], USD_PER_HOUR) == []
    assert [loss.steps for loss in checks.losses(GOOD)] == [5, 4]


def test_another_adapter_or_none_fails() -> None:
    for adapter, shown in (("b" * 64, "bbbbbbbbbbbb"), (None, "missing")):
        (line,) = checks.check_weights(replace(GOOD, adapter=adapter), WHOLE)
        assert f"the adapter is {shown}, that of the uninterrupted run aaaaaaaaaaaa" in line


def test_a_run_that_did_not_end_fails_and_so_does_a_traceback() -> None:
    assert "hung" in checks.check_end(replace(GOOD, fault="hung"))[0]
    run = run_of(life(0, 13, 8, output="Traceback (most recent call last):\n  oh"), life(8, 80, 80, killed=False))
    assert checks.check_end(run) == ["run-01: attempt 1 ended in a traceback"]


def test_more_than_an_interval_lost_fails_unless_a_copy_was_running() -> None:
    end = life(8, 80, 80, killed=False)
    exactly, one_more = run_of(life(0, 16, 8), end), run_of(life(0, 17, 8), end)
    assert checks.check_losses(exactly) == []
    assert "a kill cost 9 steps; the save interval is 8, 0 made during a copy" in checks.check_losses(one_more)[0]
    assert checks.check_losses(run_of(life(0, 17, 8, in_flight=(16,)), end)) == []
    assert "cost 10 steps" in checks.check_losses(run_of(life(0, 18, 8, in_flight=(17,)), end))[0]


def test_a_loss_is_counted_to_where_the_run_really_went_on() -> None:
    died_early = run_of(life(0, 13, 8), life(None, None, 8), life(8, 14, 8), life(8, 80, 80, killed=False))
    assert [loss.steps for loss in checks.losses(died_early)] == [5, 6]


def test_resuming_from_another_checkpoint_than_the_newest_intact_one_fails() -> None:
    for resumed in (0, 24):
        run = run_of(life(0, 20, 16), life(resumed, 80, 80, killed=False))
        assert any(f"resumed from step {resumed}, but the newest intact save was of step 16" in line
                   for line in checks.check_losses(run))  # fmt: skip


def test_what_damage_takes_is_no_loss_but_the_rest_has_to_be_used() -> None:
    corrupt = life(0, 20, 16, damage=("step-16: deleted",), left=0)
    assert checks.check_losses(run_of(corrupt, life(0, 80, 80, killed=False))) == []
    corrupt = replace(corrupt, left=8)
    assert (
        "but the newest intact save was of step 8"
        in (checks.check_losses(run_of(corrupt, life(0, 80, 80, killed=False)))[0])
    )


def test_steps_lost_doubled_or_changed_in_a_curve_fail() -> None:
    curve = GOOD.tensorboard
    lost, doubled, both = [*curve[:4], *curve[5:]], [*curve[:5], *curve[4:]], [*curve[:5], *curve[4:5], *curve[6:]]
    changed = [*curve[:4], (5, 0.5), *curve[5:]]
    assert "TensorBoard: missing [5], repeated none" in checks.check_curves(replace(GOOD, tensorboard=lost), WHOLE)[0]
    assert (
        "TensorBoard: missing none, repeated [5]" in checks.check_curves(replace(GOOD, tensorboard=doubled), WHOLE)[0]
    )
    assert "TensorBoard: missing [6], repeated [5]" in checks.check_curves(replace(GOOD, tensorboard=both), WHOLE)[0]
    assert (
        "run.json differ from the uninterrupted run's from step 5 on"
        in (checks.check_curves(replace(GOOD, losses=changed), WHOLE)[0])
    )


def test_a_ledger_that_is_off_by_more_than_a_hundredth_fails() -> None:
    def spent(booked: float) -> list[str]:
        return checks.check_spend([run_of(life(0, 80, 80, killed=False, booked=booked))], USD_PER_HOUR)

    assert spent(9.91) == [] == spent(10.04)
    assert "the ledger has 9.89 s of 10.00 s (-1.10%)" in spent(9.89)[0]
    assert "is booked with 10.06 s and lived 10.00 s" in spent(10.06)[0]
    ending = life(0, 80, 80, killed=False, booked=10.08)
    ending = replace(ending, attempt=replace(ending.attempt, teardown=0.1))
    assert checks.check_spend([run_of(ending)], USD_PER_HOUR) == []
    assert (
        "the account says $11.00, its attempts come to $9.95"
        in (checks.check_spend([replace(run_of(life(0, 80, 80)), spent_usd=11.0)], USD_PER_HOUR)[0])
    )
    assert "the ledger has 0.00 s" in checks.check_spend([run_of(life(0, 80, 80, booked=None))], USD_PER_HOUR)[0]


def test_attempts_missing_from_the_ledger_are_counted_separately() -> None:
    run = run_of(
        life(None, None, 0, booked=None, seconds=3.0), life(0, 20, 16, full_disk=True, booked=1.0), life(0, 8, 8)
    )
    total = checks.spend([run])
    assert checks.check_provisioned("x", replace(total, booked=9.91)) == []
    assert (
        "x: the ledger has 9.80 s of 10.00 s that the machine was billed for (-2.00%)"
        in (checks.check_provisioned("x", replace(total, booked=9.8))[0])
    )
    assert (total.real, total.booked, total.unbooked, total.kills) == (10.0, 9.95, 3.0, 1)
    assert total.allowance == pytest.approx(HEARTBEAT_SECONDS / 10)


def test_partial_saves_fail() -> None:
    run = replace(GOOD, orphans=["checkpoints/step-3", ".run.json.x.tmp"])
    assert checks.check_orphans(run) == ["run-01: left a partial save behind: checkpoints/step-3"]


# --- observing and acting


def save(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    files = {"weights": b"w" * 100, "state": b"{}"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    entries = {name: {"bytes": len(each), "sha256": sha256(each).hexdigest()} for name, each in files.items()}
    (folder / "manifest.json").write_text(json.dumps({"step": step, "files": entries}))
    return folder


def test_damaged_checkpoints_are_not_intact(tmp_path: Path) -> None:
    for seed in range(60):
        run = tmp_path / str(seed)
        folders = [save(run, step) for step in (8, 16, 24)]
        assert newest_whole(run) == 24
        target = TARGETS[seed % 3]
        said = damage_checkpoints(run, target, random.Random(seed))
        whole = [is_whole(folder) for folder in folders]
        assert whole.count(False) == len(said) == (3 if target == "all" else 1)
        assert newest_whole(run) == {"newest": 16, "all": 0}.get(target, 24 if whole[2] else 16)
    assert damage_checkpoints(tmp_path / "nothing", "all", random.Random(0)) == []
    assert damage_checkpoints(tmp_path / "nothing", "one", random.Random(0)) == []


def test_saves_that_had_begun_and_what_is_left_of_them(tmp_path: Path) -> None:
    run, temporary = tmp_path / "run", tmp_path / "tmp"
    save(run, 8)
    assert in_flight(run, temporary) == [] and orphans(run) == []
    (temporary / "finetune-x" / "checkpoint-24").mkdir(parents=True)
    (temporary / "finetune-x" / "checkpoint-8").mkdir(parents=True)
    (save(run, 16) / "manifest.json").unlink()
    assert in_flight(run, temporary) == [16, 24]
    assert newest_local(temporary) == 0  # it was still being written
    (temporary / "finetune-x" / "checkpoint-20.save-2").mkdir()
    (temporary / "finetune-x" / "checkpoint-20.save-2" / "labels.json").write_text('{"step": 20}')
    assert in_flight(run, temporary) == [16, 20, 24]
    assert newest_local(temporary) == 20
    assert orphans(run) == ["checkpoints/step-16"]


def test_steps_are_those_of_this_attempt(tmp_path: Path) -> None:
    def write(done: int, text: str = "") -> None:
        (tmp_path / "run.json").write_text(json.dumps({"status": text, "steps": {"done": done}}))

    write(20)
    watch = Watch(tmp_path)
    write(20, "running")  # a new attempt begins; its first step is not known yet
    watch.look()
    assert watch.done is None
    write(17)
    watch.look()
    write(20)
    watch.look()
    assert watch.done == 20


def test_the_resumed_step_is_read_from_the_output() -> None:
    assert resumed_step("resuming from runs/x/checkpoints/step-24\n", fresh=False) == 24
    assert resumed_step("runs/x: no checkpoint to resume from, starting from the beginning", fresh=False) == 0
    assert resumed_step("", fresh=True) == 0
    assert resumed_step("", fresh=False) is None


def test_a_real_process_is_started_and_killed(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "machine")
    config = [str(tmp_path / "missing.yaml")]
    made = attempt(machine, config, tmp_path / "run", None, tmp_path / "a.log")
    assert (made.code, made.killed, made.done) == (2, False, None)
    assert "missing.yaml" in made.output
    made = attempt(machine, config, tmp_path / "run", Kill("start", delay=0.02), tmp_path / "a.log")
    assert (made.code, made.killed) == (-9, True)
    assert made.seconds < 5


SHUTDOWN = """
import json, pathlib, sys, time
run = pathlib.Path(sys.argv[-1])
run.mkdir(parents=True, exist_ok=True)
(run / "run.json").write_text(json.dumps({"status": "%s", "steps": {"done": 80}}))
time.sleep(60)
"""


@pytest.mark.parametrize(("status", "killed"), [("done", False), ("running", True)])
def test_a_kill_while_python_shuts_down_after_the_run_is_done_is_no_kill(
    tmp_path: Path, status: str, killed: bool
) -> None:
    package = tmp_path / "fake" / "finetune"
    package.mkdir(parents=True)
    (package / "__main__.py").write_text(SHUTDOWN % status)
    machine = Machine(tmp_path / "machine", python_path=package.parent)
    run = tmp_path / "run"
    made = attempt(machine, ["--resume", str(run)], run, Kill("start", delay=1.5), tmp_path / "a.log")
    assert (made.code, made.killed, made.finished) == (-9, killed, not killed)
    assert (made.teardown > 0) is not killed


def test_a_run_that_is_done_is_not_resumed_as_by_a_managed_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = EndedProcess(Kill("notice"), -9, 10.0, 0, KIND.steps, "", finished=True)
    monkeypatch.setattr("chaos.soak.attempt", lambda *arguments: made)
    monkeypatch.setattr(Harness, "close", lambda harness, run: run)
    environment = make_environment(tmp_path / "environment")
    harness = Harness(environment, Machine(tmp_path / "machine"), tmp_path / "runs", lambda line: None)
    plan = Plan(2, 7, 1)
    run = killed_repeatedly(harness, KIND, "x", plan)
    assert (len(run.lives), run.fault, plan.left) == (1, None, 2)
    made = replace(made, hung=True)
    assert killed_repeatedly(harness, KIND, "y", plan).fault == "hung"


def test_a_folder_with_files_but_no_record_is_not_touched(tmp_path: Path) -> None:
    harness = Harness(ChaosEnvironment(tmp_path), Machine(tmp_path / "machine"), tmp_path / "runs", lambda line: None)
    run = Run("x", KIND, tmp_path / "runs" / "x")
    (run.folder / "ledger").mkdir(parents=True)
    with pytest.raises(NoRunRecord, match=r"holds files, but no run\.json"):
        harness.one_attempt(run, None)
    assert run.folder.is_dir()


def test_the_plan_reaches_every_place_and_is_repeated_by_its_seed() -> None:
    def drawn(seed: int) -> list[Kill]:
        plan, kills, runs = Plan(50, seed, 3), [], 0
        while plan.left:
            quota, runs = plan.quota(), runs + 1
            for number in range(quota):
                kills.append(plan.kill(KIND, 8, first=not number, last=number + 1 == quota))
                plan.happened(kills[-1])
                plan.damage()
        assert (runs, plan.not_reached()) == (7, [])
        return kills

    assert Plan(50, 5, 3).kill(KIND, 0, first=True, last=False) == Kill("place", "ledger", 1)
    first = drawn(5)
    assert len(first) == 50
    assert {kill.place for kill in first if kill.how == "place"} == set(PLACES)
    assert {kill.how for kill in first} == {"place", "step", "start", "notice"}
    assert drawn(5) == first != drawn(6)
    assert [Plan(4, 0, 3).quota(), Plan(4, 0, 1).quota(), Plan(2, 0, 3).quota()] == [2, 4, 1]
    assert set(Plan(50, 0, 3).not_reached()) == set(PLACES)


def test_thirteen_kills_cover_every_place_every_kind_of_kill_and_every_damage() -> None:
    for seed in range(50):
        plan, kills, damages = Plan(13, seed, 3), [], []
        while plan.left:
            quota = plan.quota()
            for number in range(quota):
                kills.append(plan.kill(KIND, 8, first=not number, last=number + 1 == quota))
                if kills[-1].how == "notice" and seed % 2:  # the attempt was gone before the kill came
                    plan.missed(kills[-1])
                    kills.append(plan.kill(KIND, 8, first=False, last=number + 1 == quota))
                plan.happened(kills[-1])
                damages.append(plan.damage(anything=number > 0))
        assert {kill.place for kill in kills if kill.how == "place"} == set(PLACES)
        assert {kill.how for kill in kills} == {"place", "step", "start", "notice"}
        assert {target for target in damages if target} == set(TARGETS)


def test_a_disk_is_filled_and_freed(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        if disk is None:
            pytest.skip("only root may mount a small disk")
        fill(disk)
        with pytest.raises(OSError, match="No space"):
            (disk / "more").write_bytes(bytes(8192))
        free(disk)
        (disk / "more").write_bytes(bytes(8192))
        fill(disk, leave=16384)
        (disk / "little").write_bytes(bytes(8192))
    assert list((tmp_path / "disk").iterdir()) == []


# --- the short version


@pytest.mark.repeat  # CI runs `make chaos` itself
def test_runs_that_are_killed_end_like_one_that_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    code = main(["--kills", "4", "--seed", "7", "--kinds", "dropout", "--no-extras"])
    said = capsys.readouterr().out
    assert code == 0, said
    assert "chaos: everything held: 4 kills in " in said
