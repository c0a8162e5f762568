"""Our own trainer in the benchmark; the only module of the benchmark that uses finetune's training interface."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.throughput_recipe import ANSWER_TOKENS, BATCH, Recipe, Texts
from finetune.config.load import from_dict
from finetune.config.schema import RunConfig
from finetune.data.tokenize import Examples
from finetune.example import Example
from finetune.machine.hardware import let_segments_grow
from finetune.models.device import choose_device
from finetune.models.load import attach_lora, load_base, load_tokenizer
from finetune.training.arguments import trainer_arguments
from finetune.training.callbacks import BeforeFirstStep, Throughput
from finetune.training.run import memory_dry_run
from finetune.training.step.plan import plan_step
from finetune.training.trainer import AnswerTrainer, Hooks


def our_trainer(recipe: Recipe, settings: dict[str, Any], texts: Texts) -> tuple[Any, str]:
    """What `finetune train` would run with these config keys ("section.key": value), and its plan; the texts in their order."""
    let_segments_grow()  # as `finetune train` does
    config = our_config(recipe, settings)
    device = choose_device(config.model.torch_dtype)
    base = load_base(config.model, config.quantization, device)
    base.config.use_cache = False
    model = attach_lora(base, config.lora)
    plan = plan_step(config, model, device, texts.lengths)
    arguments = trainer_arguments(
        config.training, device, plan, checkpoints=Path(tempfile.mkdtemp()), run_name="throughput", validates=False
    )
    examples = Examples.of(Example(ids, len(ids) - ANSWER_TOKENS) for ids in texts.ids)
    tokenizer = load_tokenizer(config.model)
    trainer = AnswerTrainer(
        arguments, model, tokenizer, examples, None, InOrder(len(texts.ids)), device, plan, Hooks(Throughput())
    )
    trainer.add_callback(BeforeFirstStep(lambda: memory_dry_run(trainer, plan, examples)))
    return trainer, str(plan)


def our_config(recipe: Recipe, settings: dict[str, Any]) -> RunConfig:
    """The recipe as a config of ours, with `settings` on top. Raises UserError for keys and values that finetune refuses."""
    tree: dict[str, dict[str, Any]] = {
        "model": {"name": recipe.model, "torch_dtype": recipe.dtype},
        "quantization": {"load_in_4bit": recipe.load_in_4bit},
        "lora": {
            "r": recipe.lora_r, "lora_alpha": recipe.lora_alpha, "lora_dropout": recipe.lora_dropout,
            "target_modules": list(recipe.target_modules),
        },
        "data": {"sources": [{"kind": "jsonl", "path": "none"}], "output_dir": "none"},
        "training": {
            "seed": recipe.seed, "max_steps": recipe.steps, "effective_batch_size": BATCH, "optim": recipe.optim,
            "learning_rate": recipe.learning_rate, "lr_scheduler_type": recipe.lr_scheduler_type,
            "warmup_ratio": recipe.warmup_ratio, "weight_decay": recipe.weight_decay, "max_grad_norm": recipe.max_grad_norm,
            "logging_steps": 1,
        },
    }  # fmt: skip
    for key, value in settings.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    return from_dict(tree, "--ours")


class InOrder:
    """Replaces sampler.StepSampler: each step takes the next BATCH texts, so that all peers train the same ones."""

    def __init__(self, texts: int) -> None:
        self.texts = texts

    def set_epoch(self, epoch: int) -> None:
        """One epoch holds more texts than the benchmark trains."""

    def __len__(self) -> int:
        return -(-self.texts // BATCH)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(first, min(first + BATCH, self.texts))) for first in range(0, self.texts, BATCH))
