"""The peer Unsloth, set up as in its documentation: FastLanguageModel, its LoRA, its patched SFTTrainer, padding-free batches.

Importing it patches transformers, TRL and PEFT for the whole process, so it is imported first, and only in its own process.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.throughput_recipe import LONGEST, Recipe, Texts, sft_options

SHIM = Path(__file__).with_name("unsloth_shim")
PADDED_ROWS = 4


def unsloth_trainer(recipe: Recipe, texts: Texts) -> Any:
    """Unsloth's SFTTrainer in the order of the texts, padding-free with `recipe.rows` sequences a micro-batch.

    If Unsloth refuses padding-free batches, it pads PADDED_ROWS at a time; `how` says which of the two is in use.
    """
    prepare(recipe.flash)
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]  # isort: skip
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    keep_transformers_off_flash()
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=recipe.model,
        max_seq_length=LONGEST,
        dtype=getattr(torch, recipe.dtype),
        load_in_4bit=recipe.load_in_4bit,
        use_gradient_checkpointing=recipe.checkpointing,
        use_exact_model_name=True,
        local_files_only=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=list(recipe.target_modules),
        use_gradient_checkpointing=recipe.checkpointing,
        random_state=recipe.seed,
    )
    for options in (padding_free(recipe), padded(recipe)):
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**options),
            train_dataset=Dataset.from_dict(texts.columns()),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        if trainer.args.padding_free == options["padding_free"]:
            return trainer
    raise RuntimeError("Unsloth neither keeps nor leaves padding-free batches")


def padding_free(recipe: Recipe) -> dict[str, Any]:
    """Arguments of SFTConfig for batches without padding.

    Unsloth limits texts to the model's max_seq_length whatever max_length says, and disables padding-free batches if it cannot
    truncate them. It can if the trainer prepares them: on token ids this truncates nothing up to LONGEST and tokenizes nothing.
    """
    options = sft_options(recipe, tempfile.mkdtemp()) | {"padding_free": True, "dataset_num_proc": 1}
    options.pop("dataset_kwargs", None)  # skip_prepare_dataset
    if not recipe.checkpointing:
        options["gradient_checkpointing"] = False  # else TRL's default turns it on
    return options


def padded(recipe: Recipe) -> dict[str, Any]:
    """The same with padding, in micro-batches that fit: 16 rows of 2,048 tokens without checkpointing need over 100 GiB.

    That is an estimate, from the 28 GiB (4 of them weights) that were measured with 7,000 tokens on an H100.
    """
    fewer = recipe.with_settings({"rows": min(recipe.rows, PADDED_ROWS)})
    return padding_free(fewer) | {"padding_free": False}


def how(trainer: Any) -> str:
    """The kind and number of the micro-batches that the trainer actually uses, for the results."""
    options = trainer.args
    shape = f"{options.per_device_train_batch_size} x {options.gradient_accumulation_steps}"
    return f"padding-free, {shape}" if options.padding_free else f"padded (Unsloth refused padding-free), {shape}"


def prepare(flash: bool) -> None:
    """No network, compiled code in a temporary folder, and FlashAttention-2 from torch where the package is missing."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp(prefix="unsloth_compiled_"))
    if flash and importlib.util.find_spec("flash_attn") is None:
        sys.path.append(str(SHIM))


def attention_in_use() -> str:
    """The attention backend that Unsloth uses in padding-free batches, for the results."""
    from unsloth.utils.attention_dispatch import select_attention_backend  # type: ignore[import-not-found]

    backend = str(select_attention_backend(use_varlen=True))
    return f"{backend} (torch's kernel)" if shimmed() else backend


def keep_transformers_off_flash() -> None:
    """If flash_attn is only the shim, Unsloth would tell transformers to use the package, which transformers would refuse.

    With this flag off in the module that does so, transformers keeps SDPA. Unsloth's own layers, which replace those of
    transformers, read the copy of the flag in utils/attention_dispatch.py, which stays on.
    """
    if shimmed():
        from unsloth.models import _utils  # type: ignore[import-not-found]

        _utils.HAS_FLASH_ATTENTION = False


def shimmed() -> bool:
    return str(SHIM) in sys.path
