"""The small JSON files of a save, typed. A checkpoint's files are verified before they are read, but not that they make sense."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from finetune.errors import UserError, first_line
from finetune.runtime.files import parse_json, read_text
from finetune.runtime.typed_json import decode

Kind = TypeVar("Kind")
MOST_STEPS = 10**12
"""Far more steps than a run can have: a larger number in a file is damage."""
_HASH = re.compile(r"[0-9a-f]{1,64}")


@dataclass
class Labels:
    """The last file of a staged save, which makes it complete: what its checkpoint's manifest will say."""

    step: int
    config_hash: str
    data_hash: str
    attempt: int
    lease: int = 0
    """Number of the claim of the attempt (budget/lease.py); saves of earlier versions have none."""

    def for_manifest(self) -> dict[str, Any]:
        """The keywords of `CheckpointStore.put`."""
        return {
            "step": self.step,
            "config_hash": self.config_hash,
            "data_hash": self.data_hash,
            "attempt": self.attempt,
        }


@dataclass
class Probe:
    """examples: their positions in the training set. loss: nats per token; None where it was not finite."""

    examples: Sequence[Any]
    loss: float | None


@dataclass
class LoggingState:
    """Losses (nats per token, summed over steps) since the last log and before it, and the step of that log."""

    loss: float
    total: float
    logged_at: int


@dataclass
class ProgressState:
    """The part of the trainer's own state that we rely on."""

    global_step: int
    log_history: Sequence[Mapping[str, Any]]
    epoch: float | None = None


def read_labels(path: Path) -> Labels | None:
    """None if the file is not readable, or if a value cannot be one that a save has written."""
    try:
        labels = _read(Labels, path)
    except (OSError, ValueError):
        return None
    numbers = all(0 <= number <= MOST_STEPS for number in (labels.step, labels.attempt, labels.lease))
    hashes = all(_HASH.fullmatch(text) for text in (labels.config_hash, labels.data_hash))
    return labels if numbers and hashes else None


def read_probe(path: Path) -> Probe:
    return _of_checkpoint(Probe, path)


def read_logging_state(path: Path) -> LoggingState:
    return _of_checkpoint(LoggingState, path)


def read_progress_state(path: Path) -> ProgressState:
    return _of_checkpoint(ProgressState, path)


def _of_checkpoint(kind: type[Kind], path: Path) -> Kind:
    """Raises UserError."""
    try:
        return _read(kind, path)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else first_line(error)
        raise UserError(
            f"{path}: not what a checkpoint has there ({why}); move this checkpoint away, and the run resumes from an older one",
            code="checkpoint.unreadable_state",
        ) from error


def _read(kind: type[Kind], path: Path) -> Kind:
    value = parse_json(read_text(path), nan=True)  # transformers writes NaN where a gradient was
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return decode(kind, value)
