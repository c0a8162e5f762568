"""MLflow, Trackio and W&B online: one run over all attempts, and training that does not notice their troubles. With a real MLflow
server, Trackio's real local store, and W&B's real client."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from finetune.config.schema import TrackingSection
from finetune.run_folder import RunFolder
from finetune.training.tracking import outside
from finetune.training.tracking.outside import OutsideTracker
from finetune.training.tracking.trackers import end_trackers, trackers
from tests.helpers.mlflow_server import MLflowServer, free_port
from tests.helpers.wandb_server import KEY, wandb_server
from tests.training.test_tracking import Loop, history, offline_folders

pytestmark = pytest.mark.xdist_group("mlflow")  # one server
ROOT = Path(__file__).resolve().parents[2]
PASSWORD, TOKEN = "open-sesame-7", "token-of-mine-9"
KILLED_AT_STEP = """
import os, signal, sys
from finetune.training.callbacks import Throughput
original = Throughput.on_step_begin
def kill(self, args, state, control, **others):
    original(self, args, state, control, **others)
    if state.global_step == STEP - 1:
        os.kill(os.getpid(), signal.SIGKILL)
Throughput.on_step_begin = kill
from finetune.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    running = MLflowServer(tmp_path_factory.mktemp("mlflow"))
    running.start()
    yield running
    running.stop()


@pytest.fixture
def clean(no_keys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "TRACKIO_", "SKYPILOT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr(outside, "LAST_WAIT_SECONDS", 60.0)  # other tests may keep the processors busy


TRACKIO_ROWS = """
import json, sys
from trackio.api import Api
from trackio.sqlite_storage import SQLiteStorage
found = [(run.name, SQLiteStorage.get_logs(run.project, run.name, run_id=run.id), run.config) for run in Api().runs(sys.argv[1])]
print(json.dumps(found, default=str))
"""


def trackio_runs(folder: Path, project: str) -> list[tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    """Name, rows and config of each run, read by Trackio in a process of its own: it fixes its folder at import."""
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO_ROWS, project], capture_output=True, text=True, check=True,
        env=os.environ | {"TRACKIO_DIR": str(folder)},
    )  # fmt: skip
    return [(name, rows, config) for name, rows, config in json.loads(done.stdout.splitlines()[-1])]


TRACKIO_SERVER = """
import sys, time
import trackio
print("ready", trackio.show(block_thread=False, open_browser=False, server_port=int(sys.argv[1])), flush=True)
time.sleep(600)
"""


@pytest.fixture
def trackio_server(clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A real one, in TRACKIO_SERVER_URL. Its folder."""
    folder = tmp_path / "their-trackio"
    command = [sys.executable, "-u", "-c", TRACKIO_SERVER, str(free_port())]
    environment = os.environ | {"TRACKIO_DIR": str(folder)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("ready"):
            break
    address = re.search(r"http://\S+\?write_token=\S+", "".join(lines))
    assert address, lines
    monkeypatch.setenv("TRACKIO_SERVER_URL", address[0])
    yield folder
    process.kill()
    process.wait()
    process.stdout.close()


def test_all_attempts_are_one_run_on_a_trackio_server(trackio_server: Path, tmp_path: Path) -> None:
    for resumed, last in ((None, 57), (50, 70)):
        run, said, callback = loop("trackio", tmp_path / "demo", resumed, attempt=resumed or 0, project="served")
        run.run(last)
        if resumed:
            end_trackers([callback], "done")
        else:
            killed(callback)
        assert said == []
    [(name, found, _)] = trackio_runs(trackio_server, "served")
    assert name == (tmp_path / "demo" / "trackio-run").read_text().strip()
    rows = sorted((row["step"], row["train/attempt"]) for row in found)
    assert rows == [(step, 0) for step in range(1, 57)] + [(step, 50) for step in range(57, 71)]
    token = os.environ["TRACKIO_SERVER_URL"].partition("write_token=")[2]
    kept = [path for path in [*(tmp_path / "demo").rglob("*"), *(tmp_path / "trackio").rglob("*")] if path.is_file()]
    assert kept and not [path for path in kept if token.encode() in path.read_bytes()]


def until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.1)


# --- a real run


@pytest.mark.slow
def test_a_run_that_was_killed_and_resumed_is_one_run_in_all(
    clean: None, server: MLflowServer, tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address.replace("//", f"//someone:{PASSWORD}@"))
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
    config = tiny_config(
        training={"max_steps": 12, "eval_steps": 3},
        tracking={"to": ["tensorboard", "wandb", "mlflow", "trackio"], "wandb": "offline", "project": "killed"},
        budget={"usd_per_hour": 3600.0},
    )
    finetune = [sys.executable, "-m", "finetune"]
    said = []
    for command, code in (
        ([sys.executable, "-c", KILLED_AT_STEP.replace("STEP", "8"), "train", str(config)], -signal.SIGKILL),
        ([*finetune, "train", "--resume", str(tmp_path / "runs" / "tiny-001")], 0),
        ([*finetune, "evaluate", "--no-base", str(tmp_path / "runs" / "tiny-001")], 0),
        ([*finetune, "report", str(tmp_path / "runs" / "tiny-001")], 0),
        ([*finetune, "report", str(tmp_path / "runs" / "tiny-001")], 0),
    ):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        said.append(done.stdout + done.stderr)
        if code:
            until(lambda: [run.info.status for run in server.runs("killed")] == ["FAILED"])
    run = tmp_path / "runs" / "tiny-001"

    [found] = server.runs("killed")
    assert found.info.run_name == "tiny-001" and found.info.status == "FINISHED"
    assert (run / "mlflow-run-id").read_text().strip() == found.info.run_id
    for key in ("train/loss", "train/learning_rate", "train/spent_usd", "train/peak_memory_gib"):
        assert [step for step, _ in server.curve(found.info.run_id, key)] == list(range(1, 13)), key
    assert [step for step, _ in server.curve(found.info.run_id, "eval/loss")] == [3, 6, 9, 12]
    assert server.curve(found.info.run_id, "train/tokens_per_second")[-1][0] == 12
    assert found.data.params["lora.r"] == "4" and found.data.params["training.max_steps"] == "12"
    losses = {row["step"]: row["loss"] for row in RunFolder(run).record().history or [] if "loss" in row}
    assert dict(server.curve(found.info.run_id, "train/loss")) == pytest.approx(losses)
    score = json.loads((run / "eval.json").read_text())["models"]["tuned"]["execution_accuracy"]
    assert server.curve(found.info.run_id, "score/tuned") == [(12, score)]  # once, although it was sent three times
    report = server.client().download_artifacts(found.info.run_id, "report.html", str(tmp_path))
    assert Path(report).read_bytes() == (run / "report.html").read_bytes()

    [(name, rows, values)] = trackio_runs(tmp_path / "trackio", "killed")
    assert name.startswith("tiny-001-") and name == (run / "trackio-run").read_text().strip()
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 13))
    assert {row["step"]: row["train/loss"] for row in rows if "train/loss" in row} == pytest.approx(losses)
    assert [row["score/tuned"] for row in rows if "score/tuned" in row] == [score]
    assert values["lora"]["r"] == 4

    newest = history(offline_folders(run)[-1])
    assert {row["_step"]: row["train/loss"] for row in newest} == pytest.approx(losses)

    written = [path for path in [*run.rglob("*"), *(tmp_path / "trackio").rglob("*")] if path.is_file()]
    assert len(written) > 10
    for secret in (PASSWORD, TOKEN):
        assert not [text for text in said if secret in text]
        assert not [path for path in written if secret.encode() in path.read_bytes()]
        assert secret.encode() not in (server.folder / "store.db").read_bytes()


def test_a_run_at_wandb_has_its_rows_once_and_its_score(
    clean: None, tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's real client, over the wire."""
    config = tiny_config(training={"max_steps": 6, "eval_steps": 3}, tracking={"to": ["wandb"], "wandb": "online"})
    run = tmp_path / "runs" / "tiny-001"
    finetune = [sys.executable, "-m", "finetune"]
    with wandb_server() as (address, runs):
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        for command, code in (
            ([sys.executable, "-c", KILLED_AT_STEP.replace("STEP", "5"), "train", str(config)], -signal.SIGKILL),
            ([*finetune, "train", "--resume", str(run)], 0),
            ([*finetune, "evaluate", "--no-base", str(run)], 0),
            ([*finetune, "report", str(run)], 0),
        ):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == code, done.stderr
        [((project, name), found)] = runs.items()
        assert (project, name) == ("text2sql", (run / "wandb-run-id").read_text().strip())
        assert [row["_step"] for row in found.history if "train/loss" in row] == list(range(1, 7))
        score = json.loads((run / "eval.json").read_text())["models"]["tuned"]["execution_accuracy"]
        assert found.summary["score/tuned"] == score and "train/loss" in found.summary
        assert found.config["lora"]["value"]["r"] == 4

        runs.clear()  # deleted there: it does not come back as a run of a score alone
        done = subprocess.run([*finetune, "report", str(run)], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "W&B: " in done.stdout + done.stderr and not runs
    assert not [path for path in run.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


# --- the loop of transformers alone


def loop(
    kind: str, folder: Path, resumed: int | None, attempt: int = 0, project: str = "loops"
) -> tuple[Loop, list[str], OutsideTracker]:
    said: list[str] = []
    folder.mkdir(exist_ok=True)
    [callback] = trackers(TrackingSection(to=[kind], project=project), folder, "demo", resumed, said.append)
    assert isinstance(callback, OutsideTracker)
    return Loop(folder, resumed, [callback], attempt), said, callback


def killed(callback: OutsideTracker) -> None:
    """As when the training process is killed: the pipe closes, and no status comes."""
    assert callback._process is not None and callback._process.close(60)


@pytest.mark.parametrize("kind", ["mlflow", "trackio"])
def test_a_step_keeps_the_value_of_the_attempt_that_logged_it_first(
    kind: str, clean: None, server: MLflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    folder, project = tmp_path / "demo", f"attempts-{kind}"
    first, _, callback = loop(kind, folder, None, project=project)
    first.run(57)
    killed(callback)
    second, said, callback = loop(kind, folder, 50, attempt=50, project=project)
    second.run(70)
    end_trackers([callback], "done")
    if kind == "mlflow":
        [run] = server.runs(project)
        rows = server.curve(run.info.run_id, "train/attempt")
    else:
        [(_, found, _)] = trackio_runs(tmp_path / "trackio", project)
        rows = sorted((row["step"], row["train/attempt"]) for row in found)
    # the row of step 57 was still waiting for the step to end
    assert rows == [(step, 0) for step in range(1, 57)] + [(step, 50) for step in range(57, 71)]
    assert said == []


def test_rows_that_were_lost_with_the_machine_are_logged_from_the_checkpoint(
    clean: None, server: MLflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    first, _, callback = loop("mlflow", tmp_path / "demo", None, project="lost")
    first.run(57)
    assert callback._process is not None
    os.kill(callback._process._process.pid, signal.SIGKILL)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    second, said, callback = loop("mlflow", tmp_path / "demo", 50, project="lost")
    second.run(60)
    end_trackers([callback], "done")
    [run] = server.runs("lost")
    assert [step for step, _ in server.curve(run.info.run_id, "train/loss")] == list(range(1, 61))
    assert [step for step, _ in server.curve(run.info.run_id, "eval/loss")] == list(range(5, 61, 5))
    assert said == []


def test_a_run_that_was_deleted_on_the_server_is_logged_anew(
    clean: None, server: MLflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    for resumed in (None, 10):
        again, _, callback = loop("mlflow", tmp_path / "demo", resumed, project="deleted")
        again.run(10 if resumed is None else 15)
        end_trackers([callback], "done")
        if resumed is None:
            [run] = server.runs("deleted")
            server.client().delete_run(run.info.run_id)
    [run] = server.runs("deleted")
    assert [step for step, _ in server.curve(run.info.run_id, "train/loss")] == list(range(1, 16))


def test_a_changed_key_of_a_resumed_run_is_a_tag(
    clean: None, server: MLflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    (tmp_path / "demo").mkdir()
    for resumed, ceiling in ((None, 5), (10, 7)):
        (tmp_path / "demo" / "config.yaml").write_text(f"budget: {{max_run_usd: {ceiling}}}\nlora: {{r: 4}}\n")
        again, said, callback = loop("mlflow", tmp_path / "demo", resumed, project="changed")
        again.run(10 if resumed is None else 12)
        end_trackers([callback], "done")
        assert said == []
    [run] = server.runs("changed")
    assert run.data.params == {"budget.max_run_usd": "5", "lora.r": "4"}
    assert run.data.tags["finetune.changed"] == "budget.max_run_usd: 5 -> 7"


# --- trouble


def quick(run: Loop, last: int, seconds: float = 2.0) -> None:
    """Run the loop, which must not wait for the tracker: 100 steps take 0.01 s alone."""
    began = time.monotonic()
    run.run(last)
    assert time.monotonic() - began < seconds


@pytest.mark.slow
def test_a_server_that_is_down_at_the_start_and_in_the_middle_gets_everything(
    clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "server").mkdir()
    server = MLflowServer(tmp_path / "server")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address.replace("//", f"//someone:{PASSWORD}@"))
    running, said, callback = loop("mlflow", tmp_path / "demo", None, project="down")
    quick(running, 20)
    until(lambda: len(said) == 1)
    server.start()
    try:
        until(lambda: len(said) == 2)
        quick(running, 40)
        [run] = server.runs("down")
        until(lambda: len(server.curve(run.info.run_id, "train/loss")) == 40)
        server.stop()
        quick(running, 60)
        time.sleep(5)
        server.start()
        quick(running, 80)
        end_trackers([callback], "done")
        assert [step for step, _ in server.curve(run.info.run_id, "train/loss")] == list(range(1, 81))
        assert server.runs("down")[0].info.status == "FINISHED"
    finally:
        server.stop()
    first, second = said  # each once, however often it happens
    assert first.startswith("MLflow: ") and first.endswith("training goes on, and what is not logged is tried again")
    assert "\n" not in first and len(first) < 450 and PASSWORD not in first
    assert second == "MLflow: logged again, from where it stopped"


@pytest.mark.parametrize("kind", ["mlflow", "trackio"])
def test_a_server_that_never_answers_does_not_slow_training(
    kind: str, clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = socket.create_server(("127.0.0.1", 0), backlog=64)
    address = f"http://127.0.0.1:{silent.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("TRACKIO_SERVER_URL", f"{address}?write_token={TOKEN}")
    monkeypatch.setattr(outside, "LAST_WAIT_SECONDS", 1.0)
    running, said, callback = loop(kind, tmp_path / "demo", None)
    assert callback._process is not None
    child = callback._process._process
    quick(running, 100)
    began = time.monotonic()
    end_trackers([callback], "done")
    assert time.monotonic() - began < 5
    assert len(said) == 1 and said[0].endswith("its last rows are still being sent, for a minute at most")
    assert child.poll() is None
    silent.close()
    child.kill()
    child.wait()


def test_an_interrupted_run_does_not_wait(clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = socket.create_server(("127.0.0.1", 0), backlog=64)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
    running, said, callback = loop("mlflow", tmp_path / "demo", None)
    running.run(5)
    assert callback._process is not None
    child, began = callback._process._process, time.monotonic()
    end_trackers([callback], "interrupted")
    assert time.monotonic() - began < 1 and said == []
    child.kill()
    silent.close()


def test_a_full_disk_is_reported_once_and_training_goes_on(
    clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside, "LAST_WAIT_SECONDS", 1.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # of the process that is started now
    try:
        said: list[str] = []
        [callback] = trackers(TrackingSection(to=["trackio"]), tmp_path, "demo", None, said.append)
        assert isinstance(callback, OutsideTracker)
        state = TrainerState(global_step=0, is_world_process_zero=True)
        callback.on_train_begin(TrainingArguments, state, TrainerControl())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for step in range(1, 50):
        state.global_step = step
        callback.on_log(TrainingArguments, state, TrainerControl(), logs={"loss": 1.0})
    until(lambda: bool(said))
    assert callback._process is not None
    child = callback._process._process
    child.kill()
    assert len(said) == 1 and said[0].startswith("Trackio: ") and "training goes on" in said[0]


def test_a_process_that_is_killed_is_reported_and_training_goes_on(
    clean: None, server: MLflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    running, said, callback = loop("mlflow", tmp_path / "demo", None, project="worker")
    running.run(3)
    assert callback._process is not None
    os.kill(callback._process._process.pid, signal.SIGKILL)
    until(lambda: bool(said))
    quick(running, 100)
    end_trackers([callback], "done")
    assert said == ["MLflow: its process has ended (-9); the rest is not logged there"]


def test_a_second_rank_starts_no_process(clean: None, tmp_path: Path) -> None:
    for callback in trackers(TrackingSection(to=["mlflow", "trackio"]), tmp_path, "demo", None):
        assert isinstance(callback, OutsideTracker)
        state = TrainerState(global_step=1, is_world_process_zero=False)
        callback.on_train_begin(TrainingArguments, state, TrainerControl())
        callback.on_log(TrainingArguments, state, TrainerControl(), logs={"loss": 1.0})
        assert callback._process is None
        callback.end("done")
    assert not list(tmp_path.iterdir())
