"""The optimizer steps of an epoch as a batch sampler, and a DataLoader that passes the epoch to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from finetune.training.step.packing import steps_of_epoch


class StepLoader(DataLoader[Any]):
    """A DataLoader over a `sampler.StepSampler`, to which it passes the epoch that transformers' Trainer sets.

    Build it with `batch_sampler=StepSampler(...)` and return it unchanged from `Trainer.get_train_dataloader`: every process
    gets whole steps and takes its `packing.share`, whereas accelerate's `prepare` would distribute whole steps over the
    processes. After a resume, accelerate replaces it by a SkipBatchSampler and a plain DataLoader for the rest of the
    epoch; Trainer then finds the sampler inside the SkipBatchSampler itself.
    """

    batch_sampler: Any

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


@dataclass(eq=False)
class StepSampler:
    """The optimizer steps of an epoch, as `batch_sampler` of a `sampler.StepLoader`.

    Each iteration yields the whole epoch that was set last; torch's own DataLoader never sets one and would repeat the first.
    """

    lengths: Sequence[int]
    batch_size: int
    seed: int
    by_length: bool = False
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch (from 0) for iterations that start from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of steps in an epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(
            steps_of_epoch(
                self.lengths, batch_size=self.batch_size, seed=self.seed, epoch=self.epoch, by_length=self.by_length
            )
        )
