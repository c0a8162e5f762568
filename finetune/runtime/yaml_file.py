"""YAML files of other programs, such as SkyPilot's task files. Ours are read by `config.yaml_text`."""

from __future__ import annotations

from typing import Any

import yaml


def load_yaml(text: str) -> Any:
    """The value of a YAML document. Raises ValueError, and only that, with one line."""
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:  # PyYAML raises several types besides its own, such as for a date that does not exist
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
