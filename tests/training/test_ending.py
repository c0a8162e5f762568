"""An attempt ends even if its folder does not respond: hanging calls time out, unreadable files are reported."""

from __future__ import annotations

import errno
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.errors import raises, reported
from tests.helpers.train_helpers import at_step, check_agrees, record_of

torch = pytest.importorskip("torch")

from transformers import TrainerState  # noqa: E402

from finetune.budget.lease import Lease  # noqa: E402
from finetune.cli.main import main  # noqa: E402
from finetune.errors import TakenOver  # noqa: E402
from finetune.run_folder import RunFolder  # noqa: E402
from finetune.run_record import RunRecord, StepCount  # noqa: E402
from finetune.training import ending  # noqa: E402
from finetune.training.record.recorder import RunRecorder  # noqa: E402
from finetune.training.session import Session  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_keys")
Shown = pytest.CaptureFixture[str]


@pytest.fixture
def recorder(tmp_path: Path) -> RunRecorder:
    """The recorder of a run with two steps done."""
    record = RunRecord()
    record.status, record.attempts, record.steps = "running", 2, StepCount(2, 9)
    spending: Any = SimpleNamespace(record=lambda reason: {}, end=lambda reason: None)
    return RunRecorder(RunFolder(tmp_path), record, spending, time.monotonic())


@pytest.fixture
def hanging(recorder: RunRecorder, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A thread writes run.json to a folder that does not respond."""
    begun, responds = threading.Event(), threading.Event()

    def write(self: RunFolder, record: RunRecord) -> None:
        begun.set()
        responds.wait(60)

    monkeypatch.setattr(RunFolder, "write_record", write)
    writer = threading.Thread(target=recorder.begin, daemon=True)
    writer.start()
    assert begun.wait(10)
    yield
    responds.set()
    writer.join()


def by_the_budget(recorder: RunRecorder, run: RunFolder) -> None:
    ending.stop_hanging(run, recorder, Lease(print))


def test_the_adapter_of_a_hard_stop_is_that_of_one_checkpoint(
    recorder: RunRecorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is copied, another save is committed."""

    def copy(run: RunFolder, checkpoint: Path, check: Any) -> None:
        recorder.newest = tmp_path / "step-4"

    recorder.newest = tmp_path / "step-2"
    monkeypatch.setattr(ending, "adapter_from", copy)
    monkeypatch.setattr(ending, "read_manifest", lambda folder: {"step": int(folder.name.removeprefix("step-"))})
    ending.stop_hanging(RunFolder(tmp_path), recorder, Lease(print))
    assert record_of(tmp_path)["adapter_step"] == 2


def by_another_process(recorder: RunRecorder, run: RunFolder) -> None:
    nothing: Any = None
    spending: Any = SimpleNamespace(end=lambda reason: None)
    ending.clean_up(Session(run, nothing, recorder, spending, nothing, Lease(print)), 1)


@pytest.mark.usefixtures("hanging")
@pytest.mark.parametrize("end", [by_the_budget, by_another_process])
def test_a_hanging_folder_does_not_prevent_the_end_of_the_process(
    end: Callable[[RunRecorder, RunFolder], None],
    recorder: RunRecorder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Shown,
) -> None:
    """The writing thread holds the lock of the record."""
    monkeypatch.setattr(ending, "CLEAN_UP_SECONDS", 0.5)
    last = threading.Thread(target=end, args=(recorder, RunFolder(tmp_path)), daemon=True)
    last.start()
    last.join(20)
    assert not last.is_alive()
    if end is by_the_budget:
        assert f"{tmp_path / 'run.json'}: not written, its folder does not respond" in capsys.readouterr().err


def no_state(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """trainer_state.json cannot be read in threads of this name."""
    load = TrainerState.load_from_json

    def read(path: str) -> TrainerState:
        if threading.current_thread().name == name:
            raise OSError(errno.EIO, "Input/output error")
        return load(path)

    monkeypatch.setattr(TrainerState, "load_from_json", read)


def test_a_checkpoint_without_readable_progress_fails_the_attempt_in_one_line(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    run = tmp_path / "copy"
    shutil.copytree(tiny_run, run)
    before = record_of(run) | {"status": "running", "ended_at": None}
    (run / "run.json").write_text(json.dumps(before))
    no_state("MainThread", monkeypatch)
    with reported("checkpoint.unreadable_state"):
        assert main(["train", "--resume", str(run)]) == 2
    said = capsys.readouterr().err
    assert "step-6/trainer_state.json: cannot read the progress of the run" in said and "Traceback" not in said
    assert f"{run / 'run.json'} is not up to date until the run resumes" in said
    record = record_of(run)
    assert (record["status"], record["attempts"]) == ("failed", 2) and record["ended_at"]
    for key in ("steps", "history", "losses", "tokens", "saves"):
        assert record[key] == before[key]


def test_a_failed_read_in_the_background_is_reported_and_retried_at_the_end(
    tiny_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    """The read fails in the checkpoint writer's thread."""
    no_state("writer", monkeypatch)
    at_step(6, lambda: 1 / 0, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        main(["train", str(tiny_config(training={"max_steps": 7}, checkpoint={"save_steps": 2, "keep_last": 5}))])
    record = check_agrees(tmp_path / "runs" / "tiny-001")
    assert (record["status"], record["steps"]["done"]) == ("failed", 4)
    said = capsys.readouterr().err
    for step in (2, 4):  # the thread continued saving after the first
        assert f"step-{step}/trainer_state.json: cannot read the progress of the run" in said
    assert said.count("will retry when the attempt ends") == 2


def test_if_the_read_still_fails_at_the_end_the_record_keeps_its_progress(
    recorder: RunRecorder, tmp_path: Path, capsys: Shown
) -> None:
    recorder.committed(tmp_path / "step-4")
    assert recorder.newest == tmp_path / "step-4"
    recorder.close("failed")
    record = record_of(tmp_path)
    assert (record["status"], record["steps"]) == ("failed", {"done": 2, "planned": 9})
    lines = [line for line in capsys.readouterr().err.splitlines() if "step-4/trainer_state.json" in line]
    assert len(lines) == 2 and lines[1].endswith("run.json is not up to date until the run resumes")


def test_a_run_of_a_version_without_ids_is_refused_in_one_line(tiny_run: Path, tmp_path: Path, capsys: Shown) -> None:
    run = tmp_path / "copy"
    shutil.copytree(tiny_run, run)
    old = {key: value for key, value in record_of(run).items() if key != "run_id"} | {"status": "interrupted"}
    (run / "run.json").write_text(json.dumps(old))
    assert main(["train", "--resume", str(run)]) == 2
    assert "run.json: run_id: missing; the run is too old to resume" in capsys.readouterr().err
    assert record_of(run) == old


class LateNews:
    """A lease that another attempt has taken, which only a look shows."""

    lost: TakenOver | None = None

    def check(self) -> None:
        self.lost = TakenOver("another attempt has taken over this run", code="run.taken_over")
        raise self.lost


def test_a_failure_that_is_the_first_sign_of_another_attempt_is_that_attempt() -> None:
    """Otherwise the ledger would say that the attempt failed."""

    def fail(lease: Any) -> None:
        session: Any = SimpleNamespace(lease=lease)
        with ending.taken_over_first(session):
            raise FileNotFoundError("the other attempt has deleted it, or nobody has")

    with raises("run.taken_over", kind=TakenOver):
        fail(LateNews())
    with pytest.raises(FileNotFoundError):
        fail(SimpleNamespace(lost=None, check=lambda: None))
