"""The folders that vLLM loads its weights from, on the local disk: the values that hf computes with, in the dtype it computes in.

A 4-bit base is written with its dequantized values, and an adapter merged into them; a base in 16 bits or more is loaded from
where it is. The folders are deleted once they are loaded, and those of a process that was killed by the next one.

CACHE/vllm/                  CACHE: $FINETUNE_CACHE, else the user's cache folder; below $TMPDIR if that is set
    PID-STARTED/             one a process, with process.json, which says whose it is
        base/, tuned/        config.json and safetensors
    vllm-PID-N.log           kept if vLLM failed; the newest five
"""

from __future__ import annotations

import itertools
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from finetune.config.schema import RunConfig
from finetune.errors import UserError
from finetune.machine.process import ProcessId, is_gone, this_process
from finetune.models.device import Device
from finetune.models.merging import write_weights
from finetune.models.weight_files import model_folder
from finetune.runtime.confined import remove_tree
from finetune.runtime.files import disk_error, load_json, write_json
from finetune.runtime.paths import cache_root

OWNER = "process.json"
KEPT_LOGS = 5
_numbers = itertools.count(1)


class Weights:
    """The folders of one model. adapter: that `tuned` is merged with."""

    def __init__(self, config: RunConfig, adapter: Path | None, device: Device) -> None:
        self._config, self._adapter, self._device = config, adapter, device
        root = _root()
        _remove_left_over(root)
        process = this_process()
        self._root, number = root, next(_numbers)
        self._folder = root / f"{process.pid}-{process.started}-{number}"
        self.log = root / f"vllm-{process.pid}-{number}.log"
        self._owner = asdict(process)

    def folder(self, *, tuned: bool) -> Path:
        """The folder with the weights, written now if need be. Raises UserError like `write_weights`."""
        adapter = self._adapter if tuned else None
        if adapter is None and not self._config.quantization.load_in_4bit:
            return model_folder(self._config.model)
        folder = self._made("tuned" if tuned else "base")
        device = self._device
        write_weights(self._config, folder, adapter=adapter, dtype=device.dtype, trained_dtype=device.quantized_in)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # vLLM takes what is free
        return folder

    def _made(self, name: str) -> Path:
        folder = self._folder / name
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            write_json(self._folder / OWNER, self._owner)
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from error
        return folder

    def loaded(self, folder: Path) -> None:
        """vLLM has read the folder, which is deleted if it is one of these."""
        if self._folder in folder.parents:
            remove_tree(folder, inside=self._folder, ignore_errors=True)

    def remove(self, *, log: bool) -> None:
        """Delete all folders. log: the log, too."""
        remove_tree(self._folder, inside=self._root, ignore_errors=True)
        if log:
            self.log.unlink(missing_ok=True)


def _root() -> Path:
    """Created if missing. Raises UserError for a disk error."""
    temporary = os.environ.get("TMPDIR")
    folder = Path(temporary) / f"finetune-{os.getuid()}" / "vllm" if temporary else cache_root() / "vllm"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, folder) from error
    return folder


def _remove_left_over(root: Path) -> None:
    """Delete the folders of processes that have ended: a model's weights are tens of gigabytes. And all but the newest logs."""
    with suppress(OSError):
        for log in sorted(root.glob("vllm-*.log"), key=lambda path: path.stat().st_mtime)[:-KEPT_LOGS]:
            log.unlink()
    for owner in root.glob(f"*/{OWNER}"):
        try:
            values: dict[str, Any] = load_json(owner)
            if is_gone(ProcessId(**values)):
                remove_tree(owner.parent, inside=root, ignore_errors=True)
        except (OSError, ValueError, TypeError, UserError):
            continue
