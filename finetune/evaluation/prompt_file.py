"""The prompts of an evaluation, kept for people who read its answers: eval/prompts.json in the run's folder.

    {"format": 1, "starts": ["### sqlite schema ..."], "prompts": {"<id>": [0, "### Question ..."]}}

Each prompt is a start, which questions about one database share, and its own rest; joined they are the prompt, byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.data.records import Record
from finetune.runtime.files import write_json

FORMAT = 1
NAME = "prompts.json"
OWN_PARTS = ("\n### Hint\n", "\n### Question\n")
"""What begins the part of a prompt that belongs to its question."""


def write_prompts(folder: Path, records: Sequence[Record], prompts: Sequence[str]) -> None:
    """folder: eval/ of a run."""
    starts: dict[str, int] = {}
    split: dict[str, Any] = {}
    for record, prompt in zip(records, prompts, strict=True):
        start = prompt[: _own_part(prompt)]
        split[record.id] = [starts.setdefault(start, len(starts)), prompt[len(start) :]]
    write_json(folder / NAME, {"format": FORMAT, "starts": list(starts), "prompts": split})


def _own_part(prompt: str) -> int:
    places = [place + 1 for part in OWN_PARTS if (place := prompt.rfind(part)) >= 0]
    return min(places, default=0)
