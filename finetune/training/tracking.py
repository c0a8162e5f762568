"""Who watches a run: TensorBoard always, Weights & Biases where a key is there or it is asked for.

A run that was killed is one curve all the same. What an attempt logged after the checkpoint that the next one goes on from is
taken back (TensorBoard) or stands for both (W&B, which keeps the first value of a step). What was logged before it and got lost
with the machine, such as the open file of a mounted bucket, is written again from the trainer's own log, which lies in the
checkpoint. No tracker ever stops a run: what fails is said once, and the rest of that attempt is not tracked there.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.request import urlopen

import yaml
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.config.schema import TrackingSection
from finetune.errors import UserError
from finetune.runtime.credentials import wandb_key_present
from finetune.runtime.files import write_text
from finetune.training.tensorboard import TensorBoard, scalars

Mode = Literal["online", "offline"]

RUN_ID_FILE = "wandb-run-id"
TENSORBOARD = "tensorboard"
ANSWER_SECONDS = 20.0
OF_THE_WHOLE_RUN = ("train_runtime", "train_loss", "total_flos")
"""What transformers logs once more when training ends, at a step that has a row already."""


def trackers(
    tracking: TrackingSection,
    run_folder: Path,
    run_name: str,
    resumed_step: int | None,
    say: Callable[[str], None] = print,
) -> list[TrainerCallback]:
    """The callbacks that send what the trainer logs to TensorBoard's folder in the run's and, as `tracking` says, to W&B.

    resumed_step: of the checkpoint that this attempt goes on from; None where it starts from the beginning. The trainer itself
    needs `report_to=[]`. Every rank may add them; the first one writes.
    """
    found: list[TrainerCallback] = [TensorBoard(run_folder / TENSORBOARD, resumed_step, say)]
    mode = wandb_mode(tracking)
    if mode is not None:
        found.append(WeightsAndBiases(mode, tracking.wandb_project, run_folder, run_name, say))
    return found


def wandb_mode(tracking: TrackingSection) -> Mode | None:
    """How W&B is used; None: not at all."""
    if tracking.wandb == "disabled" or (tracking.wandb == "auto" and not wandb_key_present()):
        return None
    return "offline" if tracking.wandb == "offline" else "online"


def wandb_run_id(run_folder: Path, run_name: str) -> str:
    """The id of the run in W&B, the same one for all its attempts: WANDB_RUN_ID; else the one that an earlier attempt left in the
    run's folder; else made from the run's name and SKYPILOT_TASK_ID, which a managed job keeps when it is recovered; else from
    the name and a random number, since another run of that name may be in the project.

    At most 128 characters, of A-Z a-z 0-9 _ - alone. A task that names its run after itself, as finetune/job/settings.py
    does, has that name as its id.
    """
    if given := os.environ.get("WANDB_RUN_ID", "").strip():
        return given
    with suppress(OSError, UnicodeDecodeError):
        if kept := (run_folder / RUN_ID_FILE).read_text(encoding="utf-8").strip():
            return kept
    name, task = _plain(run_name), _plain(os.environ.get("SKYPILOT_TASK_ID", ""))
    if task and name == task:
        return name
    return f"{name}-{sha256(task.encode()).hexdigest()[:8] if task else secrets.token_hex(4)}"


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)[:100]


def check_server() -> None:
    """Raises OSError where W&B's server does not answer at all: `wandb.init` would wait for it without end, and the machine is
    paid for. What it answers does not matter here."""
    try:
        with urlopen(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai", timeout=ANSWER_SECONDS):
            pass
    except HTTPError:
        pass


class WeightsAndBiases(TrainerCallback):
    """One run for all attempts, in which a step of W&B is an optimizer step.

    Online, W&B says up to which step it has a row, and gets those after it. Offline, every attempt is a folder of its own, which
    begins with all rows up to the checkpoint: the newest is the whole run, and `wandb sync` of it all that is to be done.
    What a step logs is one row, which is sent once it is complete: at the next step's begin, before a checkpoint, at the end.
    """

    def __init__(self, mode: Mode, project: str, folder: Path, run_name: str, say: Callable[[str], None]) -> None:
        self._mode, self._project, self._folder, self._name, self._say = mode, project, folder, run_name, say
        self._run: Any = None
        self._row: dict[str, float] = {}
        self._row_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        modes: tuple[Mode, ...] = ("online", "offline") if self._mode == "online" else ("offline",)
        for mode in modes:
            with self._or_without_it(f"this attempt is not tracked {mode}"):
                self._run = self._init(mode)
                break
        for row in state.log_history:
            self._put(scalars(row), row["step"])

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._send()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._send()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self._run is None or not logs:
            return
        if not set(logs).isdisjoint(OF_THE_WHOLE_RUN):
            with self._or_without_it("the rest of this attempt is not logged there"):
                self._run.summary.update(scalars(logs))
            return
        self._put(scalars(logs), state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Its process sends the rest, and ends with ours: waiting for it here might cost a checkpoint at a preemption."""
        self._send()
        if self._run is not None and self._run.offline:
            self._say(
                f"W&B: offline; this folder is the whole run, all its attempts: wandb sync {Path(self._run.dir).parent}"
            )

    def _init(self, mode: Mode) -> Any:
        import wandb

        if mode == "online":
            check_server()
        run_id = wandb_run_id(self._folder, self._name)
        run = wandb.init(
            project=self._project,
            id=run_id,
            name=self._name,
            dir=str(self._folder),
            mode=mode,
            resume="allow" if mode == "online" else None,
            reinit="finish_previous",
        )
        try:
            write_text(self._folder / RUN_ID_FILE, f"{run_id}\n")
        except UserError as error:
            self._say(f"{error}; another attempt may get another run in W&B")
        file = self._folder / "config.yaml"
        if file.is_file():
            run.config.update(yaml.safe_load(file.read_text(encoding="utf-8")), allow_val_change=True)  # type: ignore[no-untyped-call]
        return run

    def _put(self, values: dict[str, float], step: int) -> None:
        if step != self._row_step:
            self._send()
        self._row, self._row_step = self._row | values, step

    def _send(self) -> None:
        row, self._row = self._row, {}
        if not row or self._run is None or self._row_step < self._run.step:  # that step has its row already
            return
        with self._or_without_it("the rest of this attempt is not logged there"):
            self._run.log(row, step=self._row_step, commit=True)

    @contextmanager
    def _or_without_it(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever W&B comes upon: its server, its process, its disk
            self._say(f"W&B: {' '.join(str(error).split()) or type(error).__name__}; {what}")
            self._run = None
