"""What the tests of models/load.py share: short names for configs, and a way to damage a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetune.config.schema import ModelSection, QuantizationSection
from finetune.models.device import Device
from tests.helpers.errors import raises

CPU = Device(torch.device("cpu"), torch.float32)
WHOLE = QuantizationSection(load_in_4bit=False)
NF4 = QuantizationSection()


def named(name: Path | str, **settings: Any) -> ModelSection:
    return ModelSection(name=str(name), **settings)


def refusal(code: str, action: Callable[[], object]) -> str:
    """The one line with which something is refused, by an error with this code."""
    with raises(code) as caught:
        action()
    return str(caught.value)


def change(path: Path, **changes: Any) -> None:
    """Set some keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
