"""One TensorBoard curve and one W&B run over all attempts of a run, including attempts killed with SIGKILL.

Run as a script it is one attempt: FOLDER RESUMED LAST FATE, where FATE is `killed` or `ended`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.config.schema import TrackingSection
from finetune.training.tracking.names import wandb_mode
from finetune.training.tracking.tensorboard import EventFile, logged_points
from finetune.training.tracking.trackers import WeightsAndBiases, trackers
from finetune.training.tracking.wandb_run import wandb_run_id

SAVED_EVERY, VALIDATED_EVERY = 10, 5
LAST = 70


class Loop:
    """transformers' loop as seen by trackers: a loss at every step, a validation loss at some, a checkpoint at others."""

    def __init__(self, folder: Path, resumed: int | None, callbacks: list[TrainerCallback], attempt: int = 0) -> None:
        self.log = folder / "log_history.json"  # as in trainer_state.json of the checkpoint
        self.state = TrainerState(global_step=resumed or 0, is_world_process_zero=True)
        self.state.log_history = json.loads(self.log.read_text()) if resumed else []
        self.callbacks, self.attempt = callbacks, attempt
        self._tell("on_train_begin")

    def _tell(self, event: str, **more: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(TrainingArguments, self.state, TrainerControl(), **more)

    def log_row(self, **logs: float) -> None:
        logs["epoch"] = self.state.global_step / 100
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._tell("on_log", logs=dict(logs))

    def run(self, last: int) -> None:
        for step in range(self.state.global_step + 1, last + 1):
            self._tell("on_step_begin")
            self.state.global_step = step
            self.log_row(loss=1 / step, spent_usd=step / 100, attempt=self.attempt)
            if step % VALIDATED_EVERY == 0:
                self.log_row(eval_loss=2 / step)
            if step % SAVED_EVERY == 0:
                self.log.write_text(json.dumps(self.state.log_history))
                self._tell("on_save")

    def end(self) -> None:
        self._tell("on_log", logs={"train_runtime": 12.5, "train_loss": 0.5})
        self._tell("on_train_end")


def attempt(folder: Path, resumed: int, last: int, fate: str) -> None:
    callbacks = trackers(TrackingSection(wandb="offline"), folder, folder.name, resumed or None)
    loop = Loop(folder, resumed or None, callbacks, attempt=resumed)
    loop.run(last)
    if fate == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    loop.end()


if __name__ == "__main__":
    attempt(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])


@pytest.fixture(scope="module")
def killed_twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run killed at step 57, resumed from 50 and killed at 64, then resumed from 60 and finished."""
    folder = tmp_path_factory.mktemp("tracking") / "demo.1"
    folder.mkdir()
    (folder / "config.yaml").write_text("lora: {r: 4}\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "SKYPILOT_"))}
    environment["WANDB_API_KEY"] = "k" * 40  # must appear nowhere
    for resumed, last, fate in ((0, 57, "killed"), (50, 64, "killed"), (60, LAST, "ended")):
        command = [sys.executable, __file__, str(folder), str(resumed), str(last), fate]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == (-signal.SIGKILL if fate == "killed" else 0), done.stderr
    return folder


# TensorBoard


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) pairs as TensorBoard shows them, read with its own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def steps(folder: Path, tag: str = "train/loss") -> list[int]:
    return [step for step, _ in curve(folder, tag)]


def test_tensorboard_shows_one_curve_of_a_run_that_was_killed_twice(killed_twice: Path) -> None:
    folder = killed_twice / "tensorboard"
    assert len(list(folder.iterdir())) == 3
    every, validated = list(range(1, LAST + 1)), list(range(VALIDATED_EVERY, LAST + 1, VALIDATED_EVERY))
    for tag, expected in (
        *((f"train/{name}", every) for name in ("loss", "spent_usd", "epoch")),
        ("eval/loss", validated),
    ):
        assert steps(folder, tag) == expected
    begun = dict(curve(folder, "train/attempt"))  # the values are from the attempt that counts
    assert {begun[step] for step in range(1, 51)} == {0}
    assert {begun[step] for step in range(51, 61)} == {50} and {begun[step] for step in range(61, 71)} == {60}


def board(folder: Path, resumed: int | None, attempt: int = 0) -> tuple[Loop, list[str]]:
    said: list[str] = []
    callbacks = trackers(TrackingSection(wandb="disabled"), folder, "demo", resumed, said.append)
    return Loop(folder, resumed, callbacks, attempt), said


def files(folder: Path) -> list[Path]:
    return sorted((folder / "tensorboard").iterdir())


def test_an_attempt_that_saved_nothing_leaves_no_points(tmp_path: Path) -> None:
    board(tmp_path, None)[0].run(7)
    board(tmp_path, None, attempt=1)[0].run(3)
    assert curve(tmp_path / "tensorboard", "train/attempt") == [(1, 1.0), (2, 1.0), (3, 1.0)]


@pytest.mark.parametrize("lost", [1, 40, 1500])
def test_points_of_a_truncated_event_file_are_restored_from_the_checkpoint(tmp_path: Path, lost: int) -> None:
    board(tmp_path, None)[0].run(57)
    [torn] = files(tmp_path)
    torn.write_bytes(torn.read_bytes()[:-lost])
    before = {step for tag, step in logged_points(tmp_path / "tensorboard") if tag == "train/loss"}
    assert before == set(range(1, max(before) + 1)) and (max(before) == 56 if lost < 100 else max(before) < 50)
    board(tmp_path, 50)[0].run(60)
    assert steps(tmp_path / "tensorboard") == list(range(1, 61))
    assert steps(tmp_path / "tensorboard", "eval/loss") == list(range(5, 61, 5))


def test_points_of_a_lost_event_file_are_written_again(tmp_path: Path) -> None:
    """As with a mounted bucket, which loses the files that were open."""
    board(tmp_path, None)[0].run(57)
    files(tmp_path)[0].unlink()
    board(tmp_path, 50)[0].run(64)
    files(tmp_path)[0].write_bytes(b"")
    board(tmp_path, 60)[0].run(70)
    for tag, every in (("train/loss", 1), ("eval/loss", 5)):
        assert steps(tmp_path / "tensorboard", tag) == list(range(every, 71, every))


def test_points_after_a_lost_file_are_written_again_in_order(tmp_path: Path) -> None:
    for resumed, last in ((None, 57), (50, 64)):
        board(tmp_path, resumed)[0].run(last)
    files(tmp_path)[0].unlink()  # its points up to 50 counted; those from 51 on are in the other file
    board(tmp_path, 60)[0].run(70)
    assert steps(tmp_path / "tensorboard") == list(range(1, 71))


def test_existing_points_are_not_written_again(tmp_path: Path) -> None:
    board(tmp_path, None)[0].run(50)
    before = sum(path.stat().st_size for path in files(tmp_path))
    board(tmp_path, 50)
    assert sum(path.stat().st_size for path in files(tmp_path)) - before < 100


def test_a_clock_that_is_behind_does_not_reverse_the_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    for clock, resumed, last in ((now, None, 57), (now - 86400, 50, 64), (now - 40000, 60, 70)):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        board(tmp_path, resumed, attempt=resumed or 0)[0].run(last)
    assert steps(tmp_path / "tensorboard") == list(range(1, 71))
    assert dict(curve(tmp_path / "tensorboard", "train/attempt"))[64] == 60


def test_a_second_rank_writes_nothing(tmp_path: Path) -> None:
    [callback] = trackers(TrackingSection(wandb="disabled"), tmp_path, "demo", None)
    state = TrainerState(global_step=1, is_world_process_zero=False)
    callback.on_train_begin(TrainingArguments, state, TrainerControl())
    callback.on_log(TrainingArguments, state, TrainerControl(), logs={"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_reported_once_and_training_continues(tmp_path: Path) -> None:
    import resource

    loop, said = board(tmp_path, None)
    loop.run(10)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (files(tmp_path)[0].stat().st_size + 100, before[1]))
    try:
        for step in range(11, 40):  # its own log is not written there
            loop.state.global_step = step
            loop.log_row(loss=1 / step)
        loop.end()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    [line] = said
    assert re.fullmatch(
        r"TensorBoard: .*tensorboard: File too large; the rest of this attempt is not logged there", line
    )
    loop.log.write_text(json.dumps(loop.state.log_history))
    board(tmp_path, 39)[0].run(45)
    assert steps(tmp_path / "tensorboard") == list(range(1, 46))


def test_a_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    loop, said = board(tmp_path, None)
    loop.run(3)
    assert len(said) == 1 and "TensorBoard" in said[0] and "File exists" in said[0]


def test_a_new_file_discards_earlier_points_from_its_first_step(tmp_path: Path) -> None:
    first = EventFile(tmp_path, 1)
    for step in (1, 2, 3):
        first.add({"a": 1.0, "b": 2.0}, step)
    first.close()
    EventFile(tmp_path, 3).close()
    assert logged_points(tmp_path) == {("a", 1), ("a", 2), ("b", 1), ("b", 2)}
    assert steps(tmp_path, "a") == [1, 2]


# Weights & Biases


def records(folder: Path) -> Iterable[Any]:
    """The records of a .wandb file, read with W&B's own reader."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    [path] = folder.glob("*.wandb")
    store = DataStore()
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        yield record


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows of a finished run; W&B's process closes the file shortly after `finish` has returned."""
    until, found = time.monotonic() + 20, list(records(folder))
    while not any(record.HasField("exit") for record in found) and time.monotonic() < until:
        time.sleep(0.1)
        found = list(records(folder))
    rows = [record.history.item for record in found if record.WhichOneof("record_type") == "history"]
    return [
        {item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json) for item in row}
        for row in rows
    ]


def offline_folders(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*"))


def test_the_newest_offline_folder_is_the_whole_run(killed_twice: Path) -> None:
    folders = offline_folders(killed_twice)
    assert len(folders) == 3
    rows = history(folders[-1])
    assert [row["_step"] for row in rows] == list(range(1, LAST + 1))
    assert [row["train/loss"] for row in rows] == pytest.approx([1 / step for step in range(1, LAST + 1)])
    assert [row["_step"] for row in rows if "eval/loss" in row] == list(
        range(VALIDATED_EVERY, LAST + 1, VALIDATED_EVERY)
    )
    assert [row["train/attempt"] for row in rows] == [0] * 50 + [50] * 10 + [60] * 10
    assert rows[-1]["train/spent_usd"] == LAST / 100


def test_all_attempts_are_one_run_of_the_same_id_and_config(killed_twice: Path) -> None:
    run_id = (killed_twice / "wandb-run-id").read_text().strip()
    assert re.fullmatch(r"demo-1-[0-9a-f]{8}", run_id)
    assert all(folder.name.endswith(f"-{run_id}") for folder in offline_folders(killed_twice))
    found = list(records(offline_folders(killed_twice)[-1]))
    [run] = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.display_name, run.project) == (run_id, "demo.1", "text2sql")
    [config] = [
        json.loads(item.value_json) for record in found for item in record.config.update if item.key == "lora"
    ] or [json.loads(item.value_json) for item in run.config.update if item.key == "lora"]
    assert config == {"r": 4}
    totals = {item.key: item.value_json for record in found for item in record.summary.update}
    assert totals["train/train_runtime"] == "12.5"


def test_no_key_is_written(killed_twice: Path) -> None:
    written = [path for path in killed_twice.rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not [path for path in written if b"k" * 40 in path.read_bytes()]


@pytest.fixture
def wandb_here(no_keys: None, monkeypatch: pytest.MonkeyPatch) -> Iterable[None]:
    """W&B in this process, without capturing pytest's output; closes open runs at the end."""
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    yield
    import wandb

    if wandb.run is not None:
        wandb.run.finish()


def test_steps_already_on_the_server_are_not_sent_again(tmp_path: Path, wandb_here: None) -> None:
    """Online, W&B reports the step after its newest row; here that step is set by hand."""
    callback = WeightsAndBiases("offline", "text2sql", tmp_path, "demo", lambda _: None)
    loop = Loop(tmp_path, None, [callback])
    callback._run.log({"train/loss": 0.0}, step=57, commit=True)
    loop.run(60)
    callback._run.finish()
    [folder] = offline_folders(tmp_path)
    assert [(row["_step"], row["train/loss"]) for row in history(folder)][:2] == [
        (57, 0.0),
        (58, pytest.approx(1 / 58)),
    ]
    assert len(history(folder)) == 4


def test_a_row_is_sent_before_its_checkpoint(tmp_path: Path, wandb_here: None) -> None:
    """Otherwise a row would wait for the next log, and a kill in between would lose it."""
    callback = WeightsAndBiases("offline", "text2sql", tmp_path, "demo", lambda _: None)
    Loop(tmp_path, None, [callback]).run(SAVED_EVERY)
    assert callback._run.step == SAVED_EVERY + 1


def test_without_its_server_a_run_is_tracked_offline(
    tmp_path: Path, wandb_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # no server listens there
    said: list[str] = []
    callback = WeightsAndBiases("online", "text2sql", tmp_path, "demo", said.append)
    loop = Loop(tmp_path, None, [callback])
    loop.run(3)
    loop.end()
    callback._run.finish()
    assert said[0].startswith("W&B: ") and said[0].endswith("; this attempt is not tracked online")
    assert said[1].startswith("W&B: offline; ")
    assert [row["_step"] for row in history(offline_folders(tmp_path)[0])] == [1, 2, 3]


def test_what_wandb_says_of_its_trouble_is_said_without_a_password(
    tmp_path: Path, wandb_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> Any:
        raise RuntimeError(f"https://me:geheim@wandb.example.com refuses {'k' * 40}")

    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr("wandb.init", init)
    said: list[str] = []
    WeightsAndBiases("offline", "text2sql", tmp_path, "demo", said.append).open()
    assert said == ["W&B: https://***@wandb.example.com refuses ***; this attempt is not tracked offline"]


TASK = "sky-managed-2026-11-23-01-02-03-004_finetune_7-0"


def test_the_id_comes_from_the_user_then_the_folder_then_the_task(
    tmp_path: Path, no_keys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = wandb_run_id(tmp_path, "a/run")
    assert re.fullmatch(r"a-run-[0-9a-f]{8}", random) and wandb_run_id(tmp_path, "a/run") != random
    monkeypatch.setenv("SKYPILOT_TASK_ID", TASK)
    of_task = wandb_run_id(tmp_path, "mine")
    assert re.fullmatch(r"mine-[0-9a-f]{8}", of_task) and wandb_run_id(tmp_path, "mine") == of_task
    assert wandb_run_id(tmp_path, TASK) == TASK  # the name that on_machine/train.sh gives it
    monkeypatch.setenv("SKYPILOT_TASK_ID", "another")
    assert wandb_run_id(tmp_path, "mine") != of_task
    (tmp_path / "wandb-run-id").write_text("kept\n")
    assert wandb_run_id(tmp_path, "mine") == "kept"
    for wrong in ("../../x", "..", "a/b", "a:b", "a\x1bb", "a\nb", "x" * 129, " "):
        (tmp_path / "wandb-run-id").write_text(wrong)
        assert re.fullmatch(r"mine-[0-9a-f]{8}", wandb_run_id(tmp_path, "mine"))
    (tmp_path / "wandb-run-id").write_text("my.own id")
    assert wandb_run_id(tmp_path, "mine") == "my.own id"
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    assert wandb_run_id(tmp_path, "mine") == "given"


def test_a_long_name_makes_a_valid_wandb_id(tmp_path: Path, no_keys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYPILOT_TASK_ID", "sky/" + "t" * 300)
    for name in ("n:#%?" * 60, "sky-" + "t" * 96):
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,128}", wandb_run_id(tmp_path, name))


@pytest.mark.parametrize(
    ("setting", "key", "mode"),
    [
        ("auto", False, None), ("auto", True, "online"), ("online", False, "online"), ("offline", True, "offline"),
        ("disabled", True, None),
    ],
)  # fmt: skip
def test_wandb_is_used_as_the_config_says(
    setting: Any, key: bool, mode: str | None, no_keys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if key:
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert wandb_mode(TrackingSection(wandb=setting)) == mode
    assert len(trackers(TrackingSection(wandb=setting), tmp_path, "demo", None)) == (1 if mode is None else 2)
