"""With the real Trainer: every epoch has its own order, and a resumed run continues with the remaining steps."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import Trainer, TrainerCallback, TrainingArguments

from finetune.training.step.packing import steps_of_epoch
from finetune.training.step.sampler import StepLoader, StepSampler

LENGTHS = [(37 * n) % 101 + 1 for n in range(14)]
BATCH_SIZE, SEED, EPOCHS = 4, 17, 3
STEPS = 4
"""Steps per epoch; the last one has two examples."""


class Model(torch.nn.Module):
    """A regression with dropout, so that the weights depend on torch's random state too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        wave = torch.stack([index.float().sin(), index.float().cos(), index.float() / 10], dim=1)
        return {"loss": self.layer(torch.nn.functional.dropout(wave, 0.3, self.training)).square().mean()}


def collate(examples: list[int]) -> dict[str, torch.Tensor]:
    return {"index": torch.tensor(examples)}


class StepTrainer(Trainer):
    """Returns the loader unchanged, and records the steps it trains."""

    by_length = False
    workers = 0

    def get_train_dataloader(self) -> StepLoader:
        self.seen: list[list[int]] = []
        sampler = StepSampler(LENGTHS, batch_size=BATCH_SIZE, seed=SEED, by_length=self.by_length)
        return StepLoader(self.train_dataset, batch_sampler=sampler, collate_fn=collate, num_workers=self.workers)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self.seen.append(inputs["index"].tolist())
        return super().training_step(model, inputs, num_items_in_batch)


class Stop(TrainerCallback):
    """Saves and stops after some steps, like a preemption notice."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.after:
            control.should_save = control.should_training_stop = True


def run(
    folder: Path, *, by_length: bool, stop: int | None = None, resume: Path | None = None, workers: int = 0
) -> StepTrainer:
    torch.manual_seed(1)
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=EPOCHS, use_cpu=True, save_strategy="no", report_to="none",
        disable_tqdm=True, learning_rate=0.05, remove_unused_columns=False, logging_strategy="no",
    )  # fmt: skip
    callbacks: Iterable[TrainerCallback] = [Stop(stop)] if stop else []
    trainer = StepTrainer(Model(), arguments, train_dataset=list(range(len(LENGTHS))), callbacks=[*callbacks])
    trainer.by_length, trainer.workers = by_length, workers
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def weights(trainer: StepTrainer) -> list[Any]:
    return [parameter.tolist() for parameter in trainer.model.parameters()]


@pytest.fixture(scope="module")
def expected() -> dict[bool, list[list[int]]]:
    return {
        by_length: [
            step
            for epoch in range(EPOCHS)
            for step in steps_of_epoch(LENGTHS, batch_size=BATCH_SIZE, seed=SEED, epoch=epoch, by_length=by_length)
        ]
        for by_length in (False, True)
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, StepTrainer]:
    """Uninterrupted runs, without and with by_length."""
    return {flag: run(tmp_path_factory.mktemp("whole"), by_length=flag) for flag in (False, True)}


@pytest.mark.parametrize("by_length", [False, True])
def test_every_epoch_has_its_own_order(
    by_length: bool, whole: dict[bool, StepTrainer], expected: dict[bool, list[list[int]]]
) -> None:
    assert whole[by_length].state.global_step == EPOCHS * STEPS
    assert whole[by_length].seen == expected[by_length]
    epochs = [expected[by_length][epoch * STEPS :][:STEPS] for epoch in range(EPOCHS)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_worker_processes_see_the_same_order(tmp_path: Path, expected: dict[bool, list[list[int]]]) -> None:
    assert run(tmp_path, by_length=False, workers=1).seen == expected[False]


@pytest.mark.parametrize("stop", [2, STEPS, STEPS + 1, 2 * STEPS - 1, 2 * STEPS, 2 * STEPS + 3])
def test_a_resumed_run_continues_with_the_remaining_steps(
    stop: int, tmp_path: Path, whole: dict[bool, StepTrainer], expected: dict[bool, list[list[int]]]
) -> None:
    """Stopped in the middle of epochs 0, 1 and 2, and between two of them: the same examples, bit-identical weights."""
    first = run(tmp_path, by_length=False, stop=stop)
    assert first.seen == expected[False][:stop]
    second = run(tmp_path, by_length=False, resume=tmp_path / f"checkpoint-{stop}")
    assert second.seen == expected[False][stop:]
    assert weights(second) == weights(whole[False]) != weights(first)


def test_a_run_by_length_that_is_stopped_twice_is_the_same(
    tmp_path: Path, whole: dict[bool, StepTrainer], expected: dict[bool, list[list[int]]]
) -> None:
    attempts = [run(tmp_path, by_length=True, stop=3)]
    attempts.append(run(tmp_path, by_length=True, stop=STEPS + 2, resume=tmp_path / "checkpoint-3"))
    attempts.append(run(tmp_path, by_length=True, resume=tmp_path / f"checkpoint-{STEPS + 2}"))
    assert [step for attempt in attempts for step in attempt.seen] == expected[True]
    assert weights(attempts[-1]) == weights(whole[True])
