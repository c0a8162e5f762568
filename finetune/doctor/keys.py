"""Rows about keys, and about the servers that a run is tracked on. None shows a key, or the address of a server."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from urllib.parse import urlsplit

from finetune.doctor.check import Check
from finetune.runtime.credentials import huggingface_token_present, wandb_key_present
from finetune.runtime.installed import install_command
from finetune.runtime.network import require_answer

ANSWER_SECONDS = 5.0


def key_checks() -> Iterator[Check]:
    """Whether keys for Hugging Face and W&B are present; never their values."""
    if huggingface_token_present():
        yield Check("Hugging Face token", "ok", "present")
    else:
        advice = "run `hf auth login`, or set HF_TOKEN"
        yield Check("Hugging Face token", "warning", "none", "gated and private models only", advice)
    if wandb_key_present():
        yield Check("W&B key", "ok", "present")
    else:
        advice = "to follow runs on wandb.ai run `wandb login`, or set WANDB_API_KEY"
        yield Check("W&B key", "info", "none", "optional: TensorBoard needs none", advice)


def tracker_checks() -> Iterator[Check]:
    """A row for MLflow and for Trackio, where the environment names a place for them (`tracking.to`, docs/tracking.md)."""
    address = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if address and (row := _not_installed("MLflow", "mlflow")):
        yield row
    elif address.startswith(("http://", "https://")):
        trouble = _no_answer(address)
        advice = (
            "is MLFLOW_TRACKING_URI right, and the server running? Training would go on without it" if trouble else ""
        )
        yield Check("MLflow", "warning" if trouble else "ok", trouble or "its server answers", "", advice)
    elif address:
        yield Check("MLflow", "ok", "a store of this machine, or Databricks")
    places = ("TRACKIO_SERVER_URL", "TRACKIO_SPACE_ID", "TRACKIO_DIR")
    if found := [name for name in places if os.environ.get(name, "").strip()]:
        yield _not_installed("Trackio", "trackio") or Check("Trackio", "ok", f"{found[0]} is set")


def _not_installed(label: str, module: str) -> Check | None:
    if importlib.util.find_spec(module) is not None:
        return None
    return Check(label, "warning", "not installed", "", f"to track runs there: {install_command(module)}")


def _no_answer(address: str) -> str:
    """Why a server does not answer, "" if it does; any status is an answer, because it may want a login."""
    try:
        parts = urlsplit(address)
        require_answer(f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}/health", ANSWER_SECONDS)
    except (OSError, ValueError):
        return "its server does not answer"
    return ""
