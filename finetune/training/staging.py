"""Turns what the trainer saves on the local disk into a checkpoint in the run's folder, which may be a bucket.

The training loop waits only for the local save. `AsyncCheckpointWriter` copies, verifies and commits it in the background.

If a resume failed to load the adapters, training would silently start over from fresh ones; only the loss would show it. A
checkpoint therefore holds the loss of a few fixed examples, and a resume compares tensors and loss before the first step.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.budget.lease import Lease
from finetune.checkpoint.async_writer import AsyncCheckpointWriter, Committed
from finetune.checkpoint.store import CheckpointStore
from finetune.config.load import config_hash, to_yaml
from finetune.config.schema import RunConfig
from finetune.data.prepared import Prepared
from finetune.data.prompts import PromptTemplate
from finetune.errors import UserError
from finetune.models.adapter import BASE
from finetune.models.source import identity_of_base
from finetune.prepared_folder import MANIFEST
from finetune.run_folder import RunFolder
from finetune.run_record import SavesRecord
from finetune.runtime import fault_injection
from finetune.runtime.confined import remove_tree
from finetune.runtime.console import say
from finetune.runtime.files import write_json, write_text
from finetune.training.saved_files import Labels, read_labels, read_probe
from finetune.training.scratch import scratch_folders
from finetune.training.trainer import AnswerTrainer

CONFIG, DATA_MANIFEST, LOGGING_STATE, LABELS = "config.yaml", "data-manifest.json", "window.json", "labels.json"


def remove_half_saves(folder: Path) -> None:
    """Remove the staged saves that were never completed: they may be what fills the local disk, and nothing reads them."""
    for save in folder.glob("checkpoint-*"):
        if not (save / LABELS).exists():
            remove_tree(save, inside=folder, ignore_errors=True)


def commit_orphaned_save(store: CheckpointStore) -> None:
    """Commit the newest staged save that an earlier attempt left uncommitted on this machine, if there is one. Not one from
    before the newest checkpoints: another machine has gone on from an older state since."""
    _, newest = store.heritage()
    found = [path for folder in scratch_folders(store.run_id) for path in folder.glob(f"*/{LABELS}")]
    left = [
        (labels, path.parent)
        for path in found
        if not path.parent.is_symlink() and (labels := read_labels(path)) and labels.lease >= newest
    ]
    if not left:
        return
    labels, staged = max(left, key=lambda item: (item[0].step, item[0].attempt))
    try:
        store.put(staged, **labels.for_manifest())
        say(f"committed the staged save of step {labels.step}, which an earlier attempt left on this machine")
    except UserError as error:
        say(f"cannot commit the staged save of step {labels.step}, which an earlier attempt left: {error}")


@dataclass
class Saves:
    """Cost of saving in this attempt. stall_seconds: time that training waited. committed: the commits so far."""

    count: int = 0
    stall_seconds: float = 0.0
    committed: list[Committed] = field(default_factory=list)

    def record(self, training_seconds: float) -> SavesRecord:
        """All values are measured. stall_share: the share of training_seconds that training waited for saves."""
        last = self.committed[-1] if self.committed else None
        return SavesRecord(
            count=self.count,
            stall_seconds=round(self.stall_seconds, 3),
            stall_share=round(self.stall_seconds / training_seconds, 5) if training_seconds > 0 else None,
            committed_step=last.step if last else None,
            commit_seconds=round(last.seconds, 3) if last else None,
            bytes=last.bytes if last else None,
        )


class CheckpointStaging(TrainerCallback):
    """Adds the files that a checkpoint needs to the folder that the trainer has saved, and submits it to the writer."""

    def __init__(
        self,
        trainer: AnswerTrainer,
        writer: AsyncCheckpointWriter | None,
        run: RunFolder,
        config: RunConfig,
        data: Prepared,
        template: PromptTemplate,
        attempt: int,
        lease: Lease,
    ) -> None:
        """writer: None on ranks that do not write."""
        self.trainer, self.writer, self.run = trainer, writer, run
        self.config, self.data, self.template, self.attempt, self.lease = config, data, template, attempt, lease
        self.saves = Saves()
        self.base = identity_of_base(config.model) if writer else None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.lease.check_pulse()
        if self.writer:
            self.writer.check()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.hand_over(state)

    def hand_over(self, state: TrainerState) -> None:
        """Complete and submit the staged save of the step in `state`, which the trainer has just written."""
        began = time.monotonic()
        folder = Path(self.trainer.args.output_dir) / f"checkpoint-{state.global_step}"
        loss = probe_loss(self.trainer)  # every rank: the loss is summed over them
        if self.writer is None:
            return
        write_json(folder / PROBE_LOSS, loss)
        write_json(folder / LOGGING_STATE, self.trainer.logging_state())
        write_text(folder / CONFIG, to_yaml(self.config))
        self.template.save(folder)
        write_json(folder / BASE, self.base)
        shutil.copyfile(self.data.folder / MANIFEST, folder / DATA_MANIFEST)
        if self.run.ledger.is_dir():
            (folder / "ledger").mkdir()
            for path in self.run.ledger.glob("attempt-*.jsonl"):
                shutil.copyfile(path, folder / "ledger" / path.name)
        fault_injection.place("snapshot")
        labels = Labels(
            state.global_step, config_hash(self.config), self.data.manifest_hash, self.attempt, self.lease.number
        )
        write_json(folder / LABELS, asdict(labels))  # the last file: from here on the staged save is complete
        self.writer.submit(folder, **labels.for_manifest())
        self.saves.count += 1
        self.saves.stall_seconds += self.trainer.save_seconds + time.monotonic() - began


PROBE_LOSS = "probe.json"
EXAMPLES = 4
"""The shortest ones of the training set: a forward pass over a few hundred tokens at every save."""
TOLERANCE = {"cpu": 1e-4, "cuda": 0.02}
"""Largest relative difference of the loss from the saved one. Another kind of GPU, or recomputing other layers, rounds bfloat16
differently; with lost adapters the difference is larger as soon as anything has been learned."""


def probe_loss(trainer: AnswerTrainer) -> dict[str, Any]:
    """Mean negative log-likelihood (nats) of the fixed examples' answers, without dropout; the random state stays as it is."""
    examples = sorted(enumerate(trainer.train_examples.lengths), key=lambda item: (item[1], item[0]))[:EXAMPLES]
    indices = [index for index, _ in examples]
    loss = float(trainer.loss_of([trainer.train_examples[index] for index in indices]))
    return {"examples": indices, "loss": loss if math.isfinite(loss) else None}


def check_resumed(trainer: AnswerTrainer, folder: Path) -> None:
    """Raises UserError if the loaded model differs from that of the checkpoint in `folder`."""
    _check_tensors(trainer, folder)
    saved = read_probe(folder / PROBE_LOSS).loss
    now = probe_loss(trainer)["loss"]
    kind = trainer.args.device.type
    if saved is None or now is None:
        return
    if abs(now - saved) > TOLERANCE[kind] * max(abs(saved), 1e-3):
        raise UserError(
            f"{folder}: the loaded model does not behave like the saved one (loss {now:.5f} instead of {saved:.5f} on the "
            "same examples); the base model or a library has changed: restore it, or start a new run",
            code="resume.model_changed",
        )


def _check_tensors(trainer: AnswerTrainer, folder: Path) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    saved = load_file(folder / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(trainer.model)
    trainer.stepper.adapters.begin()  # raises if an adapter is no longer part of the optimizer's tensor
    different = [name for name in saved.keys() | loaded.keys() if not _same(saved.get(name), loaded.get(name))]
    if different:
        raise UserError(
            f"{folder}: {len(different)} of {len(saved)} adapter tensors were not loaded into the model, such as "
            f"{sorted(different)[0]}; this is a bug in finetune or peft: please report it with the versions in run.json",
            code="resume.adapter_not_loaded",
        )


def _same(saved: torch.Tensor | None, loaded: torch.Tensor | None) -> bool:
    return saved is not None and loaded is not None and torch.equal(saved, loaded.detach().to("cpu", saved.dtype))
