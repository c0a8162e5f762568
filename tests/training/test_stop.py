"""How `finetune train` stops (Ctrl-C, SIGTERM, kill, budget) and how `--resume` continues."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.errors import reported
from tests.helpers.metadata_server import MetadataServer
from tests.helpers.train_helpers import adapter_of, at_step, change, record_of, steps_in

torch = pytest.importorskip("torch")

from finetune.checkpoint import folders as checkpoint_folders  # noqa: E402
from finetune.cli.main import main  # noqa: E402
from finetune.training.scratch import scratch_folders  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_keys")
ROOT = Path(__file__).resolve().parents[2]
ConfigWriter = Callable[..., Path]
Shown = pytest.CaptureFixture[str]


# --- interrupted and resumed

LONG = {"max_steps": 40, "group_by_length": False}


def start_and_wait(config: Path, until: Callable[[], bool]) -> subprocess.Popen[str]:
    """`finetune train` in a separate process, returned as soon as `until` holds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", "train", str(config)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 600
    while not until():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def another_machine(run: Path) -> None:
    """Delete the staged saves on the local disk, as on a new machine."""
    for folder in scratch_folders(record_of(run)["run_id"]):
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def uninterrupted(write_config: ConfigWriter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    assert main(["train", str(write_config(folder, training=LONG, checkpoint={"save_steps": 100}))]) == 0
    return folder / "runs" / "tiny-001"


def test_ctrl_c_ends_with_a_checkpoint_and_resume_continues_from_it(
    uninterrupted: Path, tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown
) -> None:
    config = tiny_config(training=LONG, checkpoint={"save_steps": 100})
    run = tmp_path / "runs" / "tiny-001"
    process = start_and_wait(config, lambda: (run / "run.json").is_file() and len(record_of(run)["history"]) > 2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 75
    assert "SIGINT (once more: exit at once): finishing this step, then saving a checkpoint" in said
    assert f"{run}: interrupted, a checkpoint is saved\n" in said
    assert f"finetune train --resume {run}   (" in said
    assert "Traceback" not in said
    first = record_of(run)
    stopped_at = first["steps"]["done"]
    assert first["status"] == "interrupted"
    assert first["ended_at"] is not None
    assert 3 <= stopped_at < 40
    assert steps_in(first) == list(range(1, stopped_at + 1))
    assert checkpoint_folders.fault(run / "checkpoints" / f"step-{stopped_at}") is None
    assert (first["stop"]["reason"], first["saves"]["committed_step"]) == ("signal", stopped_at)
    assert f"the checkpoint of step {stopped_at} is committed" in said
    assert not (run / "adapter").exists()

    assert main(["train", "--resume", str(run)]) == 0
    assert f"resuming from {run / 'checkpoints' / f'step-{stopped_at}'}" in capsys.readouterr().err
    record, whole = record_of(run), record_of(uninterrupted)
    assert record["status"] == "done"
    assert record["attempts"] == 2
    assert record["steps"] == {"done": 40, "planned": 40}
    assert steps_in(record) == list(range(1, 41))
    assert record["history"][:stopped_at] == first["history"]
    assert record["wall_seconds"] > first["wall_seconds"]
    assert record["started_at"] == first["started_at"]
    assert record["tokens"] == whole["tokens"]
    assert [path.name for path in checkpoint_folders.newest_first(uninterrupted / "checkpoints")] == [
        "step-40"
    ]  # at the end
    numbers = ("step", "epoch", "loss", "learning_rate", "grad_norm")
    assert [[row[name] for name in numbers] for row in record["history"]] == [
        [row[name] for name in numbers] for row in whole["history"]
    ]
    assert adapter_of(run) == adapter_of(uninterrupted)  # exact, as long as batches are not grouped by length


def test_sigterm_saves_at_the_end_of_the_step_in_which_it_comes(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(training={"max_steps": 5}, checkpoint={"save_steps": 100})
    assert main(["train", str(config)]) == 0
    with monkeypatch.context() as patched:
        at_step(3, lambda: signal.raise_signal(signal.SIGTERM), patched)
        assert main(["train", str(config)]) == 75
    whole, run = (tmp_path / "runs" / f"tiny-00{n}" for n in (1, 2))
    assert record_of(run)["status"] == "interrupted"
    assert [path.name for path in checkpoint_folders.newest_first(run / "checkpoints")] == ["step-3"]
    assert main(["train", "--resume", str(run)]) == 0
    assert record_of(run)["tokens"] == record_of(whole)["tokens"]
    assert adapter_of(run) == adapter_of(whole)  # within one epoch, resume is exact


def test_googles_notice_saves_and_stops(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    config = tiny_config(training={"max_steps": 30}, checkpoint={"save_steps": 100})

    def notice() -> None:
        google.set("preempted", "TRUE")
        time.sleep(1.0)  # it arrives over the network, in a thread

    with MetadataServer() as google, monkeypatch.context() as patched:
        patched.setenv("GCE_METADATA_HOST", google.host)
        at_step(3, notice, patched)
        assert main(["train", str(config)]) == 75
    record = record_of(tmp_path / "runs" / "tiny-001")
    assert record["status"] == "interrupted"
    assert record["stop"]["reason"] == "preemption" and 0 < record["stop"]["seconds"] < 25
    assert record["saves"]["committed_step"] == record["steps"]["done"] <= 4
    assert "Google takes this machine back: finishing this step" in capsys.readouterr().err


def test_a_second_ctrl_c_exits_at_once_and_leaves_no_partial_save(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        at_step(4, twice, patched)
        assert main(["train", str(tiny_config(training={"max_steps": 5}))]) == 75
    run = tmp_path / "runs" / "tiny-001"
    assert record_of(run)["status"] == "interrupted"
    assert [path.name for path in checkpoint_folders.newest_first(run / "checkpoints")] == ["step-2"]
    assert main(["train", "--resume", str(run)]) == 0
    assert steps_in(record_of(run)) == [1, 2, 3, 4, 5]


def test_a_killed_run_resumes_from_the_last_complete_checkpoint(
    tiny_config: ConfigWriter, tmp_path: Path, capsys: Shown
) -> None:
    config = tiny_config(training={"max_steps": 90})
    run = tmp_path / "runs" / "tiny-001"
    checkpoints = run / "checkpoints"
    process = start_and_wait(config, lambda: (checkpoints / "step-6" / "manifest.json").is_file())
    process.kill()
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert record_of(run)["status"] == "running"
    another_machine(run)
    for folder in checkpoints.iterdir():
        if not (folder / "manifest.json").is_file():
            shutil.rmtree(folder)
    newest, older = list(checkpoint_folders.newest_first(checkpoints))[:2]
    size = (newest / "adapter_model.safetensors").stat().st_size
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])  # a copy that was cut off
    shutil.copytree(older, checkpoints / "step-99")  # a save that was cut off
    (checkpoints / "step-99" / "manifest.json").unlink()

    assert main(["train", "--resume", str(run)]) == 0
    said = capsys.readouterr().err
    assert f"passed over {newest}: adapter_model.safetensors has {size - 1} bytes instead of {size}" in said
    assert f"passed over {checkpoints / 'step-99'}: no manifest: the save was cut off" in said
    assert f"resuming from {older}" in said
    record = record_of(run)
    assert (record["status"], record["attempts"]) == ("done", 2)
    assert steps_in(record) == list(range(1, 91))
    names = {path.name for path in checkpoints.iterdir() if path.is_dir()}
    assert {f"damaged-{newest.name}", "step-90"} < names and len(names) == 3, (
        "if a save waits while another one runs, it may be dropped"
    )
    assert checkpoint_folders.fault(checkpoints / "step-90") is None


def test_an_orphaned_staged_save_is_committed_by_the_next_attempt_on_the_machine(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    config = tiny_config(training={"max_steps": 6}, checkpoint={"save_steps": 2})
    assert main(["train", str(config)]) == 0
    monkeypatch.setenv("FINETUNE_FAULT", "manifest:2")
    killed = subprocess.run([sys.executable, "-m", "finetune", "train", str(config)], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    monkeypatch.delenv("FINETUNE_FAULT")
    whole, run = (tmp_path / "runs" / f"tiny-00{n}" for n in (1, 2))
    assert [path.name for path in (run / "checkpoints").glob("*/manifest.json")] == ["manifest.json"]
    assert main(["train", "--resume", str(run)]) == 0
    said = capsys.readouterr().err
    assert re.search(r"committed the staged save of step [46], which an earlier attempt left on this machine", said)
    assert adapter_of(run) == adapter_of(whole)


def test_a_step_that_would_end_too_late_is_abandoned_and_the_state_before_it_saved(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    config = tiny_config(training={"max_steps": 6}, lora={"lora_dropout": 0.2}, checkpoint={"save_steps": 100})
    assert main(["train", str(config)]) == 0
    with monkeypatch.context() as patched:
        patched.setattr("finetune.runtime.stop_request.NOTICE_SECONDS", 1.0)  # less than the time for saving
        at_step(4, lambda: signal.raise_signal(signal.SIGTERM), patched)
        assert main(["train", str(config)]) == 75
    whole, run = (tmp_path / "runs" / f"tiny-00{n}" for n in (1, 2))
    assert "the step in progress would end too late: saving the state from before it" in capsys.readouterr().err
    record = record_of(run)
    assert (record["status"], record["steps"]["done"], record["saves"]["committed_step"]) == ("interrupted", 3, 3)
    assert main(["train", "--resume", str(run)]) == 0
    assert steps_in(record_of(run)) == [1, 2, 3, 4, 5, 6]
    assert adapter_of(run) == adapter_of(whole)


KINDS: list[dict[str, Any]] = [
    {"training": {"max_steps": 14, "group_by_length": True}},  # 24 examples, 4 a step: more than two epochs
    {"training": {"max_steps": 14, "logging_steps": 5, "eval_steps": 3}, "lora": {"lora_dropout": 0.3}},
    {
        "training": {"max_steps": 8, "per_device_train_batch_size": "auto", "gradient_accumulation_steps": None,
                     "effective_batch_size": 5, "kernels": "fused"},
        "lora": {"lora_dropout": 0.3}, "quantization": {"load_in_4bit": False},
    },
]  # fmt: skip


@pytest.fixture(scope="module")
def whole_of(write_config: ConfigWriter, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """whole_of(i) returns the config file of KINDS[i], whose uninterrupted run is tiny-001."""

    @cache
    def made(kind: int) -> Path:
        config = write_config(tmp_path_factory.mktemp("whole"), **KINDS[kind], checkpoint={"save_steps": 100})
        assert main(["train", str(config)]) == 0
        return config

    return made


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        pytest.param(kind, step, marks=[] if kind == number else [pytest.mark.repeat])
        for number, step in enumerate((5, 6, 7))
        for kind in range(len(KINDS))
    ],
)
def test_a_resumed_run_is_byte_for_byte_the_uninterrupted_one(
    kind: int, step: int, whole_of: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of an epoch, at its last step, and at the first step of the next."""
    config = whole_of(kind)
    whole, run = (config.parent / "runs" / name for name in ("tiny-001", f"at-{step}"))
    with monkeypatch.context() as patched:
        at_step(step, lambda: signal.raise_signal(signal.SIGTERM), patched)
        assert main(["train", str(config), f"training.run_name={run.name}"]) == 75
    assert main(["train", "--resume", str(run)]) == 0
    assert adapter_of(run) == adapter_of(whole)
    columns = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm")
    one, other = ([[row.get(name) for name in columns] for row in record_of(each)["history"]] for each in (whole, run))
    assert one == other


def test_adapters_that_were_not_loaded_are_noticed_before_the_first_step(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    run = interrupted_copy(tiny_run, tmp_path)
    monkeypatch.setattr("transformers.Trainer._load_from_checkpoint", lambda *_, **__: None)
    with reported("resume.adapter_not_loaded"):
        assert main(["train", "--resume", str(run)]) == 2
    assert "adapter tensors were not loaded into the model" in capsys.readouterr().err


def test_another_base_model_is_noticed_before_the_first_step(
    tiny_run: Path, tiny_model: Path, tmp_path: Path, capsys: Shown
) -> None:
    from safetensors.torch import load_file, save_file

    run = interrupted_copy(tiny_run, tmp_path)
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: value * 1.5 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    for config in (run / "config.yaml", run / "checkpoints" / "step-4" / "config.yaml"):
        change(config, "model", name=str(other))
    reseal(run / "checkpoints" / "step-4")
    with reported("resume.model_changed"):
        assert main(["train", "--resume", str(run)]) == 2
    assert "the loaded model does not behave like the saved one (loss" in capsys.readouterr().err


def interrupted_copy(run: Path, folder: Path) -> Path:
    """A copy of the run as it was after the checkpoint of step 4."""
    copy = folder / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step-6")
    (copy / "run.json").write_text(json.dumps(record_of(copy) | {"status": "interrupted"}))
    return copy


def reseal(folder: Path) -> None:
    """Write a new manifest that matches the files in the folder."""
    from finetune.checkpoint.store import CheckpointStore

    manifest = checkpoint_folders.read_manifest(folder)
    moved = folder.rename(folder.with_name("moved"))
    (moved / "manifest.json").unlink()
    labels = {name: manifest[name] for name in ("step", "config_hash", "data_hash", "attempt")}
    CheckpointStore(folder.parent, run_id=manifest["run_id"]).put(moved, **labels)
    shutil.rmtree(moved)


def test_a_run_killed_before_its_first_checkpoint_starts_from_the_beginning(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    def fault() -> None:
        raise RuntimeError("the machine is on fire")

    config = tiny_config(training={"max_steps": 4})
    assert main(["train", str(config)]) == 0
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="on fire"):
        at_step(2, fault, patched)
        main(["train", str(config)])
    whole, run = (tmp_path / "runs" / f"tiny-00{n}" for n in (1, 2))
    assert record_of(run)["status"] == "failed"
    capsys.readouterr()
    meanwhile: list[dict[str, Any]] = []
    at_step(2, lambda: meanwhile.append(record_of(run)), monkeypatch)
    assert main(["train", "--resume", str(run)]) == 0
    assert [(record["status"], record["ended_at"]) for record in meanwhile] == [("running", None)]
    assert f"{run}: no checkpoint to resume from, starting from the beginning" in capsys.readouterr().err
    assert steps_in(record_of(run)) == [1, 2, 3, 4]
    assert adapter_of(run) == adapter_of(whole)


def test_a_run_killed_after_its_last_checkpoint_only_saves_its_adapter(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(tiny_run, run)
    shutil.rmtree(run / "adapter")
    before = record_of(tiny_run)
    (run / "run.json").write_text(json.dumps(before | {"status": "running"}))
    assert main(["train", "--resume", str(run)]) == 0
    after = record_of(run)
    assert adapter_of(run) == adapter_of(tiny_run)
    assert after["status"] == "done"
    for key in ("history", "steps", "tokens", "losses", "tokens_per_second"):
        assert after[key] == before[key]
    assert after["peak_memory_gib"]["value"] >= before["peak_memory_gib"]["value"]


def test_a_run_resumes_with_the_same_data_in_another_folder(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(tiny_run, run)
    (run / "run.json").write_text(json.dumps(record_of(run) | {"status": "interrupted"}))
    shutil.copytree(tiny_data, tmp_path / "moved")
    change(run / "config.yaml", "data", output_dir=str(tmp_path / "moved"))
    assert main(["train", "--resume", str(run)]) == 0
    record = record_of(run)
    assert (record["status"], record["steps"]) == ("done", {"done": 6, "planned": 6})
    assert record["data"]["path"] == str(tmp_path / "moved")


def test_the_plan_section_may_change_between_two_attempts(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(tiny_run, run)
    (run / "run.json").write_text(json.dumps(record_of(run) | {"status": "interrupted"}))
    change(run / "config.yaml", "plan", mean_tokens=99.0, gpus=["T4"])
    assert main(["train", "--resume", str(run)]) == 0
    assert record_of(run)["config"]["plan"]["gpus"] == ["T4"]
