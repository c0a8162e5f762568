"""Checks whether the keys of other services are present. No key, nor any part of one, is ever returned, printed or stored."""

from __future__ import annotations

import netrc
import os
import re
from pathlib import Path

SECRET_VARIABLES = (
    *("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "TRACKIO_WRITE_TOKEN"),
    *("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"),
)
HIDDEN = "***"


def huggingface_token_present() -> bool:
    """Whether huggingface_hub would find a token: in the environment, or in its token file."""
    if any(os.environ.get(name, "").strip() for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")):
        return True
    file = Path(os.environ.get("HF_TOKEN_PATH") or huggingface_home() / "token").expanduser()
    try:
        return file.stat().st_size > 0
    except OSError:
        return False


def without_secrets(text: str) -> str:
    """The text with `***` for the user and password of every URL, for tokens in URLs, and for the values of secret variables."""
    for name in SECRET_VARIABLES:
        if value := os.environ.get(name, "").strip():
            text = text.replace(value, HIDDEN)
    text = re.sub(r"(?<=://)[^\s/?#]*@", f"{HIDDEN}@", text)
    return re.sub(r"(?i)\b((?:write_)?token|password|api_key)=[^\s&#'\")]+", rf"\1={HIDDEN}", text)


def huggingface_home() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{cache}/huggingface").expanduser()


def wandb_key_present() -> bool:
    """Whether W&B would find an API key: WANDB_API_KEY, or the host's entry in the netrc file."""
    if os.environ.get("WANDB_API_KEY", "").strip():
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2].split("/")[0]
    file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, ValueError, netrc.NetrcParseError):
        return False
