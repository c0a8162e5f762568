"""What every tracker but TensorBoard shares: all logs of a step are one row, sent once it is complete, when the next step begins,
before a checkpoint, or at the end."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.training.tracking.tensorboard import are_totals, scalars


class StepRows(TrainerCallback):
    """`open` is called on rank 0 alone; a tracker that is not open gets no rows, and no totals of the end."""

    def __init__(self) -> None:
        self._row: dict[str, float] = {}
        self._row_step = 0

    @property
    def is_open(self) -> bool:
        raise NotImplementedError

    def open(self) -> None:
        raise NotImplementedError

    def add_row(self, row: dict[str, float], step: int) -> None:
        raise NotImplementedError

    def add_totals(self, totals: dict[str, float]) -> None:
        raise NotImplementedError

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The rows of earlier attempts are offered again: some may have been lost with their machine."""
        if not state.is_world_process_zero:
            return
        self.open()
        for row in state.log_history:
            self._put(scalars(row), row["step"])

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.send()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.send()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.send()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not self.is_open or not logs:
            return
        if are_totals(logs):
            self.add_totals(scalars(logs))
        else:
            self._put(scalars(logs), state.global_step)

    def send(self) -> None:
        row, self._row = self._row, {}
        if row and self.is_open:
            self.add_row(row, self._row_step)

    def _put(self, values: dict[str, float], step: int) -> None:
        if step != self._row_step:
            self.send()
        self._row, self._row_step = self._row | values, step
