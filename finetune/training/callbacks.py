"""Callbacks around the training steps: throughput, the history in the run record, and the progress bar.

`save_policy` decides when a run saves and stops, `staging` what is saved."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

HISTORY_KEYS = ("loss", "learning_rate", "grad_norm", "eval_loss")


class BeforeFirstStep(TrainerCallback):
    """Runs actions once training is set up, before the first step."""

    def __init__(self, *actions: Callable[[], None]) -> None:
        self._actions = actions

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for action in self._actions:
            action()


class AfterFirstStep(TrainerCallback):
    """Runs actions once the first step of this attempt is done on the GPU, too."""

    def __init__(self, *actions: Callable[[], None]) -> None:
        self._actions = actions

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._actions and torch.cuda.is_available():
            torch.cuda.synchronize()
        for action in self._actions:
            action()
        self._actions = ()


class Throughput(TrainerCallback):
    """Real tokens (prompt and answer, no padding) per second of training steps; evaluation and saving do not count.

    The first step of an attempt is left out because it includes allocations and kernel loading.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens = 0.0
        self._interval = (0.0, 0.0)  # seconds, tokens since the last log
        self._first = True
        self._begun = self._first_began = 0.0
        self._tokens_at_begin = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._begun = time.perf_counter()
        self._first_began = self._first_began or self._begun
        self._tokens_at_begin = float(state.num_input_tokens_seen)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if torch.cuda.is_available() and (control.should_log or control.should_evaluate or control.should_save):
            torch.cuda.synchronize()  # otherwise queued work would be attributed to what follows the step
        seconds = time.perf_counter() - self._begun
        tokens = float(state.num_input_tokens_seen) - self._tokens_at_begin
        if self._first:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._first = False
            return
        self.seconds += seconds
        self.tokens += tokens
        self._interval = (self._interval[0] + seconds, self._interval[1] + tokens)

    def wall_seconds(self) -> float:
        """Wall time since the first step of this attempt began, including evaluation and saving."""
        return time.perf_counter() - self._first_began if self._first_began else 0.0

    def per_second(self) -> float | None:
        """Mean tokens per second of the whole attempt; None before the second step has ended."""
        return self.tokens / self.seconds if self.seconds else None

    def take_interval(self) -> float | None:
        """Mean tokens per second since the last call."""
        seconds, tokens = self._interval
        self._interval = (0.0, 0.0)
        return tokens / seconds if seconds else None


class History(TrainerCallback):
    """One row per log of loss or validation loss, passed to `write` so that the run record stays up to date."""

    def __init__(self, write: Callable[[list[dict[str, Any]]], None]) -> None:
        self.rows: list[dict[str, Any]] = []
        self._write = write

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """After a resume, the rows up to the checkpoint come from the trainer's saved log."""
        self.rows = history_rows(state.log_history)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        row = _history_row(state.log_history[-1]) if state.log_history else None
        if row and state.is_world_process_zero:
            self.rows.append(row)
            self._write(self.rows)


def history_rows(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of run.json's history from the log of a trainer's state."""
    return [row for row in map(_history_row, log_history) if row]


def _history_row(entry: dict[str, Any]) -> dict[str, Any] | None:
    if not ("loss" in entry or "eval_loss" in entry):
        return None
    kept = {key: _finite(entry[key]) for key in HISTORY_KEYS if key in entry}
    if "loss" in entry:
        kept["tokens_per_second"] = _finite(entry.get("tokens_per_second"))
    return {"step": entry["step"], "epoch": entry.get("epoch"), **kept}


def _finite(value: Any) -> float | None:
    """JSON has no NaN: a value that is not finite becomes null."""
    return float(value) if value is not None and math.isfinite(value) else None


class ProgressBar(TrainerCallback):
    """One line with steps, time left, loss and tokens per second.

    Use as a context manager around training, so that the line is always terminated.
    """

    def __init__(self, history: History, more: Callable[[], str] = str) -> None:
        """more: text to show after loss and speed, such as the cost."""
        self._history, self._more = history, more
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step", smoothing=0.1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        losses = [row for row in self._history.rows if row.get("loss") is not None]
        if self._bar is not None and losses:
            speed = losses[-1].get("tokens_per_second")
            parts = [f"loss {losses[-1]['loss']:.3f}", f"{speed:.0f} tokens/s" if speed else "", self._more()]
            self._bar.set_postfix_str(", ".join(part for part in parts if part), refresh=False)
