"""The DataLoader that tells a StepSampler which epoch it is."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader


class StepLoader(DataLoader[Any]):
    """A DataLoader over a `batching.StepSampler`, which passes the epoch on that transformers' Trainer sets.

    Build it with `batch_sampler=StepSampler(...)` and return it from `Trainer.get_train_dataloader` as it is: every process
    sees whole steps and takes its `batching.share`, whereas accelerate's `prepare` would deal whole steps out to processes.
    After a resume accelerate puts a SkipBatchSampler and a plain DataLoader in its place for the rest of one epoch; Trainer
    then finds the sampler inside the SkipBatchSampler by itself.
    """

    batch_sampler: Any

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)
