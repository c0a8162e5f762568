"""Experiment tracking: the trackers of `tracking.to`; without that key TensorBoard, and Weights & Biases if a key is present.

A run that was killed and resumed is still one curve. Points logged after the checkpoint that the next attempt resumes from are
discarded (TensorBoard) or kept for both attempts (the others, which keep the first value of a step). Points logged before it and
lost with the machine, such as in a file of a mounted bucket that was still open, are written again from the trainer's log in the
checkpoint. A tracker never stops a run: an error is reported once, and the rest of that attempt is not tracked there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.config.schema import TrackingSection
from finetune.errors import UserError
from finetune.runtime.credentials import without_secrets
from finetune.runtime.files import write_text
from finetune.training.tracking.names import OUTSIDE, WandbMode, chosen, wandb_mode
from finetune.training.tracking.outside import OutsideTracker
from finetune.training.tracking.step_rows import StepRows
from finetune.training.tracking.tensorboard import TensorBoard
from finetune.training.tracking.wandb_run import RUN_ID_FILE, check_server, wandb_run_id

TENSORBOARD = "tensorboard"


def trackers(
    tracking: TrackingSection,
    run_folder: Path,
    run_name: str,
    resumed_step: int | None,
    say: Callable[[str], None] = print,
) -> list[TrainerCallback]:
    """The callbacks that send the trainer's logs to the run's TensorBoard folder and to other trackers, as `tracking` says.

    resumed_step: step of the checkpoint that this attempt resumes from; None if it starts from the beginning. The trainer itself
    needs `report_to=[]`. Every rank may add the callbacks; only rank 0 writes.
    """
    found: list[TrainerCallback] = []
    if "tensorboard" in chosen(tracking):
        found.append(TensorBoard(run_folder / TENSORBOARD, resumed_step, say))
    mode = wandb_mode(tracking)
    if mode is not None:
        found.append(WeightsAndBiases(mode, tracking.wandb_project, run_folder, run_name, say))
    found += [OutsideTracker(kind, tracking, run_folder, run_name, say) for kind in chosen(tracking) if kind in OUTSIDE]
    return found


def end_trackers(callbacks: Sequence[TrainerCallback], status: str) -> None:
    """The attempt has ended, and its files are in place. status: as in run.json."""
    for callback in callbacks:
        if isinstance(callback, OutsideTracker):
            callback.end(status)


class WeightsAndBiases(StepRows):
    """One W&B run for all attempts, in which a W&B step is an optimizer step.

    Online, W&B reports the last step it has, and only later rows are sent. Offline, every attempt writes its own folder, which
    starts with all rows up to the checkpoint: the newest folder is the whole run, and only that one needs `wandb sync`.
    """

    def __init__(self, mode: WandbMode, project: str, folder: Path, run_name: str, say: Callable[[str], None]) -> None:
        super().__init__()
        self._mode, self._project, self._folder, self._name, self._say = mode, project, folder, run_name, say
        self._run: Any = None

    @property
    def is_open(self) -> bool:
        return self._run is not None

    def open(self) -> None:
        modes: tuple[WandbMode, ...] = ("online", "offline") if self._mode == "online" else ("offline",)
        for mode in modes:
            with self._disabled_on_error(f"this attempt is not tracked {mode}"):
                self._run = self._init(mode)
                break

    def add_row(self, row: dict[str, float], step: int) -> None:
        if step < self._run.step:  # that step already has a row
            return
        with self._disabled_on_error("the rest of this attempt is not logged there"):
            self._run.log(row, step=step, commit=True)

    def add_totals(self, totals: dict[str, float]) -> None:
        with self._disabled_on_error("the rest of this attempt is not logged there"):
            self._run.summary.update(totals)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Does not wait for W&B's process, which sends until ours ends: waiting could cost a checkpoint at a preemption."""
        self.send()
        if self._run is not None and self._run.offline:
            self._say(
                f"W&B: offline; to upload the whole run with all its attempts: wandb sync {Path(self._run.dir).parent}"
            )

    def _init(self, mode: WandbMode) -> Any:
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
            self._say(f"{error}; the next attempt may become a separate run in W&B")
        file = self._folder / "config.yaml"
        if file.is_file():
            run.config.update(yaml.safe_load(file.read_text(encoding="utf-8")), allow_val_change=True)  # type: ignore[no-untyped-call]
        return run

    @contextmanager
    def _disabled_on_error(self, consequence: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # any error of W&B: its server, its process, its disk
            why = " ".join(without_secrets(str(error)).split()) or type(error).__name__
            self._say(f"W&B: {why}; {consequence}")
            self._run = None
