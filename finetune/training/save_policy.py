"""When a run saves and when it stops: at the end of a step, or between two micro-batches if time is short.

Requests to stop come through runtime/stop_request.py; the training loop checks `Stop` at the end of every step. Several
processes all stop at the end of the same step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from finetune.runtime import distributed, fault_injection
from finetune.runtime.stop_request import NOTICE_SECONDS, Stop


class StepAbandoned(Exception):
    """The machine would be taken away before the step ends. Adapters and optimizer are in the state of the previous step."""


class EndOfStep(TrainerCallback):
    """Decides at the end of every step whether to save and to stop; the decision is the same in all processes.

    save_steps, every_minutes: from the config's checkpoint section. A checkpoint is also saved after the last step. stop_step:
    after it the validation loss is computed, as after the last step, and the run pauses.
    """

    def __init__(
        self,
        stop: Stop,
        *,
        save_steps: int | None,
        every_minutes: float | None,
        stop_step: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stop, self.budget_stop, self.paused = stop, False, False
        self._stop_step = stop_step
        self._save_steps, self._interval = save_steps, None if every_minutes is None else 60 * every_minutes
        self._clock = clock
        self._saved = self._begun = clock()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._saved = self._clock()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._begun = self._clock()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        fault_injection.place("step")
        # a decaying maximum: long steps are remembered for a while
        self.stop.step_seconds = max(0.8 * self.stop.step_seconds, self._clock() - self._begun)
        due = self._interval is not None and self._clock() - self._saved >= self._interval
        asked = [bool(self.stop.first), self.stop.because_of("budget"), self.stop.because_of("preemption"), due]
        stop, budget, preemption, due = distributed.any_of_each(asked)
        if preemption and not self.stop.because_of("preemption"):
            self.stop.ask("preemption", "Google takes another machine of this run back", NOTICE_SECONDS)
        last = state.global_step >= state.max_steps
        by_steps = bool(self._save_steps and state.global_step % self._save_steps == 0)
        there = self._stop_step is not None and state.global_step >= self._stop_step
        if there:
            control.should_evaluate = args.eval_strategy != IntervalStrategy.NO
        control.should_save = stop or last or due or by_steps or there
        control.should_training_stop = control.should_training_stop or stop or there
        self.budget_stop = budget and not last
        self.paused = there and not last

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._saved = self._clock()

    def abandon_if_too_late(self) -> None:
        """Called between two micro-batches. Raises StepAbandoned if the step would end too late to be saved; only that step is
        lost. Not done with several processes, which would have to agree on it in the middle of a step."""
        left = self.stop.seconds_left()
        if left is None or distributed.world_size() > 1:
            return
        expected = self._begun + self.stop.step_seconds - self._clock()
        if max(expected, 0.0) > left:
            raise StepAbandoned
