"""4-bit weights, as a launch has quantised them from a model of the hub (finetune/models/four_bit_files.py).

BUCKET/four-bit/<key>/manifest.json     the files in a folder of one writer beside it, in blocks (blocks.py), and their identity

Whether they are fetched is decided here by what a task says and what the machine has; whether they are used, by the loader, which
asks for the one key that is right.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path

from on_machine.kept.blocks import fetched, keep_files, size_of
from on_machine.kept.manifests import (
    MANIFEST,
    STATE,
    Damaged,
    Json,
    new_folder,
    note,
    pinned,
    prune,
    read_manifest,
    say,
    write_manifest,
)

HERE = STATE / "four-bit"
IDENTITY = "identity.json"
KEPT = 2
DEFAULTS = {
    "torch_dtype": "auto",
    "load_in_4bit": "true",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": "true",
}
"""Of finetune/config/schema.py."""


def fetch_four_bit(bucket: Path, overrides: str, config: str) -> bool:
    """The 4-bit weights that a task will ask for, to where the loader looks. Returns whether they are there; False also, with a
    line, for a copy that cannot be used."""
    try:
        for folder in sorted((bucket / "four-bit").glob("*")):
            manifest = read_manifest(folder)
            if manifest is not None and _is_wanted(manifest["identity"], overrides, config):
                _fetch(folder, manifest)
                return True
    except (Damaged, OSError, ValueError, KeyError, TypeError) as error:
        say(f"the bucket's 4-bit weights are not used: {error}")
    return False


def _fetch(folder: Path, manifest: Json) -> None:
    began, target = time.monotonic(), HERE / folder.name
    if target.exists():
        return
    with fetched(folder / manifest["folder"], manifest["files"], target) as part:
        part.rename(target)
    size, seconds = size_of(manifest["files"]), time.monotonic() - began
    for fact, value in (("model_from", "bucket"), ("four_bit_bytes", size), ("four_bit_seconds", round(seconds, 1))):
        note(fact, value)
    say(f"{manifest['identity']['model']} in 4 bits from the bucket: {size / 1e9:.2f} GB in {seconds:.1f} s")


def _is_wanted(identity: Json, overrides: str, config: str) -> bool:
    said = {name: _setting(name, overrides, config) for name in DEFAULTS}
    if said["load_in_4bit"] != "true" or not all(identity[key] in overrides + config for key in ("model", "revision")):
        return False
    wanted = {"quant_type": said["bnb_4bit_quant_type"], "double_quant": said["bnb_4bit_use_double_quant"] == "true"}
    if (identity["on"], identity["quantised_from"]) not in _places_and_dtypes(said["torch_dtype"]):
        return False
    wanted |= {library: pinned(library) for library in ("bitsandbytes", "transformers")}
    return all(identity[key] == value for key, value in wanted.items())


def _setting(name: str, overrides: str, config: str) -> str:
    """A setting, read without YAML. Its name is in one section of a config only."""
    found = re.findall(rf"\b{name}=(\S+)", overrides) or re.findall(rf"\b{name}:\s*['\"]?([\w-]+)", config)
    return found[-1].lower() if found else DEFAULTS[name]


def _places_and_dtypes(torch_dtype: str) -> list[tuple[str, str]]:
    """Where the weights may be quantised, and from which dtype (finetune/machine/hardware.py: dtype_for)."""
    ask = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    cpu = ("cpu", "float32" if torch_dtype == "auto" else torch_dtype)
    try:
        capability = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return [cpu]
    gpu = ("cuda", ("bfloat16" if float(capability) >= 8 else "float16") if torch_dtype == "auto" else torch_dtype)
    return [gpu, cpu] if os.environ.get("FINETUNE_ALLOW_CPU") == "1" else [gpu]


def keep_four_bit(bucket: Path) -> None:
    """What this machine has quantised, where the bucket lacks it."""
    for source in sorted(HERE.glob("*")):
        folder = bucket / "four-bit" / source.name
        if ".part-" in source.name or not (source / IDENTITY).is_file() or (folder / MANIFEST).exists():
            continue
        began = time.monotonic()
        identity = json.loads((source / IDENTITY).read_text(encoding="utf-8"))
        made = new_folder(folder)
        rows = keep_files(source, made)
        write_manifest(folder, {"folder": made.name, "files": rows, "identity": identity})
        prune(folder.parent, KEPT)
        say(
            f"{identity['model']} in 4 bits kept: {size_of(rows) / 1e9:.2f} GB in {folder}, {time.monotonic() - began:.0f} s"
        )
