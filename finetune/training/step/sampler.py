"""The optimizer steps of an epoch as a sampler, and the DataLoader that tells it which epoch it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from finetune.training.step.packing import steps_of_epoch


class StepLoader(DataLoader[Any]):
    """A DataLoader over a `sampler.StepSampler`, which passes the epoch on that transformers' Trainer sets.

    Build it with `batch_sampler=StepSampler(...)` and return it from `Trainer.get_train_dataloader` as it is: every process
    sees whole steps and takes its `packing.share`, whereas accelerate's `prepare` would deal whole steps out to
    processes. After a resume accelerate puts a SkipBatchSampler and a plain DataLoader in its place for the rest of one
    epoch; Trainer then finds the sampler inside the SkipBatchSampler by itself.
    """

    batch_sampler: Any

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


@dataclass(eq=False)
class StepSampler:
    """The optimizer steps of an epoch, as `batch_sampler` of a `sampler.StepLoader`.

    Each iteration is the whole epoch that was set last; torch's own DataLoader would set none and repeat the first.
    """

    lengths: Sequence[int]
    batch_size: int
    seed: int
    by_length: bool = False
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, of the iterations that begin from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Steps in an epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(
            steps_of_epoch(
                self.lengths, batch_size=self.batch_size, seed=self.seed, epoch=self.epoch, by_length=self.by_length
            )
        )
