"""Which trackers a config asks for, and whether this machine has what they need. Imports none of them."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal

from finetune.config.schema import TRACKERS, TrackingSection
from finetune.errors import UserError
from finetune.runtime.credentials import wandb_key_present
from finetune.runtime.installed import install_command

WandbMode = Literal["online", "offline"]
OUTSIDE = ("mlflow", "trackio")
"""The trackers that training logs to through a process of their own (worker.py)."""
LABELS = {"tensorboard": "TensorBoard", "wandb": "W&B", "mlflow": "MLflow", "trackio": "Trackio"}
EXTRAS = {"tensorboard": "train", "wandb": "train", "mlflow": "mlflow", "trackio": "trackio"}


def chosen(tracking: TrackingSection) -> tuple[str, ...]:
    """The trackers of `tracking.to`; without that key TensorBoard, and W&B as `tracking.wandb` says."""
    if tracking.to is not None:
        return tuple(name for name in TRACKERS if name in tracking.to)
    wandb = tracking.wandb in ("online", "offline") or (tracking.wandb == "auto" and wandb_key_present())
    return ("tensorboard", "wandb") if wandb else ("tensorboard",)


def wandb_mode(tracking: TrackingSection) -> WandbMode | None:
    """The mode in which W&B is used; None if it is not used."""
    if "wandb" not in chosen(tracking):
        return None
    return "offline" if tracking.wandb == "offline" else "online"


def project(tracking: TrackingSection) -> str:
    """MLflow's experiment, and Trackio's project."""
    return tracking.project or tracking.wandb_project


def check_trackers(tracking: TrackingSection) -> None:
    """Raises UserError for a tracker that is not installed here, or has no key or server."""
    names = chosen(tracking)
    if tracking.wandb == "online" and not wandb_key_present():
        raise UserError(
            "tracking.wandb: online needs a key; set WANDB_API_KEY or run `wandb login`, or use offline",
            code="tracking.no_key",
        )
    if tracking.to is not None and "wandb" in names and tracking.wandb == "auto" and not wandb_key_present():
        raise UserError(
            "tracking.to: wandb needs a key; set WANDB_API_KEY or run `wandb login`, or set tracking.wandb=offline",
            code="tracking.no_key",
        )
    for name in names:
        if tracking.to is not None and find_spec(name) is None:
            raise UserError(
                f"tracking.to: {name} is not installed; run `{install_command(EXTRAS[name])}`, or leave it out",
                code="tracking.not_installed",
            )
    if "mlflow" in names and not os.environ.get("MLFLOW_TRACKING_URI", "").strip():
        raise UserError(
            "tracking.to: mlflow needs a server: set MLFLOW_TRACKING_URI, such as http://127.0.0.1:5000, or leave mlflow out",
            code="tracking.no_server",
        )
    if "trackio" in names and os.environ.get("SKYPILOT_TASK_ID") and not _trackio_is_elsewhere():
        raise UserError(
            "tracking.to: trackio would write to the disk of this machine, which is deleted: set TRACKIO_SERVER_URL or "
            "TRACKIO_SPACE_ID, or leave trackio out",
            code="tracking.no_server",
        )


def _trackio_is_elsewhere() -> bool:
    return any(os.environ.get(name, "").strip() for name in ("TRACKIO_SERVER_URL", "TRACKIO_SPACE_ID"))
