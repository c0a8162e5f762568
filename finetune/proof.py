"""That a resumed run trains the adapter which it was given, and not another one wrapped around it.

Adapters that were loaded into the wrong place train on without a word, from their beginning; nothing but the loss shows it. So a
checkpoint keeps the loss of a few fixed examples, and after a resume tensors and loss are compared before the first step.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from finetune.errors import UserError
from finetune.trainer import AnswerTrainer

PROBE = "probe.json"
EXAMPLES = 4
"""The shortest of the training set: a forward pass of some hundred tokens at every save."""
TOLERANCE = {"cpu": 1e-4, "cuda": 0.02}
"""How far the loss may be from the saved one, as a share of it. Another kind of GPU, or other layers kept, rounds bfloat16
differently; adapters that were lost are further off as soon as anything has been learned."""


def probe_of(trainer: AnswerTrainer) -> dict[str, Any]:
    """Mean negative log-likelihood (nats) of the fixed examples' answers, without dropout; the random state stays as it is."""
    examples = sorted(enumerate(trainer.train_dataset["length"]), key=lambda item: (item[1], item[0]))[:EXAMPLES]
    indices = [index for index, _ in examples]
    loss = float(trainer.loss_of([trainer.train_dataset[index] for index in indices]))
    return {"examples": indices, "loss": loss if math.isfinite(loss) else None}


def check_resumed(trainer: AnswerTrainer, folder: Path) -> None:
    """Raises UserError where the model that is about to train is not that of the checkpoint in `folder`."""
    _check_tensors(trainer, folder)
    saved = json.loads((folder / PROBE).read_text(encoding="utf-8"))["loss"]
    now = probe_of(trainer)["loss"]
    kind = trainer.args.device.type
    if saved is None or now is None:
        return
    if abs(now - saved) > TOLERANCE[kind] * max(abs(saved), 1e-3):
        raise UserError(
            f"{folder}: the loaded model does not behave like the saved one (loss {now:.5f} instead of {saved:.5f} on the "
            "same examples); the base model or a library has changed: restore it, or start a new run"
        )


def _check_tensors(trainer: AnswerTrainer, folder: Path) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    saved = load_file(folder / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(trainer.model)
    trainer.stepper.adapters.begin()  # raises where an adapter is no longer what the optimizer changes
    different = [name for name in saved.keys() | loaded.keys() if not _same(saved.get(name), loaded.get(name))]
    if different:
        raise UserError(
            f"{folder}: {len(different)} of {len(saved)} adapters are not in the model that is about to train, such as "
            f"{sorted(different)[0]}; this is a fault of ours or of peft: please report it with the versions in run.json"
        )


def _same(saved: torch.Tensor | None, loaded: torch.Tensor | None) -> bool:
    return saved is not None and loaded is not None and torch.equal(saved, loaded.detach().to("cpu", saved.dtype))
