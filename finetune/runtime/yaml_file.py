"""YAML files of other programs, such as SkyPilot's task files. Ours are read by `config.yaml_text`."""

from __future__ import annotations

import re
from itertools import accumulate
from typing import Any

import yaml

DEEPEST = 100
"""Brackets within brackets: PyYAML needs seconds for thousands, before it gives up."""


def load_yaml(text: str) -> Any:
    """The value of a YAML document. Raises ValueError, and only that, with one line."""
    if too_deep(text):
        raise ValueError("nested too deeply")
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:  # PyYAML raises several types besides its own, such as for a date that does not exist
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def too_deep(text: str) -> bool:
    """Whether brackets are open within more than DEEPEST others, brackets in quotes included."""
    steps = (1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[\]{}]", text))
    return max(accumulate(steps), default=0) > DEEPEST
