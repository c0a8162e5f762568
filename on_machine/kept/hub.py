"""The download of a model from the hub beside the installation of packages, for a machine whose bucket does not have it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from on_machine.kept.manifests import DAMAGED, HOME, NOT_THERE, pinned, say

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
SMALL = ("*.json", "*.model", "*.jinja", "*.py")
FILES = (*SMALL, "model.safetensors", "model-*.safetensors")
"""Not the same weights once more in another format, which many models come with."""
PYTHON = HOME / "finetune-env" / "bin" / "python"
SCRIPT = """
import sys
from huggingface_hub import snapshot_download
snapshot_download(sys.argv[1], revision=sys.argv[2], allow_patterns=sys.argv[3:])
"""
"""Not the hub's program `hf`, which ends with a traceback beside the pinned versions of its own packages."""


def model_named(overrides: str, config: str) -> tuple[str, str] | None:
    """(name, commit) of the model of the hub that a task names, read without YAML, which a bare Python lacks: whatever is missed
    here is downloaded later, when the model is loaded."""
    found: dict[str, str] = {}
    inside = False
    for line in config.splitlines():
        if re.match(r"\S", line):
            inside = bool(re.match(r"model:\s*(#.*)?$", line))
        elif inside and (entry := re.match(r"\s+(name|revision):\s*['\"]?([^\s'\"#]+)", line)):
            found[entry[1]] = entry[2]
    found.update(re.findall(r"(?:^|\s)model\.(name|revision)=(\S+)", overrides))
    name, commit = found.get("name", ""), found.get("revision", "")
    local = Path(name).exists()
    return (name, commit) if NAME.fullmatch(name) and COMMIT.fullmatch(commit) and not local else None


def download(texts: list[str], uv: str, files: tuple[str, ...] = FILES) -> int:
    """With the hub's own library: of the environment if that is there, else of one that uv makes for it. files: patterns."""
    named = model_named(texts[0], texts[-1]) if texts else None
    if named is None:
        return NOT_THERE
    name, commit = named
    hub = f"huggingface_hub=={pinned('huggingface-hub')}"
    own = [uv, "run", "--quiet", "--no-project", "--python", "3.11", "--with", hub, "python"]
    python = [str(PYTHON)] if PYTHON.exists() else own
    code = subprocess.run([*python, "-c", SCRIPT, name, commit, *files], check=False).returncode
    if code:
        say(f"{name} is downloaded when it is loaded, because it could not be before (exit code {code})")
        return DAMAGED
    if files == FILES:
        say(f"{name} is downloaded from the hub")
    return 0
