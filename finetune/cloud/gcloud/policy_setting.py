"""The line in SkyPilot's own config with which the launch policy holds in every folder, not only in that of .sky.yaml."""

from __future__ import annotations

from pathlib import Path

from finetune.cloud.gcloud.config import skypilot_config, skypilot_setting
from finetune.errors import UserError
from finetune.runtime.files import read_text, write_text
from finetune.runtime.yaml_file import load_yaml

KEY = "admin_policy"
POLICY = "finetune.cloud.launch.policy.CostPolicy"
FOLDER_SETTINGS = ".sky.yaml"
"""SkyPilot's settings of a folder, which it reads only for commands typed in it."""


def names_policy(folder: Path) -> bool:
    """Whether the folder's .sky.yaml names ours, so that it holds for `sky` commands typed there."""
    try:
        settings = load_yaml(read_text(folder / FOLDER_SETTINGS))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and settings.get(KEY) == POLICY


def named_policy() -> str | None:
    """The policy that SkyPilot's config names. Raises UserError if the file is not YAML."""
    found = skypilot_setting(KEY)
    return None if found is None else str(found)


def name_policy() -> Path:
    """Adds the line to SkyPilot's config, and changes nothing else in it. Returns the file.

    Raises UserError if the file names another policy, or is written so that a line cannot be added at its end.
    """
    path = skypilot_config()
    found = named_policy()
    if found == POLICY:
        return path
    if found is not None:
        raise UserError(
            f"{path}: {KEY} is {found}, and SkyPilot takes one policy; remove it, or call ours from it",
            code="cloud.another_policy",
        )
    try:
        text = read_text(path)
    except FileNotFoundError:
        text = ""
    before = load_yaml(text) or {}
    added = f"{text.rstrip()}\n{KEY}: {POLICY}\n".lstrip("\n")
    try:
        whole = load_yaml(added)
    except ValueError:
        whole = None
    if not isinstance(before, dict) or whole != before | {KEY: POLICY}:
        raise UserError(
            f"{path}: no line can be added at its end; write `{KEY}: {POLICY}` into it",
            code="cloud.bad_skypilot_config",
        )
    path = path.resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, added)
    return path
