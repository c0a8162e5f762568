"""Whether the files of a checkpoint hold the state that a resumed run needs, whatever its manifest says.

The manifest proves that files are as they were written; this, that what was written is a state: one whose adapters, optimizer,
schedule and random generators belong together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from finetune.models.adapter import SETTINGS, WEIGHTS
from finetune.training.step.optimizer import BLOCK

OPTIMIZER, SCHEDULER, TRAINER, RNG = "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng-0.pt"
TEXTS = (TRAINER, SETTINGS, "probe.json", "window.json")
REQUIRED = (OPTIMIZER, SCHEDULER, RNG, WEIGHTS, *TEXTS, "config.yaml", "prompt.json")
"""The files without which a folder is not a checkpoint of a run, whatever its manifest lists."""
SCALER = "scaler.pt"
"""Only of float16, whose scaler skips steps."""


def content_fault(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    """Why a run cannot resume from the files of this checkpoint, in a few words; None if it can. Raises OSError for a file that
    cannot be read now."""
    step = int(manifest["step"])
    try:
        _trainer_state(_json(folder / TRAINER), step)
        _schedule(_torch(folder / SCHEDULER), step)
        _random(_torch(folder / RNG))
        for name in TEXTS:
            _json(folder / name)
        _optimizer(_torch(folder / OPTIMIZER), _adapter_values(folder / WEIGHTS), (folder / SCALER).is_file())
    except _Fault as fault:
        return str(fault)
    return None


class _Fault(Exception):
    pass


def _read(path: Path, reader: Callable[[Path], Any]) -> Any:
    try:
        return reader(path)
    except (_Fault, OSError):
        raise
    except Exception:  # torch and safetensors raise errors of many kinds for a file that is not theirs
        raise _Fault(f"{path.name} is not readable") from None


def _json(path: Path) -> dict[str, Any]:
    value = _read(path, lambda found: json.loads(found.read_text(encoding="utf-8")))
    if not isinstance(value, dict) or not value:
        raise _Fault(f"{path.name} is empty")
    return value


def _torch(path: Path) -> dict[str, Any]:
    value = _read(path, lambda found: torch.load(found, map_location="cpu", weights_only=True))
    if not isinstance(value, dict) or not value:
        raise _Fault(f"{path.name} is empty")
    return value


def _trainer_state(state: Mapping[str, Any], step: int) -> None:
    if state.get("global_step") != step:
        raise _Fault(f"{TRAINER} is of step {str(state.get('global_step'))[:20]}")


def _schedule(state: Mapping[str, Any], step: int) -> None:
    """With float16 a step may have been skipped, and then the schedule stands still."""
    place = state.get("last_epoch")
    if type(place) is not int or not 0 <= place <= step:
        raise _Fault(f"{SCHEDULER} has no place in the schedule of step {step}")


def _random(states: Mapping[str, Any]) -> None:
    if not {"python", "numpy", "cpu"} <= states.keys() or not isinstance(states["cpu"], torch.Tensor):
        raise _Fault(f"{RNG} lacks the state of a random generator")


def _adapter_values(path: Path) -> int:
    """Number of values that the optimizer has for all adapters, see FlatAdapters."""

    def count(found: Path) -> int:
        total = 0
        with safe_open(found, framework="pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                if not torch.isfinite(tensor).all():
                    raise _Fault(f"{path.name}: {name} holds values that are not finite")
                total += -(-tensor.numel() // BLOCK) * BLOCK
        return total

    values = int(_read(path, count))
    if not values:
        raise _Fault(f"{path.name} holds no tensor")
    return values


def _optimizer(state: Mapping[str, Any], values: int, skips_steps: bool) -> None:
    """The moments have one value for each of the adapters', since the optimizer sees them as one tensor. With float16 all steps
    so far may have been skipped, which leaves no moments."""
    moments, groups = state.get("state"), state.get("param_groups")
    if not isinstance(moments, dict) or not isinstance(groups, list) or not groups:
        raise _Fault(f"{OPTIMIZER} is not the state of an optimizer")
    if not moments and skips_steps:
        return
    sizes = {
        math.prod(tensor.shape)
        for moment in moments.values() if isinstance(moment, dict)
        for name, tensor in moment.items() if name in ("exp_avg", "state1") and isinstance(tensor, torch.Tensor)
    }  # fmt: skip
    if not sizes:
        raise _Fault(f"{OPTIMIZER} holds no moments")
    if sizes != {values}:
        raise _Fault(f"{OPTIMIZER} is of {sum(sizes):,} values, the adapters have {values:,}")
