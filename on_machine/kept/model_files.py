"""The files of a model of the hub, as its cache has them: those that a launch has needed.

BUCKET/models/<name>@<commit>/manifest.json     the files in a folder of one writer beside it; each block of a file has a SHA-256,
                                                so that blocks are read and checked side by side
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from on_machine.kept.manifests import (
    CHUNK,
    MANIFEST,
    NOT_THERE,
    STREAMS,
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
BLOCK_BYTES = 1 << 27


def hub_cache() -> Path:
    """Where huggingface_hub looks for files."""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def repository(model: str) -> Path:
    """The model's folder in the hub's cache."""
    return hub_cache() / f"models--{model.replace('/', '--')}"


def fetch_model(bucket: Path, texts: list[str]) -> int:
    """texts: configs and overrides. Nothing is decided here: the loader asks the hub's cache for a name and a commit, and what is
    fetched is used if it is that."""
    began = time.monotonic()
    for folder in sorted((bucket / "models").glob("*@*")):
        manifest = read_manifest(folder)
        if manifest is None or not all(any(manifest[key] in text for text in texts) for key in ("model", "revision")):
            continue
        if not (is_inside(manifest["model"]) and is_inside(manifest["revision"])):
            raise Damaged(f"{folder}: a name that leads out of the cache")
        target = repository(manifest["model"]) / "snapshots" / manifest["revision"]
        if target.exists():
            return 0
        size = _copy_all(folder / manifest["folder"], manifest, target)
        seconds = time.monotonic() - began
        for fact, value in (("model_from", "bucket"), ("model_bytes", size), ("model_seconds", round(seconds, 1))):
            note(fact, value)
        say(f"{manifest['model']} from the bucket: {size / 1e9:.2f} GB in {seconds:.1f} s")
        return 0
    return NOT_THERE


def _copy_all(source: Path, manifest: Json, target: Path) -> int:
    """The files into a folder that gets its name when every block is right. Returns bytes. Raises Damaged."""
    part = target.with_name(f"{target.name}.part-{os.getpid()}")
    part.mkdir(parents=True)
    try:
        for row in manifest["files"]:
            (part / row["name"]).parent.mkdir(parents=True, exist_ok=True)
            with (part / row["name"]).open("wb") as file:
                file.truncate(row["bytes"])
        blocks = [(row, number) for row in manifest["files"] for number in range(len(row["blocks"]))]
        with ThreadPoolExecutor(STREAMS) as pool:
            for one in [pool.submit(_copy_block, source, part, row, number) for row, number in blocks]:
                one.result()
        absent = target.parents[1] / ".no_exist" / target.name
        absent.mkdir(parents=True, exist_ok=True)
        for name in manifest["absent"]:
            (absent / Path(name).name).touch()
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return sum(int(row["bytes"]) for row in manifest["files"])


def _copy_block(source: Path, target: Path, row: Json, number: int) -> None:
    path, start = source / row["name"], number * BLOCK_BYTES
    left = min(BLOCK_BYTES, row["bytes"] - start)
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file, (target / row["name"]).open("r+b", buffering=0) as copy:
            file.seek(start)
            copy.seek(start)
            while left > 0 and (chunk := file.read(min(CHUNK, left))):
                digest.update(chunk)
                copy.write(chunk)
                left -= len(chunk)
    except OSError as error:
        raise Damaged(f"{path}: {error}") from error
    if left or digest.hexdigest() != row["blocks"][number]:
        raise Damaged(f"{path}: not the bytes that its manifest lists")


def keep_model(bucket: Path, model: str, revision: str) -> None:
    """The files that this machine has downloaded, because it needed them, and the names of those that the hub does not have."""
    folder = bucket / "models" / f"{model.replace('/', '--')}@{revision}"
    snapshot = repository(model) / "snapshots" / revision
    if not snapshot.is_dir() or (folder / MANIFEST).exists():
        return
    began = time.monotonic()
    made = new_folder(folder)
    names = sorted(str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file())
    rows = [_keep_file(snapshot / name, made / name, name) for name in names]
    absent = repository(model) / ".no_exist" / revision
    missing = sorted(path.name for path in absent.iterdir()) if absent.is_dir() else []
    write_manifest(
        folder, {"model": model, "revision": revision, "folder": made.name, "files": rows, "absent": missing}
    )
    prune(folder.parent, KEPT)
    size = sum(row["bytes"] for row in rows)
    say(f"{model} kept: {size / 1e9:.2f} GB in {folder}, {time.monotonic() - began:.0f} s")


def _keep_file(source: Path, target: Path, name: str) -> Json:
    blocks, size, left = [], 0, 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb", buffering=0) as file, target.open("wb", buffering=0) as copy:
        while not left:  # until a block is not full
            digest, left = hashlib.sha256(), BLOCK_BYTES
            while left > 0 and (chunk := file.read(min(CHUNK, left))):
                digest.update(chunk)
                copy.write(chunk)
                left -= len(chunk)
            if left < BLOCK_BYTES:
                blocks.append(digest.hexdigest())
                size += BLOCK_BYTES - left
    return {"name": name, "bytes": size, "blocks": blocks}
