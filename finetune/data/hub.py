"""The Hugging Face hub: downloads at a pinned revision, and what to do when it cannot be reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.runtime.hub_reason import hub_reason
from finetune.runtime.installed import install_command


def download(path: str, revision: str | None, files: list[str], key: str) -> Path:
    """The files of a dataset in the layout of Spider or BIRD."""
    hub = imported("huggingface_hub", key)
    patterns = [*files, "tables.json", "database/*", "*tables.json", "*_databases/*"]
    try:
        return Path(hub.snapshot_download(path, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub and the network have their own exceptions
        raise unreachable(path, revision, key, error) from error


def unreachable(path: str, revision: str | None, key: str, error: Exception) -> UserError:
    why, advice = hub_reason(path, revision, "dataset") or (
        one_line(error),
        "check its files, or give a folder with a copy",
    )
    return UserError(
        f"{key}: cannot fetch {path} at revision {revision} from the Hugging Face hub: {why}; {advice}",
        code="data.hub_unreachable",
    )


def imported(module: str, key: str) -> Any:
    try:
        return __import__(module)
    except ImportError:
        raise UserError(
            f"{key}: needs the package {module}; {install_command('train')}", code="install.missing_package"
        ) from None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
