"""Who may ask a run to stop, and when it does: at the end of a step, or between two micro-batches where time is short.

Signals, the preemption notice and the watchdog of the budget ask from handlers and threads; the training loop asks `Stop` at the
end of every step. With several processes all of them stop at the end of the same one.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune import faults, ranks

Reason = Literal["signal", "preemption", "budget"]

NOTICE_SECONDS = 25.0
"""From a notice to a committed checkpoint, of the 30 that Google gives a spot machine."""
SAVE_SECONDS = 10.0
"""Of them, for saving and copying, until a save of this run has been timed."""
LEAST_SAVE_SECONDS = 3.0
ONE_SIGNAL_SECONDS = 1.5
"""SkyPilot and `timeout` both tell a job to end: two signals of one kind within this time are one."""


class StepAbandoned(Exception):
    """The machine goes before the step in progress would end. Adapters and optimizer are those of the step before."""


@dataclass(frozen=True)
class Request:
    """at: monotonic seconds. within: seconds from then in which the checkpoint has to be committed; None: no hurry."""

    reason: Reason
    detail: str
    at: float
    within: float | None


class Stop:
    """Requests to stop, in the order in which they came. Any thread and any signal handler may add one."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.requests: list[
            Request
        ] = []  # only ever appended to, which needs no lock (a handler could not wait for one)
        self.save_seconds = SAVE_SECONDS
        self.step_seconds = 0.0
        """Of the longest of the last steps."""
        self._say, self._clock = say, clock

    def ask(self, reason: Reason, detail: str, within: float | None = None) -> None:
        self.requests.append(Request(reason, detail, self._clock(), within))
        self._say(f"{detail}: finishing this step, then saving a checkpoint")

    @property
    def first(self) -> Request | None:
        return self.requests[0] if self.requests else None

    def because_of(self, reason: Reason) -> bool:
        return any(request.reason == reason for request in self.requests)

    def seconds_left(self) -> float | None:
        """For the step in progress, so that a save still fits; None where nobody is in a hurry."""
        ends = [request.at + request.within for request in self.requests if request.within is not None]
        return min(ends) - self.save_seconds - self._clock() if ends else None

    def save_took(self, seconds: float) -> None:
        """From the end of a step to its committed checkpoint; an older copy may still be running when it begins."""
        self.save_seconds = min(max(2 * seconds, LEAST_SAVE_SECONDS), NOTICE_SECONDS)

    def time_to_save(self) -> float:
        """Seconds that a stop at the end of the next step may take."""
        return self.step_seconds + self.save_seconds

    def waited(self) -> float | None:
        """Seconds since the first request."""
        return self._clock() - self.requests[0].at if self.requests else None


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
        faults.place("step")
        self.stop.step_seconds = max(
            0.8 * self.stop.step_seconds, self._clock() - self._begun
        )  # long ones are remembered
        due = self._interval is not None and self._clock() - self._saved >= self._interval
        stop, budget, due = ranks.any_of_each([bool(self.stop.first), self.stop.because_of("budget"), due])
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
        if left is None or ranks.count() > 1:
            return
        expected = self._begun + self.stop.step_seconds - self._clock()
        if max(expected, 0.0) > left:
            raise StepAbandoned


class StopSignals:
    """SIGINT and SIGTERM ask for a stop; a second one exits at once and leaves the last committed checkpoint as it is.

    Use as a context manager around training: it puts the earlier handlers back.
    """

    def __init__(self, stop: Stop, clock: Callable[[], float] = time.monotonic) -> None:
        self._stop, self._clock = stop, clock
        self._earlier: dict[int, Any] = {}
        self._received: tuple[int, float] | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._earlier[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = self._clock()
        if self._received is None:
            self._received = number, now
            within = NOTICE_SECONDS if number == signal.SIGTERM else None
            self._stop.ask("signal", f"{signal.Signals(number).name} (once more: exit at once)", within)
            return
        if number == signal.SIGTERM and self._received[0] == number and now - self._received[1] < ONE_SIGNAL_SECONDS:
            return
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.raise_signal(number)
