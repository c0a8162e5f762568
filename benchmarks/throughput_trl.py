"""The peer that the guide describes: TRL's SFTTrainer on a 4-bit model with PEFT LoRA, using TRL's own collator and loss."""

from __future__ import annotations

import tempfile
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.throughput_recipe import Recipe, Texts, sft_options
from finetune.config.schema import LoraSection, ModelSection, QuantizationSection
from finetune.models.device import choose_device
from finetune.models.load import adapters_to_float32, attach_lora, load_base, load_tokenizer


def plain_trainer(recipe: Recipe, texts: Texts) -> Any:
    """An SFTTrainer that pads micro-batches of `recipe.rows`, in the order of the texts."""
    section = ModelSection(name=recipe.model, torch_dtype=recipe.dtype)  # type: ignore[arg-type]
    base = load_base(section, QuantizationSection(load_in_4bit=recipe.load_in_4bit), choose_device(recipe.dtype))
    base.config.use_cache = False
    lora = LoraSection(recipe.lora_r, recipe.lora_alpha, recipe.lora_dropout, list(recipe.target_modules))
    trainer = SFTTrainer(
        model=attach_lora(base, lora),
        args=SFTConfig(
            **sft_options(recipe, tempfile.mkdtemp()),
            gradient_checkpointing=bool(recipe.checkpointing),
            gradient_checkpointing_kwargs={"use_reentrant": False} if recipe.checkpointing else None,
            pad_to_multiple_of=8,
        ),
        train_dataset=Dataset.from_dict(texts.columns()),
        processing_class=load_tokenizer(section),
    )
    trainer.remove_callback(PrinterCallback)
    if recipe.dtype == "float16":  # TRL casts them to bfloat16, which the gradient scaler refuses
        adapters_to_float32(trainer.model)
    return trainer
