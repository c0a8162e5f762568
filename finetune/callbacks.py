"""What happens around the training steps: checkpoints are committed, signals and budgets stop the run at a step's end,
speed is measured, the run record is kept up to date, and a bar shows the time left."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune import checkpoint

HISTORY_KEYS = ("loss", "learning_rate", "grad_norm", "eval_loss")


class CommitCheckpoints(TrainerCallback):
    """Turns what the trainer saved as checkpoint-N into the committed checkpoint step-N, and prunes the older ones."""

    def __init__(
        self, root: Path, *, keep_last: int, config_hash: str, data_hash: str, wait: Callable[[], None] = lambda: None
    ) -> None:
        """wait: until all ranks have come to it. Each of them writes its random state into the folder that is renamed here."""
        self.root, self.keep_last, self._wait = root, keep_last, wait
        self.hashes = {"config_hash": config_hash, "data_hash": data_hash}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._wait()
        if state.is_world_process_zero:
            self._commit(state)
        self._wait()

    def _commit(self, state: TrainerState) -> None:
        saved = self.root / f"checkpoint-{state.global_step}"
        target = checkpoint.step_folder(self.root, state.global_step)
        if not saved.is_dir():
            return
        if (target / checkpoint.MANIFEST).is_file():  # the end of the run coincides with an ordinary save
            checkpoint.remove_leftovers(self.root)
            return
        saved.rename(target)
        checkpoint.commit(target, step=state.global_step, **self.hashes)
        checkpoint.prune(self.root, self.keep_last)


class StopSignals(TrainerCallback):
    """SIGINT and SIGTERM let the current step end, save a checkpoint and stop; a second one exits at once.

    Use as a context manager around training: it puts the earlier handlers back. agree: whether one of the ranks says so; the
    signal may reach them in different steps, and all have to stop at the end of the same one.
    """

    def __init__(self, say: Callable[[str], None], agree: Callable[[bool], bool] = bool) -> None:
        self.received: str | None = None
        self._say, self._agree = say, agree
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._earlier[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        for each in self._earlier:
            signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)
        self._say(f"{self.received}: finishing this step, then saving a checkpoint (once more: exit at once)")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._agree(self.received is not None):
            control.should_save = control.should_training_stop = True


class Budget(TrainerCallback):
    """Stops the run, with a checkpoint, at the end of the step that uses up its hours or its dollars.

    seconds_before: what earlier attempts of the same run used. agree: gives every rank the answer of one clock.
    """

    def __init__(
        self,
        *,
        max_hours: float | None,
        max_run_usd: float | None,
        usd_per_hour: float | None,
        seconds_before: float = 0.0,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        hours = [math.inf if max_hours is None else max_hours]
        if max_run_usd is not None and usd_per_hour:
            hours.append(max_run_usd / usd_per_hour)
        self.seconds = min(hours) * 3600 - seconds_before
        self.started = time.monotonic()
        self.exhausted = False
        self._agree = agree

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if math.isinf(self.seconds) or state.global_step >= state.max_steps:
            return
        if self._agree(time.monotonic() - self.started >= self.seconds):
            self.exhausted = control.should_save = control.should_training_stop = True


class Rehearsal(TrainerCallback):
    """Does something once all is in place and before the first step."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._action()


class Throughput(TrainerCallback):
    """Real tokens (prompt and answer, no padding) per second of training steps; evaluation and saving do not count.

    The first step of an attempt is left out: it pays for allocations and kernel loading.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens = 0.0
        self._window = (0.0, 0.0)  # seconds, tokens since the last log
        self._first = True
        self._begun = 0.0
        self._tokens_at_begin = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._begun = time.perf_counter()
        self._tokens_at_begin = float(state.num_input_tokens_seen)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if torch.cuda.is_available() and (control.should_log or control.should_evaluate or control.should_save):
            torch.cuda.synchronize()  # else the work still queued would be booked to whatever comes next
        seconds = time.perf_counter() - self._begun
        tokens = float(state.num_input_tokens_seen) - self._tokens_at_begin
        if self._first:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._first = False
            return
        self.seconds += seconds
        self.tokens += tokens
        self._window = (self._window[0] + seconds, self._window[1] + tokens)

    def per_second(self) -> float | None:
        """Over the whole attempt; None before the second step has ended."""
        return self.tokens / self.seconds if self.seconds else None

    def take_window(self) -> float | None:
        """Since the last call."""
        seconds, tokens = self._window
        self._window = (0.0, 0.0)
        return tokens / seconds if seconds else None


class History(TrainerCallback):
    """One row per log of loss or validation loss, handed to `write` so that the run record is never far behind."""

    def __init__(self, write: Callable[[list[dict[str, Any]]], None]) -> None:
        self.rows: list[dict[str, Any]] = []
        self._write = write

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """After a resume, the rows up to the checkpoint come from the trainer's saved log."""
        self.rows = [row for row in map(_history_row, state.log_history) if row]

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        row = _history_row(state.log_history[-1]) if state.log_history else None
        if row and state.is_world_process_zero:
            self.rows.append(row)
            self._write(self.rows)


def _history_row(entry: dict[str, Any]) -> dict[str, Any] | None:
    if not ("loss" in entry or "eval_loss" in entry):
        return None
    kept = {key: _finite(entry[key]) for key in HISTORY_KEYS if key in entry}
    if "loss" in entry:
        kept["tokens_per_second"] = _finite(entry.get("tokens_per_second"))
    return {"step": entry["step"], "epoch": entry.get("epoch"), **kept}


def _finite(value: Any) -> float | None:
    """JSON has no NaN: a number that is none becomes null."""
    return float(value) if value is not None and math.isfinite(value) else None


class ProgressBar(TrainerCallback):
    """One line with steps, time left, loss and tokens per second.

    Use as a context manager around training: it ends the line, however training ends.
    """

    def __init__(self, history: History) -> None:
        self._history = history
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
            self._bar.set_postfix_str(
                f"loss {losses[-1]['loss']:.3f}" + (f", {speed:.0f} tokens/s" if speed else ""), refresh=False
            )
