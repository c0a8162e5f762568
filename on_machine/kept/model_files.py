"""The files of a model of the hub, as its cache has them: those that a launch has needed.

BUCKET/models/<name>@<commit>/manifest.json     the files in a folder of one writer beside it, in blocks (blocks.py)
"""

from __future__ import annotations

import os
import time
from fnmatch import fnmatch
from pathlib import Path

from on_machine.kept.blocks import fetched, keep_files, size_of
from on_machine.kept.manifests import (
    MANIFEST,
    Damaged,
    Json,
    is_inside,
    new_folder,
    note,
    prune,
    read_manifest,
    say,
    write_manifest,
)

KEPT = 2
"""Models that stay in the bucket, the newest."""
WEIGHTS = ("*.safetensors", "*.bin")


def hub_cache() -> Path:
    """Where huggingface_hub looks for files."""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def repository(model: str) -> Path:
    """The model's folder in the hub's cache."""
    return hub_cache() / f"models--{model.replace('/', '--')}"


def model_kept(bucket: Path, texts: list[str]) -> tuple[Path, Json] | None:
    """The folder and the manifest of the model that texts (overrides, config) name. Nothing is decided by that: the loader asks
    the hub's cache for a name and a commit, and what is fetched is used if it is that. Raises Damaged."""
    for folder in sorted((bucket / "models").glob("*@*")):
        manifest = read_manifest(folder)
        if manifest is None or not all(any(manifest[key] in text for text in texts) for key in ("model", "revision")):
            continue
        if not (is_inside(manifest["model"]) and is_inside(manifest["revision"])):
            raise Damaged(f"{folder}: a name that leads out of the cache")
        return folder, manifest
    return None


def fetch_model(folder: Path, manifest: Json, *, weights: bool = True) -> None:
    """The files into the hub's cache, but those that are there. weights: also the weights. Raises Damaged."""
    began = time.monotonic()
    target = repository(manifest["model"]) / "snapshots" / manifest["revision"]
    rows = [row for row in manifest["files"] if weights or not is_weights(row["name"])]
    rows = [row for row in rows if not (target / row["name"]).exists()]
    if not rows:
        return
    with fetched(folder / manifest["folder"], rows, target) as part:
        absent = target.parents[1] / ".no_exist" / target.name
        absent.mkdir(parents=True, exist_ok=True)
        for name in manifest["absent"]:
            (absent / Path(name).name).touch()
        if target.exists():
            for row in rows:
                (part / row["name"]).rename(target / row["name"])
        else:
            part.rename(target)
    if weights:
        size, seconds = size_of(rows), time.monotonic() - began
        for fact, value in (("model_from", "bucket"), ("model_bytes", size), ("model_seconds", round(seconds, 1))):
            note(fact, value)
        say(f"{manifest['model']} from the bucket: {size / 1e9:.2f} GB in {seconds:.1f} s")


def is_weights(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in WEIGHTS)


def keep_model(bucket: Path, model: str, revision: str) -> None:
    """The files that this machine has downloaded, because it needed them, and the names of those that the hub does not have."""
    folder = bucket / "models" / f"{model.replace('/', '--')}@{revision}"
    snapshot = repository(model) / "snapshots" / revision
    if not any(is_weights(path.name) for path in snapshot.glob("*")) or (folder / MANIFEST).exists():
        return
    began = time.monotonic()
    made = new_folder(folder)
    rows = keep_files(snapshot, made)
    absent = repository(model) / ".no_exist" / revision
    missing = sorted(path.name for path in absent.iterdir()) if absent.is_dir() else []
    write_manifest(
        folder, {"model": model, "revision": revision, "folder": made.name, "files": rows, "absent": missing}
    )
    prune(folder.parent, KEPT)
    say(f"{model} kept: {size_of(rows) / 1e9:.2f} GB in {folder}, {time.monotonic() - began:.0f} s")
