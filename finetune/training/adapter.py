"""How a run ends: with an adapter, with a checkpoint to go on from, or with one line about what went wrong."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from pathlib import Path

import torch

from finetune.checkpoint.store import read_manifest
from finetune.data.prompts import PromptTemplate
from finetune.errors import UserError
from finetune.run_folder import RunFolder
from finetune.runtime import fault_injection
from finetune.runtime.console import say
from finetune.runtime.files import disk_error
from finetune.training.record import RunRecorder
from finetune.training.setup import Parts

TEMPORARY_ADAPTER, TEMPORARY_COPY = ".adapter.tmp", ".adapter-of-checkpoint.tmp"
ADAPTER_SECONDS = 1.5
"""For the adapter where the budget ends a run that hangs, of the meter's HARD_SECONDS before the ceiling."""
OF_ADAPTER = ("adapter_*", "README.md", "tokenizer*", "special_tokens_map.json", "chat_template*", "prompt.json")
"""What of a checkpoint makes an adapter folder, which is complete in itself."""


def save_adapter(run: RunFolder, model: torch.nn.Module, parts: Parts, template: PromptTemplate) -> None:
    """Adapter, tokenizer and prompt template in one folder, which appears whole: it is saved under another name first."""
    temporary = _fresh(run)
    model.save_pretrained(str(temporary))  # type: ignore[operator]
    parts.tokenizer.save_pretrained(str(temporary))
    template.save(temporary)
    _into_place(run, temporary)


def adapter_from(run: RunFolder, checkpoint: Path) -> None:
    """The adapter folder from a checkpoint, without loading the model."""
    temporary = _fresh(run, TEMPORARY_COPY)
    temporary.mkdir()
    for pattern in OF_ADAPTER:
        for path in checkpoint.glob(pattern):
            shutil.copyfile(path, temporary / path.name)
    _into_place(run, temporary)


def adapter_is_of(run: RunFolder, recorder: RunRecorder, step: int) -> bool:
    """Whether the run's adapter is that of this step. It is not where the budget has ended a run that hung."""
    return run.adapter.is_dir() and bool(recorder.record.get("adapter_step", step) == step)


def stop_hanging(run: RunFolder, recorder: RunRecorder) -> None:
    """The process is about to be ended at its ceiling, by a thread: the run becomes what its newest checkpoint has."""
    recorder.close("budget_stop")
    newest = recorder.newest
    if newest is None:
        return

    def make_adapter() -> None:
        try:
            adapter_from(run, newest)
        except OSError as error:
            say(f"{run.adapter}: not written ({error}); `finetune train --resume {run.path}` does it")
            return
        recorder.close("budget_stop", adapter_step=int(read_manifest(newest)["step"]))

    copying = threading.Thread(target=make_adapter, name="adapter", daemon=True)
    copying.start()
    copying.join(ADAPTER_SECONDS)


def _fresh(run: RunFolder, name: str = TEMPORARY_ADAPTER) -> Path:
    temporary = run.path / name
    shutil.rmtree(temporary, ignore_errors=True)
    return temporary


def _into_place(run: RunFolder, temporary: Path) -> None:
    fault_injection.place("adapter")
    if run.adapter.exists():  # of an attempt that stopped at its budget
        shutil.rmtree(run.adapter)
    os.replace(temporary, run.adapter)


def foreseeable(error: BaseException, folder: Path) -> UserError | None:
    """The message for a full disk, which safetensors and torch report by other errors than OSError, and a full GPU."""
    if isinstance(error, OSError):
        return disk_error(error, folder)
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(
            "out of GPU memory, not in a step's passes, which begin again in smaller pieces, but in validation or beside them: "
            "lower training.per_device_eval_batch_size, set training.max_memory_gib below what the GPU has, or lower "
            "model.max_seq_length",
            code="gpu.out_of_memory",
        )
    scratch = Path(tempfile.gettempdir())
    for place in (scratch, folder):
        full = place.exists() and shutil.disk_usage(place).free < 2**20
        if (isinstance(error, RuntimeError) and full) or "No space left" in str(error):
            where = scratch if full and place is scratch else folder
            return disk_error(OSError(errno.ENOSPC, str(error)), where)
    return None


def remove_halves(run: RunFolder) -> None:
    for name in (TEMPORARY_ADAPTER, TEMPORARY_COPY):
        shutil.rmtree(run.path / name, ignore_errors=True)


def tell_end(run: RunFolder, status: str, step: int) -> None:
    say(
        {
            "done": f"{run.path}: done; the adapter is in {run.adapter}",
            "budget_stop": f"{run.path}: the budget is used up; the adapter of step {step} is in {run.adapter}",
            "interrupted": f"{run.path}: interrupted, a checkpoint is saved; go on with `finetune train --resume {run.path}`",
        }[status]
    )
