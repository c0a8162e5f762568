"""When a run saves and when it stops: at the end of a step, or between two micro-batches where time is short.

Who may ask for it is runtime/stop_request.py's business; the training loop asks `Stop` at the end of every step. With
several processes all of them stop at the end of the same one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.runtime import distributed, fault_injection
from finetune.runtime.stop_request import Stop


class StepAbandoned(Exception):
    """The machine goes before the step in progress would end. Adapters and optimizer are those of the step before."""


class EndOfStep(TrainerCallback):
    """Decides at the end of every step whether it is time to save and to stop, for all processes alike.

    save_steps, every_minutes: of the config's checkpoint section. After the last step a checkpoint is saved, too.
    """

    def __init__(
        self,
        stop: Stop,
        *,
        save_steps: int | None,
        every_minutes: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stop, self.budget_stop = stop, False
        self._save_steps, self._interval = save_steps, None if every_minutes is None else 60 * every_minutes
        self._clock = clock
        self._saved = self._begun = clock()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._saved = self._clock()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._begun = self._clock()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        fault_injection.place("step")
        self.stop.step_seconds = max(
            0.8 * self.stop.step_seconds, self._clock() - self._begun
        )  # long ones are remembered
        due = self._interval is not None and self._clock() - self._saved >= self._interval
        stop, budget, due = distributed.any_of_each([bool(self.stop.first), self.stop.because_of("budget"), due])
        last = state.global_step >= state.max_steps
        by_steps = bool(self._save_steps and state.global_step % self._save_steps == 0)
        control.should_save = stop or last or due or by_steps
        control.should_training_stop = control.should_training_stop or stop
        self.budget_stop = budget and not last

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._saved = self._clock()

    def abandon_if_too_late(self) -> None:
        """Between two micro-batches. Raises StepAbandoned where the step would end too late to be saved: nothing is lost but
        the step. Several processes do not do it: each would have to know of the others in the middle of a step."""
        left = self.stop.seconds_left()
        if left is None or distributed.world_size() > 1:
            return
        expected = self._begun + self.stop.step_seconds - self._clock()
        if max(expected, 0.0) > left:
            raise StepAbandoned
