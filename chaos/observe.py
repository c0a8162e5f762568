"""Reads a run's folder. Checkpoints, staged saves and adapter are read without the code under test; loss curves and ledger
with it."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path

from finetune.budget.ledger import Ledger
from finetune.run_record import read_record

Curve = list[tuple[int, float]]
"""(step, loss) in the order in which they were logged."""


def checkpoints(run: Path) -> dict[int, Path]:
    """Checkpoint folders by step, intact or not, newest first."""
    found = {int(path.name.removeprefix("step-")): path for path in (run / "checkpoints").glob("step-*")}
    return dict(sorted(found.items(), reverse=True))


def is_whole(folder: Path) -> bool:
    """Whether the manifest exists and every file matches it."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        return bool(files) and all(_sha256(folder / name) == entry["sha256"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def newest_whole(run: Path) -> int:
    """The step of the newest intact checkpoint, 0 if there is none."""
    return next((step for step, folder in checkpoints(run).items() if is_whole(folder)), 0)


def in_flight(run: Path, temporary: Path) -> list[int]:
    """Steps whose save was begun but not committed: staged saves on the local disk, and partial checkpoints in the run folder."""
    committed = newest_whole(run)
    names = [path.name for path in temporary.glob("**/checkpoint-*")] + [
        path.name for path in checkpoints(run).values()
    ]
    steps = {int(found[1]) for name in names if (found := re.match(r"(?:checkpoint|step)-(\d+)", name))}
    return sorted(step for step in steps if step > committed)


def newest_local(temporary: Path) -> int:
    """The step of the newest staged save on the local disk that was ready to be copied, 0 if there is none."""
    labels = [json.loads(path.read_text(encoding="utf-8")) for path in temporary.glob("**/checkpoint-*/labels.json")]
    return max((label["step"] for label in labels), default=0)


def orphans(run: Path) -> list[str]:
    """Files that a finished run must not contain: partial saves, and temporary files of interrupted writes."""
    partial_files = [path for path in checkpoints(run).values() if not (path / "manifest.json").is_file()]
    temporary = [path for path in run.rglob(".*") if path.name.endswith(".tmp")]
    return sorted(
        str(path.relative_to(run)) for path in [*partial_files, *temporary, *run.glob("checkpoints/checkpoint-*")]
    )


def adapter_hash(run: Path) -> str | None:
    path = run / "adapter" / "adapter_model.safetensors"
    return _sha256(path) if path.is_file() else None


def history(run: Path) -> Curve:
    """The losses of run.json."""
    rows = read_record(run / "run.json").history or []
    pairs = [(row.get("step"), row.get("loss")) for row in rows]
    return [(int(step), loss) for step, loss in pairs if step is not None and loss is not None]


def tensorboard(run: Path) -> Curve:
    """The losses as TensorBoard shows them, without those that a later attempt has invalidated."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns about every restart
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def booked(run: Path) -> dict[str, float]:
    """Seconds booked per attempt file, as read by the run's own ledger."""
    return {entry.file: entry.seconds for entry in Ledger(run / "ledger").account().attempts}


def spent_usd(run: Path) -> float:
    return Ledger(run / "ledger").account().usd or 0.0


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
