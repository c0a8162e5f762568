"""From what the trainer saves on the local disk to a checkpoint in the run's folder, which may be a bucket.

The training loop waits only for the local part. `Saver` copies, verifies and commits it behind its back.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.checkpoint.async_saver import Committed, Saver
from finetune.checkpoint.store import CheckpointStore
from finetune.config.load import config_hash, to_yaml
from finetune.config.schema import RunConfig
from finetune.data.prepared import Prepared
from finetune.data.prompts import PromptTemplate
from finetune.errors import UserError
from finetune.proof import PROBE, probe_of
from finetune.run_folder import RunFolder
from finetune.runtime import fault_injection
from finetune.runtime.console import say
from finetune.runtime.files import write_json, write_text
from finetune.trainer import AnswerTrainer

CONFIG, DATA_MANIFEST, WINDOW, LABELS = "config.yaml", "data-manifest.json", "window.json", "labels.json"


def scratch_folder(run_id: str) -> Path:
    """An empty folder on the local disk for snapshots of this run."""
    folder = _scratch(run_id)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def save_what_was_left(store: CheckpointStore) -> None:
    """The newest snapshot that an earlier attempt on this machine could not get into the store is put there now."""
    left = sorted(
        _scratch(store.run_id).glob(f"*/{LABELS}"),
        key=lambda path: int(json.loads(path.read_text(encoding="utf-8"))["step"]),
    )
    if not left:
        return
    labels = json.loads(left[-1].read_text(encoding="utf-8"))
    try:
        store.put(left[-1].parent, **labels)
        say(f"the snapshot of step {labels['step']}, which an earlier attempt left on this machine, is saved")
    except UserError as error:
        say(f"the snapshot of step {labels['step']} that an earlier attempt left cannot be saved: {error}")


def _scratch(run_id: str) -> Path:
    return Path(tempfile.gettempdir()) / f"finetune-{run_id}"


@dataclass
class Saves:
    """What saving has cost this attempt. stall_seconds: for which training waited; committed: the last one."""

    count: int = 0
    stall_seconds: float = 0.0
    committed: list[Committed] = field(default_factory=list)

    def to_dict(self, training_seconds: float) -> dict[str, Any]:
        """For run.json: all measured. share: of the seconds of this attempt in which training waited for a save."""
        last = self.committed[-1] if self.committed else None
        return {
            "count": self.count,
            "stall_seconds": round(self.stall_seconds, 3),
            "stall_share": round(self.stall_seconds / training_seconds, 5) if training_seconds > 0 else None,
            "committed_step": last.step if last else None,
            "commit_seconds": round(last.seconds, 3) if last else None,
            "bytes": last.bytes if last else None,
        }


class Snapshots(TrainerCallback):
    """Adds to the folder that the trainer has saved what else makes a checkpoint whole, and hands it to the saver."""

    def __init__(
        self,
        trainer: AnswerTrainer,
        saver: Saver | None,
        run: RunFolder,
        config: RunConfig,
        data: Prepared,
        template: PromptTemplate,
        attempt: int,
    ) -> None:
        """saver: None on ranks that do not write."""
        self.trainer, self.saver, self.run = trainer, saver, run
        self.config, self.data, self.template, self.attempt = config, data, template, attempt
        self.saves = Saves()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.saver:
            self.saver.check()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.hand_over(state)

    def hand_over(self, state: TrainerState) -> None:
        """The snapshot of the step that `state` is at, saved by the trainer just now."""
        began = time.monotonic()
        folder = Path(self.trainer.args.output_dir) / f"checkpoint-{state.global_step}"
        loss = probe_of(self.trainer)  # every rank: the loss is summed over them
        if self.saver is None:
            return
        write_json(folder / PROBE, loss)
        write_json(folder / WINDOW, self.trainer.logging_window())
        write_text(folder / CONFIG, to_yaml(self.config))
        self.template.save(folder)
        shutil.copyfile(self.data.folder / "manifest.json", folder / DATA_MANIFEST)
        if self.run.ledger.is_dir():
            (folder / "ledger").mkdir()
            for path in self.run.ledger.glob("attempt-*.jsonl"):
                shutil.copyfile(path, folder / "ledger" / path.name)
        fault_injection.place("snapshot")
        labels = {
            "step": state.global_step,
            "config_hash": config_hash(self.config),
            "data_hash": self.data.manifest_hash,
            "attempt": self.attempt,
        }
        write_json(folder / LABELS, labels)  # the last file: from here on the snapshot is whole
        self.saver.submit(folder, **labels)  # type: ignore[arg-type]
        self.saves.count += 1
        self.saves.stall_seconds += self.trainer.save_seconds + time.monotonic() - began
