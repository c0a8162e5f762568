"""Writes the adapter into a run's folder: from the model, or from a checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from finetune.checkpoint.folders import read_manifest
from finetune.data.prompts import PromptTemplate
from finetune.errors import UserError
from finetune.models.adapter import BASE, seal_adapter
from finetune.models.source import identity_of_base
from finetune.run_folder import RunFolder
from finetune.runtime import fault_injection
from finetune.runtime.confined import remove_tree
from finetune.runtime.files import sha256_file, write_json
from finetune.training.record.recorder import RunRecorder
from finetune.training.setup import Parts

TEMPORARY_ADAPTER, TEMPORARY_COPY = ".adapter.tmp", ".adapter-of-checkpoint.tmp"
ADAPTER_FILES = (
    "adapter_*",
    "README.md",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "prompt.json",
    "base.json",
)
"""The files of a checkpoint that make up a self-contained adapter folder."""


def save_adapter(
    run: RunFolder,
    model: torch.nn.Module,
    parts: Parts,
    template: PromptTemplate,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Save adapter, tokenizer and prompt template in one folder, under a temporary name that is then renamed.

    check: raises TakenOver if this attempt has lost the run.
    """
    check()
    temporary = _fresh(run)
    model.save_pretrained(str(temporary))  # type: ignore[operator]
    parts.tokenizer.save_pretrained(str(temporary))
    template.save(temporary)
    write_json(temporary / BASE, identity_of_base(run.config().model))
    seal_adapter(temporary)
    _into_place(run, temporary, check)


def adapter_from(run: RunFolder, checkpoint: Path, check: Callable[[], None] = lambda: None) -> None:
    """Make the adapter folder from a checkpoint, without loading the model."""
    check()
    temporary = _fresh(run, TEMPORARY_COPY)
    temporary.mkdir()
    saved = read_manifest(checkpoint)["files"]
    for pattern in ADAPTER_FILES:
        for path in checkpoint.glob(pattern):
            shutil.copyfile(path, temporary / path.name)
            if path.name not in saved or sha256_file(temporary / path.name) != saved[path.name]["sha256"]:
                raise UserError(
                    f"{path}: has changed since the checkpoint was saved; remove {checkpoint} and resume the run",
                    code="checkpoint.corrupt",
                )
    seal_adapter(temporary)
    _into_place(run, temporary, check)


def adapter_is_of(run: RunFolder, recorder: RunRecorder, step: int) -> bool:
    """Whether the run's adapter is of this step. It may be older when the budget ended a run that hung."""
    return run.adapter.is_dir() and recorder.record.adapter_step in (None, step)


def _fresh(run: RunFolder, name: str = TEMPORARY_ADAPTER) -> Path:
    temporary = run.path / name
    remove_tree(temporary, inside=run.path, ignore_errors=True)
    return temporary


def _into_place(run: RunFolder, temporary: Path, check: Callable[[], None]) -> None:
    fault_injection.place("adapter")
    check()
    if os.path.lexists(run.adapter):  # from an attempt that stopped at its budget
        remove_tree(run.adapter, inside=run.path)
    os.replace(temporary, run.adapter)


def remove_partial_files(run: RunFolder) -> None:
    for name in (TEMPORARY_ADAPTER, TEMPORARY_COPY):
        remove_tree(run.path / name, inside=run.path, ignore_errors=True)
