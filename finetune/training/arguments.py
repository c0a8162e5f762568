"""Translates our config keys, which keep the guide's names, into those of TRL and transformers."""

from __future__ import annotations

from pathlib import Path

import torch

from finetune.config.schema import TrainingSection
from finetune.models.device import Device
from finetune.training.step.plan import StepPlan
from finetune.training.tracking.trl_without_wandb import SFTConfig

CPU_PADDING = 16
"""Batches on a CPU are padded to multiples of this many tokens. Without it, every new length made oneDNN compile kernels again
and fragmented the heap: throughput fell from 412 tokens/s at the start of a run to 252 at its end (docs/log.md)."""


def trainer_arguments(
    training: TrainingSection,
    device: Device,
    plan: StepPlan,
    *,
    checkpoints: Path,
    run_name: str,
    validates: bool,
) -> SFTConfig:
    """The only place where our config keys are translated into the libraries' arguments."""
    on_gpu = device.place.type == "cuda"
    arguments = SFTConfig(
        output_dir=str(checkpoints),
        run_name=run_name,
        seed=training.seed,
        num_train_epochs=training.num_train_epochs,
        max_steps=training.max_steps,
        per_device_train_batch_size=plan.batch_size,  # one batch of transformers' loop is a whole step
        per_device_eval_batch_size=training.per_device_eval_batch_size,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=training.warmup_ratio,  # a number below 1 is a fraction of all steps
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optim,
        gradient_checkpointing=plan.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if plan.checkpointing else None,
        logging_steps=training.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not finite must be logged
        eval_strategy="steps" if validates else "no",
        eval_steps=training.eval_steps or None,
        save_strategy="no",  # `save_policy.EndOfStep` decides when
        bf16=on_gpu and device.dtype == torch.bfloat16,
        fp16=on_gpu and device.dtype == torch.float16,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        report_to=[],  # `tracking.trackers` are added as callbacks
        max_length=None,  # `tokenise` has dropped examples that are too long
        pad_to_multiple_of=8 if on_gpu else CPU_PADDING,
        include_num_input_tokens_seen="non_padding",
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
    )
    return one_gpu_a_process(arguments)


def one_gpu_a_process(arguments: SFTConfig) -> SFTConfig:
    """transformers would use all visible GPUs in one process (nn.DataParallel, which TRL refuses); limit it to one."""
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments
