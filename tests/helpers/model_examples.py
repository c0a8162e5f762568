"""What the tests of models/load.py share: short names for configs, and a way to damage a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.schema import ModelSection, QuantizationSection
from finetune.errors import UserError
from finetune.models.device import Device

CPU = Device(torch.device("cpu"), torch.float32)
WHOLE = QuantizationSection(load_in_4bit=False)
NF4 = QuantizationSection()


def named(name: Path | str, **settings: Any) -> ModelSection:
    return ModelSection(name=str(name), **settings)


def refusal(action: Callable[[], object]) -> str:
    """The one line with which something is refused."""
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(path: Path, **changes: Any) -> None:
    """Set some keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
