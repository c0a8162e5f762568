"""Whether the files of a checkpoint hold the state that a resumed run needs, whatever its manifest says.

The manifest proves that files are as they were written; this, that what was written is a state: one whose adapters, optimizer,
schedule and random generators belong together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from finetune.models.adapter import SETTINGS, WEIGHTS
from finetune.runtime.files import parse_json
from finetune.training.step.optimizer import BLOCK

OPTIMIZER, SCHEDULER, TRAINER, RNG = "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng-0.pt"
WINDOW = "window.json"
TEXTS = (TRAINER, SETTINGS, "probe.json", WINDOW)
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
        schedule = _torch(folder / SCHEDULER)
        _schedule(schedule, step)
        _random(_torch(folder / RNG))
        for name in TEXTS:
            _json(folder / name)
        _losses(_json(folder / WINDOW))
        optimizer = _torch(folder / OPTIMIZER)
        _optimizer(optimizer, _adapter_values(folder / WEIGHTS), (folder / SCALER).is_file())
        _rates(schedule, len(optimizer["param_groups"]))
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
    value = _read(path, lambda found: parse_json(found.read_bytes(), nan=True))
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
    for key in ("logging_steps", "eval_steps", "save_steps", "train_batch_size"):
        if key in state and not _is_number(state[key], least=1e-9):
            raise _Fault(f"{TRAINER} has no {key} that training can use")
    callbacks = state.get("stateful_callbacks", {})
    if not isinstance(callbacks, dict) or not isinstance(callbacks.get("TrainerControl"), dict):
        raise _Fault(f"{TRAINER} lacks the state of the trainer")


def _schedule(state: Mapping[str, Any], step: int) -> None:
    """With float16 a step may have been skipped, and then the schedule stands still."""
    place = state.get("last_epoch")
    if type(place) is not int or not 0 <= place <= step:
        raise _Fault(f"{SCHEDULER} has no place in the schedule of step {step}")


def _rates(schedule: Mapping[str, Any], groups: int) -> None:
    """One learning rate for each group of the optimizer."""
    for key, is_right in (("base_lrs", _is_number), ("_last_lr", _is_number), ("lr_lambdas", lambda _: True)):
        rates = schedule.get(key, [0.0] * groups)
        if not isinstance(rates, list) or len(rates) != groups or not all(is_right(rate) for rate in rates):
            raise _Fault(f"{SCHEDULER} has no {key} of this optimizer")


def _losses(window: Mapping[str, Any]) -> None:
    largest = torch.finfo(torch.float32).max
    if any(isinstance(value, float) and abs(value) > largest for value in window.values()):
        raise _Fault(f"{WINDOW} holds a loss that is too large")


def _is_number(value: object, least: float = 0.0) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= least  # type: ignore[arg-type, operator]


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
    for group in groups:
        _group(group)
    if not moments and skips_steps:
        return
    for moment in moments.values():
        _moment(moment)
    sizes = {
        math.prod(tensor.shape)
        for moment in moments.values() if isinstance(moment, dict)
        for name, tensor in moment.items() if name in ("exp_avg", "state1") and isinstance(tensor, torch.Tensor)
    }  # fmt: skip
    if not sizes:
        raise _Fault(f"{OPTIMIZER} holds no moments")
    if sizes != {values}:
        raise _Fault(f"{OPTIMIZER} is of {sum(sizes):,} values, the adapters have {values:,}")


def _group(group: Any) -> None:
    if not isinstance(group, dict) or not isinstance(group.get("params"), list):
        raise _Fault(f"{OPTIMIZER} is not the state of an optimizer")
    betas = group.get("betas")
    right = isinstance(betas, list | tuple) and len(betas) >= 2 and all(_is_number(beta) and beta < 1 for beta in betas)
    if wrong := [key for key in ("lr", "eps", "weight_decay") if not _is_number(group.get(key))] + ["betas"] * (
        not right
    ):
        raise _Fault(f"{OPTIMIZER} has no {wrong[0]} that training can use")


def _moment(moment: Any) -> None:
    """The first and the second moment of a parameter, of the same size, and the number of its steps."""
    if not isinstance(moment, dict):
        raise _Fault(f"{OPTIMIZER} is not the state of an optimizer")
    tensors = {name: value for name, value in moment.items() if isinstance(value, torch.Tensor)}
    for first, second in (("exp_avg", "exp_avg_sq"), ("state1", "state2")):
        if first in tensors and (second not in tensors or tensors[first].shape != tensors[second].shape):
            raise _Fault(f"{OPTIMIZER} lacks the second moments")
    steps = tensors["step"].tolist() if "step" in tensors else moment.get("step")
    if not _is_number(steps):
        raise _Fault(f"{OPTIMIZER} has no number of steps")
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point()):
        raise _Fault(f"{OPTIMIZER} holds values that are not finite")
