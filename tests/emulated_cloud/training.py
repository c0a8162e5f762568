"""The training that the emulated machines run, launched as a user would: a tiny model with its data in a checkout of the
project."""

from __future__ import annotations

import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from chaos.environment import ChaosEnvironment, data_section, make_environment
from finetune.budget.attempts import Account
from finetune.budget.ledger import Ledger
from finetune.checkpoint.store import CheckpointStore, Skipped
from tests.emulated_cloud.environment import CloudEnvironment
from tests.emulated_cloud.pace import START_SECONDS, wait_until

BUCKET = "finetune-text2sql-test-you"
"""What `BUCKET: auto` becomes: finetune-<project>-<user>."""
CONFIG = "tiny/run.yaml"
STEPS, SAVE_STEPS, LOGGING_STEPS = 300, 20, 5
LONG_SAVE_STEPS = 100
SET_UP = f"plan.setup_minutes={START_SECONDS / 60:.2f}"
"""Override for a small budget: the 12 minutes that are assumed before the first launch would be more than it pays for."""
SHORT = "training.max_steps=40"
"""Overrides for tests that need a machine and only a short training."""
SHOWN = ("run.json", *(f"ledger/attempt-{number:03d}.jsonl" for number in range(1, 6)))
"""Files of a run that a failure message shows."""
HEARTBEAT_SECONDS, LEASE_SECONDS = 1, 15
"""Instead of 30 and 60: attempts here last a minute."""


def add_training(checkout: Path) -> None:
    """Writes model, prepared data and config into `checkout`, which SkyPilot copies to the machine."""
    make_environment(checkout / "tiny")
    tiny = ChaosEnvironment(Path("tiny"))
    values: dict[str, dict[str, Any]] = {
        "model": {"name": str(tiny.model), "max_seq_length": 256},
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        "quantization": {"load_in_4bit": False},
        "data": asdict(data_section(tiny.folder)),
        "training": {
            "effective_batch_size": 3,
            "max_steps": STEPS,
            "learning_rate": 1e-3,
            "optim": "adamw_torch",
            "logging_steps": LOGGING_STEPS,
            "eval_steps": 0,
        },
        "checkpoint": {"save_steps": SAVE_STEPS, "every_minutes": None},
        "tracking": {"wandb": "offline"},
    }
    (checkout / CONFIG).write_text(yaml.safe_dump(values), encoding="utf-8")


def launch(task: str, *options: str, overrides: str = "", **env: object) -> list[str]:
    """The arguments of `sky launch TASK` or, with --jobs as the first option, `sky jobs launch TASK` for the tiny training,
    without its score unless EVALUATE=1 is given."""
    settings = {
        "CONFIG": CONFIG,
        "EVALUATE": 0,
        "FINETUNE_ALLOW_CPU": 1,
        "FINETUNE_HEARTBEAT_SECONDS": HEARTBEAT_SECONDS,
        "FINETUNE_LEASE_SECONDS": LEASE_SECONDS,
        "OMP_NUM_THREADS": 1,
        **({"OVERRIDES": overrides} if overrides else {}),
        **env,
    }
    jobs = ["jobs"] if options[:1] == ("--jobs",) else []
    words = [*jobs, "launch", "-y", *options[len(jobs) :], f"sky/{task}.yaml"]
    return words + [word for name, value in settings.items() for word in ("--env", f"{name}={value}")]


def steps_in_tensorboard(run: Path) -> list[int]:
    """Steps of the training loss, in the order of the event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [event.step for event in events.Scalars("train/loss")]


def wait_for_tensorboard(run: str, seconds: float = 180) -> None:
    """Waits until TensorBoard on localhost:6006 shows the run; it looks for new runs in the bucket every minute."""
    shown: list[str] = []
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ready() -> bool:
        with suppress(OSError), opener.open("http://localhost:6006/data/runs", timeout=10) as answer:
            shown[:] = json.load(answer)
        return run in shown

    wait_until(ready, seconds, lambda waited: f"TensorBoard on localhost:6006 shows {shown} after {waited:.0f} s")


def newest_checkpoint(run: Path) -> tuple[Path | None, list[Skipped]]:
    """The newest valid checkpoint of a fetched run, every byte verified, and those that were skipped."""
    run_id = json.loads((run / "run.json").read_text(encoding="utf-8"))["run_id"]
    return CheckpointStore(run / "checkpoints", run_id=run_id).latest_valid()


def long_run(steps: int, save_steps: int = LONG_SAVE_STEPS) -> str:
    """Overrides for a run that is long enough to be interrupted, at some 40 steps per second; --env FT_STEP_SECONDS=0.1 adds a
    pause of that length after each step."""
    return f"training.max_steps={steps} training.logging_steps=25 checkpoint.save_steps={save_steps}"


@dataclass
class Run:
    """A run in the bucket."""

    environment: CloudEnvironment
    name: str

    @property
    def prefix(self) -> str:
        return f"runs/{self.name}/"

    def objects(self) -> list[str]:
        """Object names below the run's folder; none before the bucket exists."""
        if BUCKET not in self.environment.buckets.names():
            return []
        return [name.removeprefix(self.prefix) for name in self.environment.buckets.objects(BUCKET, self.prefix)]

    def read(self, name: str) -> bytes:
        return self.environment.buckets.read(BUCKET, self.prefix + name)

    def record(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.read("run.json"))
        return value

    def answers(self, model: str) -> list[str]:
        """The lines of the answers of the base or the tuned model in the bucket, without the first one, of the settings."""
        place = "runs/base/" if model == "base" else f"{self.prefix}eval/answers/tuned-"
        names = self.environment.buckets.objects(BUCKET, place)
        files = [name for name in names if name.endswith("answers.jsonl" if model == "base" else ".jsonl")]
        texts = [self.environment.buckets.read(BUCKET, name).decode() for name in files if "attempts" not in name]
        return [line for text in texts for line in text.splitlines()[1:]]

    def wait_for_answers(self, model: str, count: int, seconds: float = 240) -> list[str]:
        """Waits until so many answers are in the bucket; returns their lines."""
        self._wait(
            lambda: len(self.answers(model)) >= count, seconds, f"no {count} answers of the {model} model", every=0.2
        )
        return self.answers(model)

    def updated(self, name: str) -> float:
        """When a file was last written, in seconds since the epoch: by the bucket's clock, not by that of the run."""
        return self.environment.buckets.updated(BUCKET, self.prefix + name)

    def adapter_hash(self) -> str:
        return hashlib.sha256(self.read("adapter/adapter_model.safetensors")).hexdigest()

    def committed(self) -> list[int]:
        """Steps of the checkpoints that have their manifest."""
        return sorted(step for step, file in self._checkpoint_files() if file == "manifest.json")

    def _checkpoint_files(self) -> list[tuple[int, str]]:
        """(step, name below its folder) of every object in the checkpoints' folders."""
        found = [name.split("/", 2) for name in self.objects() if name.startswith("checkpoints/step-")]
        return [(int(folder.removeprefix("step-")), file) for _, folder, file in found]

    def fetch(self, folder: Path) -> Path:
        """Copies the run to this computer, as `gcloud storage cp -r` does."""
        for name in self.objects():
            path = folder / self.name / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.read(name))
        return folder / self.name

    def account(self, folder: Path) -> Account:
        return Ledger(self.fetch(folder) / "ledger").account()

    def diagnostics(self) -> str:
        """For a failure message: the objects in the bucket, and the ends of the job's logs on the existing machines, of the logs
        that SkyPilot has fetched, and of its controller's."""
        objects = self.objects()
        found = [f"in the bucket: {objects}"]
        found += [f"{name}: {self.read(name).decode()[-1500:]}" for name in objects if name in SHOWN]
        for instance in self.environment.cloud.machines():
            found += _ends(self.environment.site.folder / instance.name, "upper/home/*/sky_logs/*/tasks/*.log")
        for logs in ("managed_jobs/**/*.log", "jobs_controller/*.log"):
            found += _ends(self.environment.sky.home / "sky_logs", logs)
        return "\n".join(found)

    def wait_for_step(self, step: int, seconds: float = 240) -> None:
        """Waits until a checkpoint of that step or a later one is committed."""
        self._wait(lambda: max(self.committed(), default=0) >= step, seconds, f"no checkpoint of step {step}")

    def wait_for_partial_checkpoint(self, since: float, seconds: float = 240) -> int:
        """Waits for a checkpoint newer than all committed ones that has some files in the bucket, written after `since` (seconds
        since the epoch; a machine that was lost before may have left another one), and returns its step."""
        newest = 0

        def ready() -> bool:
            nonlocal newest
            newest = max((step for step, _ in self._checkpoint_files()), default=0)
            return newest > max(self.committed(), default=0) and self._written_after(since, newest)

        self._wait(ready, seconds, "no checkpoint is being uploaded", every=0.2)
        return newest

    def _written_after(self, since: float, step: int) -> bool:
        with suppress(urllib.error.HTTPError):  # deleted or quarantined between the two requests
            files = [file for one, file in self._checkpoint_files() if one == step]
            return any(self.updated(f"checkpoints/step-{step}/{file}") > since for file in files)
        return False

    def wait_for_status(self, status: str, seconds: float = 240) -> None:
        self._wait(lambda: "run.json" in self.objects() and self.record()["status"] == status, seconds, f"not {status}")

    def _wait(self, ready: Callable[[], bool], seconds: float, lacking: str, every: float = 0.5) -> None:
        def failure(waited: float) -> str:
            return f"{self.name}: {lacking} after {waited:.0f} s; {self.diagnostics()}"

        wait_until(ready, seconds, failure, every=every)


def _ends(folder: Path, logs: str) -> list[str]:
    """The last part of each file below the folder that matches the pattern."""
    return [f"{path.relative_to(folder)}: {path.read_text(errors='replace')[-2500:]}" for path in folder.glob(logs)]
