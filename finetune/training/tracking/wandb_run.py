"""A run at Weights & Biases: its id, its server, and the score that it gets after training."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from finetune.runtime.network import require_answer
from finetune.training.tracking.run_ids import tracked_id

RUN_ID_FILE = "wandb-run-id"
SERVER_TIMEOUT_SECONDS = 20.0


def wandb_run_id(run_folder: Path, run_name: str) -> str:
    """The W&B id of the run: WANDB_RUN_ID, else as `tracked_id` says."""
    return tracked_id(run_folder, run_name, RUN_ID_FILE, os.environ.get("WANDB_RUN_ID", "").strip())


def check_server() -> None:
    """Raises OSError if W&B's server does not respond at all: `wandb.init` would wait for it forever, on a machine that costs
    money. An HTTP error counts as a response."""
    require_answer(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai", SERVER_TIMEOUT_SECONDS)


class WandbResults:
    """The W&B run of a training that has ended, for its score alone: the rows came from training itself (trackers.py). It adds
    nothing but the summary; a run that was deleted there is not made anew."""

    def __init__(self, opening: dict[str, Any]) -> None:
        """opening: run_name (its id at W&B), project."""
        check_server()
        import wandb

        self._files = TemporaryDirectory(prefix="wandb-")
        self._run = wandb.init(
            project=opening["project"], id=opening["run_name"], dir=self._files.name, mode="online", resume="must",
            settings=wandb.Settings(
                console="off", silent=True, save_code=False, disable_git=True, disable_job_creation=True,
                x_disable_stats=True, x_disable_meta=True, x_save_requirements=False,
            ),
        )  # fmt: skip

    def deliver(self, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            self._run.summary.update(message.get("results", {}))

    def close(self) -> None:
        self._run.finish()
        self._files.cleanup()
