"""The forward and backward passes of one optimizer step, split into as many micro-batches as memory requires.

The result does not depend on the split: the loss of every micro-batch is divided by the labelled tokens of the whole step, over
all GPUs. If memory still runs out, the step starts again with smaller micro-batches.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.estimate.fit import MicroBatchConfig
from finetune.example import Example
from finetune.models.fused.model import FusedModel, Packed, pack
from finetune.runtime import distributed
from finetune.training.objectives.objective import Objective
from finetune.training.objectives.sft import SFT
from finetune.training.step import rng
from finetune.training.step.optimizer import FlatAdapters
from finetune.training.step.packing import micro_batches, share

BAD_STEPS = 10
"""Number of consecutive steps without a finite loss that ends the run."""


@dataclass(frozen=True)
class Step:
    """One optimizer step from the data loader. mine: this process's examples. tokens, labelled: counts over all processes."""

    mine: list[Example]
    tokens: int
    labelled: int


def collate(examples: list[Example], *, rank: int, ranks: int) -> dict[str, Step]:
    """A batch as a dict, as transformers' Trainer expects; the same on every rank except for `mine`."""
    lengths = [len(example) for example in examples]
    labelled = sum(example.predicted for example in examples)
    mine = [examples[position] for position in share(lengths, rank=rank, ranks=ranks)]
    return {"step": Step(mine, sum(lengths), labelled)}


class Backend(Protocol):
    """Computes the loss of a micro-batch: with the fused layers without padding, or with Hugging Face's and padding."""

    padded: bool

    def loss(self, examples: Sequence[Example], labelled: int, limits: MicroBatchConfig) -> Tensor:
        """Sum of the token losses divided by `labelled`, with its autograd graph."""

    def begin(self) -> None:
        """Called before the micro-batches of a step."""

    def free_memory(self) -> bool:
        """OOM fallback: reduce memory use if possible; returns whether it was."""

    def validation_loss(self, examples: Sequence[Example], labelled: int) -> Tensor:
        """Like `loss`, with the current adapters, without dropout and without a graph."""


class FusedBackend:
    """Packs examples into one sequence without padding and runs the layers of finetune/models/fused/layer.py."""

    padded = False

    def __init__(self, fused: FusedModel, objective: Objective = SFT) -> None:
        self.fused = fused
        self._token_loss = None if objective.fused else objective.token_loss

    def begin(self) -> None:
        self.fused.refresh()

    def free_memory(self) -> bool:
        return self.fused.free_dequantized()

    def loss(self, examples: Sequence[Example], labelled: int, limits: MicroBatchConfig) -> Tensor:
        return self.fused.loss(
            self._packed(examples),
            labelled,
            uncheckpointed_layers=limits.uncheckpointed_layers,
            token_loss=self._token_loss,
        )

    def validation_loss(self, examples: Sequence[Example], labelled: int) -> Tensor:
        with torch.no_grad():
            return self.fused.loss(
                self._packed(examples), labelled, uncheckpointed_layers=0, training=False, token_loss=self._token_loss
            )

    def _packed(self, examples: Sequence[Example]) -> Packed:
        ids, targets = [example.ids for example in examples], [example.targets for example in examples]
        return pack(ids, targets, self.fused.device)


class Stepper:
    """Runs steps and counts out-of-memory errors and bad losses.

    micro_batch_size: in examples, None unless the config sets it. backward: the accelerator's, which scales float16 losses.
    between: called before every micro-batch of a step; an exception from it ends the step.
    """

    def __init__(
        self,
        backend: Backend,
        limits: MicroBatchConfig,
        adapters: FlatAdapters,
        *,
        micro_batch_size: int | None,
        backward: Callable[[Tensor], None],
        say: Callable[[str], None],
        between: Callable[[], None] = lambda: None,
        skips_bad_steps: bool = False,
    ) -> None:
        self.backend, self.limits, self.micro_batch_size = backend, limits, micro_batch_size
        self.adapters = adapters
        self.out_of_memory = 0
        self.watch = LossWatch(skips_bad_steps)
        self.rng_before: rng.States = {}
        """Random states at the start of the step in progress."""
        self._backward, self._say, self._between = backward, say, between

    def run(self, step: Step) -> Tensor:
        """Compute the gradients of the whole step, summed over all GPUs; returns the step's loss, detached."""
        self.rng_before = rng.capture()
        loss = self._passes(step)
        self.watch.check()  # the previous step's loss, now that the GPU is busy with this step
        while loss is None:
            self._oom_fallback(step.mine)
            loss = self._passes(step)
        distributed.all_reduce(self.adapters.gradient)  # a rank without examples in this step adds nothing
        distributed.all_reduce(loss)
        self.watch.put(loss)
        return loss

    def memory_dry_run(self, examples: Sequence[Example]) -> None:
        """Run the passes of one step and discard the gradients, so that a lack of memory shows before the run."""
        device = self.adapters.parameter.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            while self._passes(Step(list(examples), 0, 1)) is None:
                self._oom_fallback(examples)
        self.adapters.begin()

    def _passes(self, step: Step) -> Tensor | None:
        """The summed loss of all micro-batches; None if the GPU ran out of memory."""
        total = torch.zeros((), device=self.adapters.parameter.device)
        self.adapters.begin()
        self.backend.begin()
        try:
            for examples in self._micro_batches(step.mine):
                self._between()
                loss = self.backend.loss(examples, step.labelled, self.limits)
                self._backward(loss)
                total += loss.detach()
        except torch.OutOfMemoryError:
            return None  # no cleanup here: the traceback still references the tensors of the failed pass
        return total

    def _size(self, examples: Sequence[Example]) -> int:
        """Tokens of a micro-batch, padding included."""
        lengths = [len(example) for example in examples]
        return len(lengths) * max(lengths) if self.backend.padded else sum(lengths)

    def _micro_batches(self, examples: Sequence[Example]) -> list[list[Example]]:
        lengths = [len(example) for example in examples]
        pieces = micro_batches(
            lengths, tokens=self.limits.tokens, padded=self.backend.padded, micro_batch_size=self.micro_batch_size
        )
        return [[examples[position] for position in piece] for piece in pieces]

    def _oom_fallback(self, examples: Sequence[Example]) -> None:
        """Halve the tokens of a micro-batch; if one example is the largest, recompute all layers; then free optional memory."""
        gc.collect()
        torch.cuda.empty_cache()
        self.out_of_memory += 1
        before, longest = self.limits, max(len(example) for example in examples)
        largest = max(self._size(piece) for piece in self._micro_batches(examples))
        if largest > longest:
            self.limits = replace(before, tokens=max(longest, min(before.tokens, largest) // 2))
            self.micro_batch_size = None
        elif before.uncheckpointed_layers:
            self.limits = replace(before, uncheckpointed_layers=0)
        elif self.backend.free_memory():
            self.limits = replace(before, dequantized_layers=0)
        else:
            raise UserError(
                f"out of GPU memory with a single text of {longest} tokens and no way left to save memory; lower "
                "model.max_seq_length or choose a larger GPU (`finetune plan CONFIG --memory`)",
                code="gpu.out_of_memory",
            )
        self._say(f"out of GPU memory: {self._what_changed(before)}; the step starts again")

    def _what_changed(self, before: MicroBatchConfig) -> str:
        for field, what in (("tokens", "tokens in a micro-batch"), ("uncheckpointed_layers", "layers not recomputed")):
            was, now = getattr(before, field), getattr(self.limits, field)
            if was != now:
                return f"{now:,} {what} instead of {was:,}"
        return "all optional memory has been freed"


def not_finite(what: str) -> UserError:
    return UserError(
        f"the {what} is not finite, and the last checkpoint is from before; start a new run with a lower training.learning_rate",
        code="training.not_finite",
    )


class LossWatch:
    """Detects losses that are not finite, one step late to avoid synchronising with the GPU.

    skips_bad_steps: float16's gradient scaler skips such a step, so only BAD_STEPS in a row end the run. In other dtypes one such
    step corrupts the adapters.
    """

    def __init__(self, skips_bad_steps: bool) -> None:
        self.bad_steps = 0
        self._skips, self._in_a_row = skips_bad_steps, 0
        self._pending: dict[str, Tensor] = {}

    def put(self, loss: Tensor) -> None:
        self._pending = {"loss": loss}

    def put_norm(self, norm: Tensor) -> None:
        """The gradient norm of the last loss. Clipping by an infinite norm would zero every gradient: nothing is learned."""
        if not self._skips:  # a gradient scaler produces infinite norms on purpose while it searches for its scale
            self._pending["gradient"] = norm

    def check(self) -> None:
        """Raises UserError if the run cannot continue. Call it before saving the adapters, too."""
        if not self._pending:
            return
        bad = [name for name, value in self._pending.items() if not torch.isfinite(value)]
        finite = not bad
        self._pending = {}
        self._in_a_row = 0 if finite else self._in_a_row + 1
        self.bad_steps += not finite
        if finite or (self._skips and self._in_a_row < BAD_STEPS):
            return
        if self._skips:
            raise UserError(
                f"the loss was not finite in {BAD_STEPS} steps in a row: activations exceed the range of float16; use a GPU with "
                "bfloat16 (L4, A100), or start a new run with a lower training.learning_rate",
                code="training.not_finite",
            )
        raise not_finite(bad[0])
