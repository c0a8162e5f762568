"""TRL's SFTTrainer for text-to-SQL: whole optimizer steps, loss only on the objective's target tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import PrinterCallback, ProgressCallback

from finetune.config.schema import TrainingSection
from finetune.data.tokenize import Examples
from finetune.example import Example
from finetune.models.device import Device
from finetune.models.load import adapters_to_float32
from finetune.runtime import distributed
from finetune.training.callbacks import Throughput
from finetune.training.objectives.objective import Objective
from finetune.training.objectives.registry import objective_named
from finetune.training.objectives.sft import SFT
from finetune.training.step import rng
from finetune.training.step.hf_backend import HfBackend
from finetune.training.step.optimizer import FlatAdapters, restore_paging
from finetune.training.step.packing import micro_batches
from finetune.training.step.plan import StepPlan
from finetune.training.step.runner import FusedBackend, Step, Stepper, collate, not_finite
from finetune.training.step.sampler import StepLoader, StepSampler
from finetune.training.tracking.trl_without_wandb import SFTConfig, SFTTrainer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


class Sampler(Protocol):
    """The optimizer steps of an epoch, each a list of example indices: a StepSampler, or another order."""

    def set_epoch(self, epoch: int) -> None: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[list[int]]: ...


def no_series() -> dict[str, float]:
    return {}


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Hooks:
    """The callbacks of a trainer.

    more_logs: further series to log with every loss. between_micro_batches: called before each micro-batch; an exception from
    it ends the step.
    """

    throughput: Throughput
    more_logs: Callable[[], dict[str, float]] = no_series
    between_micro_batches: Callable[[], None] = nothing
    say: Callable[[str], None] = print


class AnswerTrainer(SFTTrainer):
    """SFTTrainer whose loader yields whole optimizer steps, which a Stepper computes.

    To transformers' loop every step is one batch (gradient_accumulation_steps is 1); the Stepper splits it into micro-batches
    and sums the gradients over the ranks.
    """

    control: Any
    save_seconds = 0.0
    """Seconds that the last save took, on the local disk."""

    def __init__(
        self,
        arguments: SFTConfig,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        train: Examples,
        validation: Examples | None,
        sampler: Sampler,
        device: Device,
        plan: StepPlan,
        hooks: Hooks,
        objective: Objective = SFT,
    ) -> None:
        """Casts the adapters to float32 and removes the libraries' own printing and progress bars."""
        self.train_examples, self.validation_examples, self.sampler = train, validation, sampler
        self.hooks = hooks
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=train.dataset,
            eval_dataset=validation.dataset if validation else None,
            processing_class=tokenizer,
            callbacks=[hooks.throughput],
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        adapters_to_float32(self.model)
        # without DistributedDataParallel: the Stepper sums the gradients
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.stepper = Stepper(
            FusedBackend(plan.fused_model(model, device), objective)
            if plan.backend == "fused"
            else self._hf_backend(objective),
            plan.limits,
            FlatAdapters([parameter for parameter in self.model.parameters() if parameter.requires_grad]),
            micro_batch_size=plan.micro_batch_size,
            backward=self.accelerator.backward,
            say=hooks.say,
            between=hooks.between_micro_batches,
            skips_bad_steps=bool(arguments.fp16),
        )

    def _hf_backend(self, objective: Objective) -> HfBackend:
        """TRL's fused head computes logits of labelled tokens only, but only where Triton runs. Elsewhere it computes them for
        every prompt token too, which on two cores took more than half of each step (171 tokens/s with it, see docs/log.md). It
        also synchronises all GPUs, so it is used with one process only."""
        fused = objective.fused and self.args.world_size == 1 and self.args.device.type != "cpu"
        return HfBackend(
            self.model, self.data_collator, self.args.device, self.accelerator.autocast, objective.token_loss,
            fused_loss=partial(super().compute_loss, self.model) if fused else None,
        )  # fmt: skip

    def get_train_dataloader(self) -> StepLoader:
        share = partial(collate, rank=distributed.rank(), ranks=distributed.world_size())
        examples: Any = self.train_examples  # torch's types require its own Dataset; any sequence works
        return StepLoader(examples, batch_sampler=self.sampler, collate_fn=share)

    def training_step(self, model: Any, inputs: dict[str, Step], num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        return self.stepper.run(inputs["step"])

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss per labelled token of all validation examples, over all ranks. transformers' own
        is a mean of batch means, which depends on how examples are split into batches and ranks."""
        metrics = {"eval_loss": float(self.loss_of(list(self.validation_examples or ())))}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        speed = self.hooks.throughput.take_interval() if "loss" in logs else None
        if speed is not None:
            logs["tokens_per_second"] = speed  # here, so that TensorBoard and W&B get it too
        if "loss" in logs:
            logs |= self.hooks.more_logs()
        super().log(logs, start_time)

    def loss_of(self, examples: list[Example]) -> torch.Tensor:
        """Mean loss per labelled token of the examples, over all ranks, without dropout. Every rank
        computes its share of the batches, the longest examples first."""
        examples = sorted(examples, key=lambda example: -len(example))
        labelled = sum(example.predicted for example in examples)
        size = self.args.per_device_eval_batch_size
        total, backend = torch.zeros((), device=self.args.device), self.stepper.backend
        backend.begin()
        for start in range(distributed.rank() * size, len(examples), distributed.world_size() * size):
            batch = examples[start : start + size]
            lengths = [len(example) for example in batch]
            for piece in micro_batches(lengths, tokens=self.stepper.limits.tokens, padded=backend.padded):
                total += backend.validation_loss([batch[row] for row in piece], max(labelled, 1))
        return distributed.all_reduce(total)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Does nothing: TRL would write a model card beside the checkpoints at every save, and an offline W&B run would warn."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """An optimizer over the flat adapters; weight decay applies to all of them, as in transformers' own groups."""
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        adapters = [self.stepper.adapters.parameter]
        optimizer: torch.optim.Optimizer = kind(adapters, **options, weight_decay=self.args.weight_decay)
        self.optimizer = optimizer
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        restore_paging(self.optimizer)

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        norm: torch.Tensor = self.accelerator.clip_grad_norm_(
            [self.stepper.adapters.parameter], self.args.max_grad_norm
        )
        if not self.args.fp16:  # with float16 the scaler skips such a step
            self.stepper.watch.put_norm(norm)
        return norm

    def _track_num_input_tokens(self, inputs: dict[str, Step]) -> None:
        self.state.num_input_tokens_seen += inputs["step"].tokens  # counted by the loader: no wait for the GPU

    def floating_point_ops(self, inputs: dict[str, Step]) -> int:
        return 0  # transformers' estimate ignores that weights are frozen, and is not used

    def _save_checkpoint(self, *arguments: Any, **more: Any) -> None:
        self.stepper.watch.check()  # adapters that are not finite are not saved
        # this step's gradient may have made them so before any loss shows it
        if not torch.isfinite(self.stepper.adapters.parameter).all():
            raise not_finite("gradient")
        began = time.monotonic()
        super()._save_checkpoint(*arguments, **more)
        self.save_seconds = time.monotonic() - began

    def save_step_before(self) -> bool:
        """After an abandoned step, save the state at the end of the last complete step: the abandoned one has changed nothing but
        the random state and the gradients. Returns False if there is no complete step."""
        if not self.state.global_step or not self.stepper.rng_before:
            return False
        rng.restore(self.stepper.rng_before)
        self._save_checkpoint(self.model, None)
        return True

    def logging_state(self) -> dict[str, float]:
        """Sums of losses since the last log and since the beginning, which transformers keeps only in memory."""
        return {
            "loss": float(self._tr_loss),
            "total": float(self._total_loss_scalar),
            "logged_at": int(self._globalstep_last_logged),
        }

    def restore_logging_state(self, state: dict[str, float]) -> None:
        self._tr_loss.fill_(state["loss"])
        self._total_loss_scalar = state["total"]
        self._globalstep_last_logged = int(state["logged_at"])

    def _save_rng_state(self, output_dir: str) -> None:
        """Rank 0 saves the states of all ranks: ranks on other hosts do not have this folder."""
        for rank, states in enumerate(distributed.gather_on_rank0(rng.capture()) or []):
            rng.save(states, rng.file_of(Path(output_dir), rank))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            rng.restore(rng.load(rng.file_of(Path(checkpoint), distributed.rank())))


def build_trainer(
    arguments: SFTConfig,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Examples,
    validation: Examples | None,
    training: TrainingSection,
    device: Device,
    plan: StepPlan,
    hooks: Hooks,
) -> AnswerTrainer:
    """The trainer of `finetune train`, with the steps of the plan."""
    by_length = training.group_by_length and plan.backend == "hf"
    sampler = StepSampler(train.lengths, plan.batch_size, training.seed, by_length)
    objective = objective_named(training.objective)
    return AnswerTrainer(arguments, model, tokenizer, train, validation, sampler, device, plan, hooks, objective)
